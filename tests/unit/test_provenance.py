from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoos_fw import __version__, provenance
from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.provenance import (
    canonical_json,
    content_key,
    read_json,
    run_environment,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Numbers as keys too: JSON turns them into text.
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.dictionaries(st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(json_values)
def test_canonical_json_of_a_copy_read_from_text_is_the_same(value: Any) -> None:
    text = canonical_json(value)
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(), st.integers()))
def test_canonical_json_does_not_depend_on_the_order(value: dict[str, int]) -> None:
    backwards = dict(reversed(value.items()))
    assert canonical_json(backwards) == canonical_json(value)


def test_canonical_json_is_known_text() -> None:
    assert canonical_json({"b": (1, 2.5), "a": None}) == '{"a":null,"b":[1,2.5]}'


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": -math.inf}, b"raw", {1j}])
def test_a_value_without_json_form_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="canonical JSON"):
        canonical_json(value)


def test_the_content_key_is_the_hash_of_kind_and_value() -> None:
    text = '{"kind":"relaxation","value":{"force":0.01}}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:40]
    assert content_key("relaxation", {"force": 0.01}) == expected
    assert content_key("md", {"force": 0.01}) != expected
    assert content_key("relaxation", {"force": 0.02}) != expected


def test_hashes_agree_with_the_standard_library(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    path = tmp_path / "data"
    path.write_bytes(data)
    assert sha256_bytes(data) == sha256_file(path) == hashlib.sha256(data).hexdigest()


def test_an_atomic_write_makes_the_folders_and_replaces_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    write_atomic(path, "first")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert names(path.parent) == ["c.txt"]


def test_an_atomic_write_obeys_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", "x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_old_file_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def no_space(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(provenance.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_readers_see_one_whole_version_while_writers_compete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    versions = [letter * 100_000 for letter in "abcd"]
    write_atomic(path, versions[0])

    def write(text: str) -> None:
        for _ in range(10):
            write_atomic(path, text)

    writers = [threading.Thread(target=write, args=(text,)) for text in versions]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(path.read_text())
    for writer in writers:
        writer.join()
    assert seen <= set(versions)
    assert names(tmp_path) == ["file"]


def test_json_files_refuse_nan_and_name_the_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"energy": -3.5})
    assert read_json(path) == {"energy": -3.5}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"energy": math.nan})
    assert read_json(path) == {"energy": -3.5}
    path.write_text('{"energy": -3.')
    with pytest.raises(CorruptArtifactError, match=r"value\.json is not JSON"):
        read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorruptArtifactError, match=r"value\.json is not JSON"):
        read_json(path)


def test_the_run_environment_is_json_with_versions_and_slurm_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    environment = json.loads(json.dumps(run_environment()))
    assert environment["slurm"]["SLURM_JOB_ID"] == "4711"
    assert "SLURM_STEP_ID" not in environment["slurm"]
    assert environment["packages"]["nanoos_fw"] == __version__
    assert {"numpy", "fireworks"} <= environment["packages"].keys()
    time = datetime.fromisoformat(environment["time"])
    assert time.utcoffset() == timedelta(0)
