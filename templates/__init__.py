"""Text templates shipped with the package, and the functions that read them."""

from __future__ import annotations

from importlib import resources
from string import Template

from nanoos_fw.errors import InputError


def load_template(name: str) -> str:
    """Return the text of a shipped template.

    Parameters
    ----------
    name
        Path below ``templates/``, such as ``"lammps/npt.in"``.

    Raises
    ------
    InputError
        If no such template is shipped.
    """
    parts = name.split("/")
    path = resources.files(__name__).joinpath(*parts)
    # A template lies in a folder below this one; ".." and "" would lead out of it.
    outside = len(parts) == 1 or not {"", ".", ".."}.isdisjoint(parts)
    if outside or not path.is_file():
        raise InputError(
            f"no template {name!r} is shipped with nanoos_fw",
            advice="list the folder templates/ of the package",
        )
    return path.read_text(encoding="utf-8")


def template_names(folder: str) -> list[str]:
    """Return the names of the shipped files of a folder below ``templates/``."""
    files = resources.files(__name__).joinpath(folder).iterdir()
    return sorted(file.name for file in files if file.is_file())


def render_template(name: str, /, **values: object) -> str:
    """Fill the ``${name}`` fields of a shipped template.

    Raises
    ------
    InputError
        If the template is unknown, a field has no value (a missing value must never
        become an empty string in a submit script or a LAMMPS input), or a ``$`` is
        no field; a plain dollar sign is written ``$$``.
    """
    text = load_template(name)
    try:
        return Template(text).substitute({k: str(v) for k, v in values.items()})
    except KeyError as error:
        raise InputError(
            f"template {name!r} needs a value for {error.args[0]!r}",
            evidence={"given": sorted(values)},
        ) from error
    except ValueError as error:
        raise InputError(f"template {name!r} has a malformed field: {error}") from error
