"""How LAMMPS fails, what it means, and what may be changed to try again.

Each message of LAMMPS belongs to a class with an advice. Some classes have a
correction: a change of the configuration that leaves the physics what it was asked
to be. Corrections are few, counted, and part of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoos_fw.errors import NanoOSError, SimulationError
from nanoos_fw.md.protocols import MAX_INT32, MDConfig

# Failures so early are those of the structure, not of the timestep.
_EARLY_STEPS = 200
_PRE_MINIMIZE_STEPS = 1000
_MIN_TIMESTEP_FS = 0.05
_MAX_SKIN_A = 4.0
_MAX_NEIGHBORS = 100_000
# Classes that come of atoms that move too far in a step.
_FROM_MOTION = ("lost_atoms", "not_a_number", "missing_bonded", "out_of_range")


@dataclass(frozen=True)
class FailureClass:
    """A way in which LAMMPS fails.

    Parameters
    ----------
    name
        Stored with the error, as ``evidence["class"]``.
    fragments
        Parts of LAMMPS' messages, in lower case.
    advice
        The next step for the user.
    """

    name: str
    fragments: tuple[str, ...]
    advice: str


# The first that fits counts.
FAILURES: tuple[FailureClass, ...] = (
    FailureClass(
        "lost_atoms",
        ("lost atoms", "atoms lost"),
        "use a smaller timestep, or minimize first (pre_minimize_steps)",
    ),
    FailureClass(
        "not_a_number",
        (
            "non-numeric pressure",
            "non-numeric atom",
            "non-numeric positions",
            "non-numeric box",
            "simulation unstable",
        ),
        "minimize first (pre_minimize_steps), or use a smaller timestep; under a "
        "barostat also a longer barostat_fs",
    ),
    FailureClass(
        "out_of_range",
        (
            "out of range atoms",
            "out of range - cannot compute",
            "atom lies outside",
            "communication cutoff",
        ),
        "rebuild neighbour lists more often or with a larger neighbor_skin_a, or use "
        "a smaller timestep",
    ),
    FailureClass(
        "neighbour_overflow",
        ("neighbor list overflow", "neigh_modify one"),
        "raise neighbor_one; if that does not help, the cell has collapsed",
    ),
    FailureClass(
        "missing_bonded",
        (
            "bond atoms",
            "bond atom missing",
            "angle atoms",
            "angle atom missing",
            "dihedral atoms",
            "dihedral atom missing",
            "improper atoms",
            "bond/angle/dihedral extent",
            "too many bonds",
        ),
        "use a smaller timestep; atoms of one molecule must not move apart further "
        "than the communication cutoff",
    ),
    FailureClass(
        "charges",
        (
            "qeq did not converge",
            "failed to converge",
            "requires atom attribute q",
            "charge equilibration",
        ),
        "check the structure for atoms too close, and give charges where asked for",
    ),
    FailureClass(
        "box",
        (
            "too many neighbor bins",
            "box bounds are invalid",
            "becomes too skewed",
            "too skewed",
            "box tilt",
            "domain too large",
            "illegal simulation box",
            "edge vectors must be right-handed",
        ),
        "check the lattice; under a barostat use a longer barostat_fs, or iso or aniso",
    ),
    FailureClass(
        "small_box",
        ("sub-domain", "smaller than 2", "periodic image", "cutoff is larger"),
        "use fewer ranks or a larger supercell_min_atoms",
    ),
    FailureClass(
        "disk_full",
        (
            "no space left",
            "disk quota exceeded",
            "file too large",
            "error writing",
            "i/o error while writing",
        ),
        "free space, or write fewer frames (dump_every), then execute again",
    ),
    FailureClass(
        "file",
        ("cannot open", "no such file", "permission denied", "unexpected end of file"),
        "check that the file is in the work directory",
    ),
    FailureClass(
        "potential",
        (
            "missing an entry",
            "pair coeff",
            "incorrect format in",
            "incorrect args for pair coefficients",
            "no matching element",
            "elements in potential",
        ),
        "the potential does not know these elements, or its file is damaged",
    ),
    FailureClass(
        "restart_unreadable",
        ("invalid flag in", "restart file", "read_restart"),
        "execute again: an older restart file is used",
    ),
    FailureClass(
        "style",
        ("unrecognized pair style", "unrecognized fix style", "unknown pair style"),
        "this LAMMPS was built without the package of the style",
    ),
    FailureClass(
        "out_of_memory",
        ("failed to allocate", "bad_alloc", "cannot allocate"),
        "use more ranks on more nodes, or a smaller cell",
    ),
    FailureClass(
        "minimization",
        ("linesearch", "energy or force is not finite"),
        "check the structure for atoms too close",
    ),
)


def failure_class(message: str) -> FailureClass | None:
    """Return the class of a message of LAMMPS, or None if it is not known."""
    text = message.lower()
    for failure in FAILURES:
        if any(fragment in text for fragment in failure.fragments):
            return failure
    return None


def simulation_error(message: str, command: str | None = None) -> SimulationError:
    """Return LAMMPS' message as an error with a class that a rerun can decide on.

    Parameters
    ----------
    message
        As LAMMPS gave it: ``ERROR: ...`` or ``ERROR on proc 0: ...``.
    command
        The command that failed.
    """
    text = " ".join(message.split())
    failure = failure_class(text)
    evidence = {"class": failure.name if failure else "lammps", "lammps_message": text}
    if command is not None:
        evidence["command"] = command
        if command.startswith("read_restart"):
            evidence["class"] = "restart_unreadable"
    return SimulationError(
        f"LAMMPS failed: {text}",
        evidence=evidence,
        advice=failure.advice if failure else "see LAMMPS' manual for this message",
    )


@dataclass(frozen=True)
class Correction:
    """A changed configuration and why it may help.

    Parameters
    ----------
    config
        What to try next.
    reason
        One sentence.
    """

    config: MDConfig
    reason: str


def correction(
    error: NanoOSError, config: MDConfig, timestep_fs: float
) -> Correction | None:
    """Return a change that may avoid a failure; None if there is nothing to try.

    Parameters
    ----------
    error
        The failure, with its class and ``last_step`` as evidence.
    config
        What failed.
    timestep_fs
        The timestep it had, given or by default.
    """
    if not config.is_dynamics:
        return None
    kind, change = error.evidence.get("class"), None
    early = int(error.evidence.get("last_step") or 0) <= _EARLY_STEPS
    if kind == "out_of_range":
        skin = min(2.0 * max(config.neighbor_skin_a, 0.5), _MAX_SKIN_A)
        if skin > config.neighbor_skin_a or config.neighbor_every > 1:
            change = _change(
                config,
                "atoms left their neighbour lists: these are rebuilt in time",
                neighbor_skin_a=skin,
                neighbor_every=1,
            )
    elif kind in ("lost_atoms", "not_a_number"):
        if early and not config.pre_minimize_steps:
            change = _change(
                config,
                "it failed within its first steps: the positions are minimized first",
                pre_minimize_steps=_PRE_MINIMIZE_STEPS,
            )
    elif kind == "neighbour_overflow" and config.neighbor_one < _MAX_NEIGHBORS:
        change = _change(
            config,
            "an atom has more neighbours than expected: LAMMPS is told to expect them",
            neighbor_one=min(10 * config.neighbor_one, _MAX_NEIGHBORS),
        )
    if change is None and kind in _FROM_MOTION:
        change = _shorter_steps(config, timestep_fs)
    return change


def refuse_more_corrections(done: Sequence[Mapping[str, Any]], limit: int) -> None:
    """Refuse what was corrected more often than is allowed now.

    A simulation that was made, or begun, with more corrections is no result for whom
    allows fewer: theirs would have failed.

    Raises
    ------
    SimulationError
        With the first failure that was not to be corrected.
    """
    if len(done) <= limit:
        return
    first = done[limit]
    raise SimulationError(
        f"this simulation was corrected {len(done)} time(s), of which {limit} are "
        f"allowed; without that: {first['message']}",
        evidence={"class": first["class"], "changes": first["changes"]},
        advice=f"allow {len(done)} correction(s), or ask for the changes themselves",
    )


def changes(before: MDConfig, after: MDConfig) -> dict[str, list[Any]]:
    """Return the fields that differ, each with its two values."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {name: [old[name], new[name]] for name in old if old[name] != new[name]}


def _shorter_steps(config: MDConfig, timestep_fs: float) -> Correction | None:
    """Halve the timestep and double the steps: the simulated time stays."""
    half = 0.5 * timestep_fs
    if half < _MIN_TIMESTEP_FS or 2 * config.total_steps > MAX_INT32:
        return None
    parts = [
        part.model_copy(update={"steps": 2 * part.steps}) for part in config.schedule
    ]
    return _change(
        config,
        "the timestep is halved, and the numbers of steps doubled: the simulated time "
        "stays",
        timestep_fs=half,
        # Damping times were given, or follow from the timestep that was asked for.
        thermostat_fs=config.thermostat_fs or 100.0 * timestep_fs,
        barostat_fs=config.barostat_fs or 1000.0 * timestep_fs,
        equilibration_steps=2 * config.equilibration_steps,
        num_steps=2 * config.num_steps,
        thermo_every=min(2 * config.thermo_every, MAX_INT32),
        dump_every=min(2 * config.dump_every, MAX_INT32),
        restart_every=min(2 * config.restart_every, MAX_INT32),
        schedule=parts,
    )


def _change(config: MDConfig, reason: str, **values: Any) -> Correction:
    return Correction(
        MDConfig.model_validate({**config.model_dump(), **values}), reason
    )
