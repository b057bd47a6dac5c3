from __future__ import annotations

import json
import pickle

import pytest

from nanoos_fw import errors
from nanoos_fw.errors import (
    InputError,
    LaunchError,
    NanoOSError,
    OutOfTimeError,
    error_from_dict,
)


def error_classes() -> list[type[NanoOSError]]:
    found = [NanoOSError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return [cls for cls in found if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.__name__)
def test_an_error_survives_json_and_pickle(cls: type[NanoOSError]) -> None:
    error = cls(
        "atom 3 is lost", evidence={"atom": 3, "box": [1.0, 2.0]}, advice="wait"
    )
    through_json = error_from_dict(json.loads(json.dumps(error.to_dict())))
    through_pickle = pickle.loads(pickle.dumps(error))
    for copy in (through_json, through_pickle):
        assert type(copy) is cls
        assert copy.to_dict() == error.to_dict()
        assert str(copy) == str(error)


def test_every_error_has_a_kind_of_its_own() -> None:
    kinds = [cls.kind for cls in error_classes()]
    assert len(set(kinds)) == len(kinds) >= 9


def test_only_a_stop_with_a_checkpoint_is_resumable() -> None:
    assert [cls for cls in error_classes() if cls.resumable] == [OutOfTimeError]


def test_the_text_is_the_message_and_the_next_step() -> None:
    assert str(InputError("no such file")) == "no such file"
    assert str(InputError("no such file", advice="look")) == "no such file; look"


def test_the_evidence_is_a_copy() -> None:
    evidence = {"step": 1}
    error = LaunchError("died", evidence=evidence)
    evidence["step"] = 2
    assert error.evidence == {"step": 1}


def test_an_unknown_kind_is_still_an_error_with_its_message() -> None:
    error = error_from_dict({"kind": "from a later release", "message": "too hot"})
    assert type(error) is NanoOSError
    assert error.message == "too hot"


def test_an_empty_report_is_an_error_too() -> None:
    assert error_from_dict({}).message == "unknown error"
