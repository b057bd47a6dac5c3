"""Workflow files: one simulation as YAML, checked before anything is written.

A file names a structure, a potential, a folder and the fields of `MDConfig`. Those
that are shipped (``templates/workflows``) are read by the same code as those of users.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.errors import InputError
from nanoos_fw.md.box import LammpsBox
from nanoos_fw.md.catalogue import Catalogue
from nanoos_fw.md.cells import site_elements, supercell
from nanoos_fw.md.engine import LAMMPSEngine
from nanoos_fw.md.inputs import timestep_warnings
from nanoos_fw.md.potential_checks import check_potential
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.properties import strained_copies
from nanoos_fw.md.protocols import ALIASES, MDConfig, ScheduleStep
from nanoos_fw.structure_files import StructureEntry, read_structures
from nanoos_fw.templates import load_template, template_names

if TYPE_CHECKING:
    from pymatgen.core import Structure

FOLDER = "workflows"
SCHEMA_VERSION = 1
_KEYS = ("schema_version", "structure", "potential", "work_dir", "simulation")


@dataclass(frozen=True)
class WorkflowFile:
    """A workflow file that was read: its parameters passed their ranges.

    Parameters
    ----------
    name
        The shipped template or the path, for messages.
    structure
        File of the structure; one that is relative is beside the workflow file.
    potential
        As `Catalogue.resolve` takes it.
    work_dir
        Folder of the simulation; one that is relative is in the current folder.
    config
        The simulation.
    """

    name: str
    structure: Path
    potential: str | dict[str, Any] | None
    work_dir: Path
    config: MDConfig


@dataclass(frozen=True)
class WorkflowPlan:
    """What a workflow file comes to, with its structure and potential.

    Parameters
    ----------
    structure
        As it was read, before it is repeated.
    n_atoms, box_a
        Of the simulated cell: atoms, and the box's lengths in Å.
    potential
        The recipe; its generated files are gone.
    evaluations
        Strained copies of elastic constants and equation of state; else 0.
    warnings
        What is allowed and may surprise.
    """

    workflow: WorkflowFile
    structure: Structure
    n_atoms: int
    box_a: tuple[float, float, float]
    potential: Potential
    evaluations: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, in the units of their names."""
        config = self.workflow.config
        timestep = config.timestep_fs or self.potential.timestep_fs
        found: dict[str, Any] = {
            "workflow": self.workflow.name,
            "workflow_type": config.workflow_type,
            "formula": self.structure.composition.reduced_formula,
            "n_atoms": self.n_atoms,
            "box_a": list(self.box_a),
            "potential": self.potential.name,
            "potential_identity": self.potential.identity,
            "work_dir": str(self.workflow.work_dir),
            "warnings": list(self.warnings),
        }
        if config.is_dynamics:
            steps, every = config.total_steps, config.dump_every
            found |= {
                "timestep_fs": timestep,
                "steps": steps,
                "time_ps": steps * timestep / 1000.0,
                # The first frame is that of step 0.
                "frames": 1 + steps // every if every else 0,
                "stages": [
                    {
                        "name": stage.name,
                        "ensemble": stage.ensemble,
                        "steps": stage.last_step - stage.first_step,
                        "start_k": stage.start_k,
                        "stop_k": stage.stop_k,
                    }
                    for stage in config.stages()
                ],
            }
        elif self.evaluations:
            found["evaluations"] = self.evaluations
        elif config.workflow_type == "MINIMIZE_LAMMPS":
            found["steps_at_most"] = config.num_steps
        return found


def shipped_workflows() -> dict[str, str]:
    """Return the names of the shipped workflow files and what each is for."""
    found = {}
    for file in template_names(FOLDER):
        if file.endswith(".yaml"):
            first = load_template(f"{FOLDER}/{file}").splitlines()[0]
            found[file.removesuffix(".yaml")] = first.lstrip("# ").rstrip()
    return found


def workflow_text(name: str) -> str:
    """Return a shipped workflow file as it is, with its comments.

    Raises
    ------
    InputError
        If none of this name is shipped; names those near.
    """
    known = shipped_workflows()
    if name not in known:
        raise InputError(
            f"no workflow template {name!r} is shipped",
            advice=_near(name, known) or f"there are: {', '.join(known)}",
        )
    return load_template(f"{FOLDER}/{name}.yaml")


def read_workflow(name_or_path: str) -> WorkflowFile:
    """Read a shipped workflow file by its name, or one of the user by its path.

    Raises
    ------
    InputError
        If there is no such file, it is no YAML mapping, a key is unknown (the near
        name is given), or a value is of the wrong kind or out of range.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise InputError(f"workflow file {path} cannot be read: {error}") from error
        return parse_workflow(text, str(path), path.resolve().parent)
    text = workflow_text(name_or_path)
    folder = resources.files("nanoos_fw.templates").joinpath(FOLDER)
    return parse_workflow(text, name_or_path, Path(str(folder)))


def parse_workflow(text: str, name: str, folder: Path) -> WorkflowFile:
    """Return the checked content of a workflow file.

    Parameters
    ----------
    text
        YAML.
    name
        For messages.
    folder
        What a relative structure file is relative to.

    Raises
    ------
    InputError
        As `read_workflow`.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:
        short = " ".join(str(error).split())
        raise InputError(f"workflow {name} is not YAML: {short}") from error
    if not isinstance(data, dict):
        raise InputError(
            f"workflow {name} is not a mapping",
            advice="begin with 'nanoos template show nvt'",
        )
    _known_keys(data, _KEYS, f"workflow {name}")
    version = data.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise InputError(
            f"workflow {name} has schema_version {version!r}, not {SCHEMA_VERSION}",
            advice="compare with 'nanoos template show nvt'",
        )
    parameters = data.get("simulation")
    if not isinstance(parameters, dict):
        raise InputError(f"workflow {name} needs a mapping 'simulation'")
    potential = data.get("potential")
    if potential is not None and not isinstance(potential, str | dict):
        raise InputError(
            f"workflow {name}: potential must be a name or commands, not {potential!r}",
            advice="see 'nanoos potentials list'",
        )
    return WorkflowFile(
        name=name,
        structure=folder / _path(data, "structure", name),
        potential=potential,
        work_dir=_path(data, "work_dir", name),
        config=_config(parameters, name),
    )


def read_structure(path: Path) -> Structure:
    """Return the one structure of a file.

    Raises
    ------
    InputError
        If there is none, several, or one that is refused.
    """
    if path.is_dir():
        raise InputError(f"structure {path} is a folder", advice="name a file of it")
    entries = []
    for entry in read_structures(path):
        if not isinstance(entry, StructureEntry):
            raise InputError(
                f"structure {path} cannot be used: {entry.error.message}",
                evidence=entry.error.evidence,
                advice=entry.error.advice or "name a file that holds one structure",
            )
        entries.append(entry)
        if len(entries) > 1:
            break
    if len(entries) != 1:
        held = "several structures" if entries else "no structure"
        raise InputError(
            f"{path} holds {held}", advice="name a file that holds just one"
        )
    return entries[0].structure


def plan_workflow(
    workflow: WorkflowFile, structure: Structure | None = None
) -> WorkflowPlan:
    """Check a workflow with its structure, potential and LAMMPS; write nothing.

    Parameters
    ----------
    workflow
        What was read.
    structure
        Taken instead of the file's, which then need not be there.

    Raises
    ------
    InputError
        If they do not go together.
    MissingDependencyError
        If the installed LAMMPS lacks a style.
    """
    if structure is None:
        structure = read_structure(workflow.structure)
    config = workflow.config
    elements = sorted(set(site_elements(structure)))
    with tempfile.TemporaryDirectory() as folder:
        potential = Catalogue().resolve(workflow.potential, elements, Path(folder))
        cell = supercell(structure, config.supercell_min_atoms)
        warnings = check_potential(cell, potential)
    config.check_atoms(len(cell))
    x, y, z = (float(v) for v in LammpsBox.from_lattice(cell.lattice.matrix).lengths)
    return WorkflowPlan(
        workflow=workflow,
        structure=structure,
        n_atoms=len(cell),
        box_a=(x, y, z),
        potential=potential,
        evaluations=strained_copies(config),
        warnings=(*warnings, *timestep_warnings(config, potential, elements)),
    )


def render_workflow(plan: WorkflowPlan) -> Path:
    """Write the input of a planned simulation, without running it.

    Returns
    -------
    Path
        The input folder in ``work_dir``.

    Raises
    ------
    InputError
        If the folder is in use: the input of a simulation that was begun must not be
        changed under it.
    """
    workflow = plan.workflow
    folder = workflow.work_dir
    try:
        in_use = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if not in_use:
            return LAMMPSEngine().prepare_input(
                plan.structure,
                {**workflow.config.model_dump(), "potential": workflow.potential},
                folder,
            )
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error
    raise InputError(f"{folder} is not empty", advice="give another folder with -o")


def _config(parameters: Mapping[Any, Any], name: str) -> MDConfig:
    where = f"simulation of workflow {name}"
    _known_keys(parameters, (*MDConfig.model_fields, *ALIASES), where)
    for alias, own in ALIASES.items():
        if alias in parameters and own in parameters:
            raise InputError(f"{where}: {alias} and {own} are the same; give one")
    schedule = parameters.get("schedule")
    parts = schedule if isinstance(schedule, list) else []
    parts = [part for part in parts if isinstance(part, dict)]
    for number, part in enumerate(parts, start=1):
        _known_keys(part, ScheduleStep.model_fields, f"{where}, schedule {number}")
    return MDConfig.from_parameters(parameters)


def _path(data: Mapping[str, Any], key: str, name: str) -> Path:
    value = data.get(key)
    if not isinstance(value, str) or not value or "\0" in value:
        raise InputError(f"workflow {name} needs a path {key!r}, not {value!r}")
    return Path(value).expanduser()


def _known_keys(data: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in data:
        if key not in known:
            raise InputError(
                f"{where}: there is no {key!r}",
                advice=_near(str(key), known) or f"there are: {', '.join(known)}",
            )


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""
