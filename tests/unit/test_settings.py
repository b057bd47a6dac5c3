from __future__ import annotations

from pathlib import Path

import pytest

from nanoos_fw.errors import InputError
from nanoos_fw.settings import Settings, load_settings


def test_defaults_need_no_file(tmp_path: Path) -> None:
    assert load_settings({"NANO_OS_CONFIG": str(tmp_path / "none.yaml")}) == Settings()


def test_a_variable_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("ranks: 4\nwork_dir: /scratch/x\n")
    settings = load_settings({"NANO_OS_CONFIG": str(file), "NANO_OS_RANKS": "8"})
    assert settings.ranks == 8
    assert settings.work_dir == Path("/scratch/x")


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"NANO_OS_RANK": "4"}, "NANO_OS_RANK"),
        ({"NANO_OS_RANKS": "many"}, "NANO_OS_RANKS"),
        ({"NANO_OS_RANKS": "0"}, "NANO_OS_RANKS"),
    ],
)
def test_a_bad_variable_is_named(
    tmp_path: Path, environ: dict[str, str], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        load_settings({"NANO_OS_CONFIG": str(tmp_path / "none.yaml"), **environ})


@pytest.mark.parametrize("text", ["ranks: [", "- a\n- b\n", "unknown_key: 1\n"])
def test_a_bad_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(InputError):
        load_settings({"NANO_OS_CONFIG": str(file)})


def test_variables_of_the_tests_are_no_settings(tmp_path: Path) -> None:
    environ = {
        "NANO_OS_CONFIG": str(tmp_path / "none.yaml"),
        "NANO_OS_TEST_MONGODB_URI": "mongodb://localhost",
        "NANO_OS_PARENT": "host:1",
    }
    assert load_settings(environ) == Settings()
