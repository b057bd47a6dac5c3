from __future__ import annotations

from pathlib import Path

import pytest

from nanoos_fw import templates
from nanoos_fw.errors import InputError
from nanoos_fw.templates import load_template, render_template

FOLDER = Path(templates.__file__).parent
NAMES = sorted(
    path.relative_to(FOLDER).as_posix()
    for path in FOLDER.glob("*/**/*")
    if path.is_file() and "__pycache__" not in path.parts
)


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a template file of which the package believes that it ships it."""
    (tmp_path / "lammps").mkdir()
    (tmp_path / "outside.in").write_text("secret")
    monkeypatch.setattr(templates.resources, "files", lambda _: tmp_path)
    return tmp_path / "lammps" / "test.in"


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_template_loads(name: str) -> None:
    assert load_template(name).strip()


def test_fields_are_filled_and_dollars_kept(template: Path) -> None:
    template.write_text("timestep ${timestep_fs}\n# $$HOME costs 5 $$\nÅ ${name}\n")
    text = render_template("lammps/test.in", timestep_fs=0.002, name="x")
    assert text == "timestep 0.002\n# $HOME costs 5 $\nÅ x\n"


def test_a_missing_value_is_an_error_that_names_it(template: Path) -> None:
    template.write_text("run ${steps}\n")
    with pytest.raises(InputError, match="needs a value for 'steps'") as caught:
        render_template("lammps/test.in", step=10)
    assert caught.value.evidence == {"given": ["step"]}


def test_a_lone_dollar_is_an_error_that_names_the_line(template: Path) -> None:
    template.write_text("first line\nprint $ {x}\n")
    with pytest.raises(InputError, match=r"malformed field: .*line 2"):
        render_template("lammps/test.in", x=1)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lammps",
        "lammps/",
        "lammps/no such template",
        "__init__.py",
        "outside.in",
        "../outside.in",
        "lammps/../outside.in",
        "/etc/hostname",
    ],
)
def test_a_name_that_is_no_template_is_refused(template: Path, name: str) -> None:
    template.write_text("x")
    with pytest.raises(InputError, match="no template"):
        load_template(name)
