"""What a simulation's trajectory says: structure, diffusion, vibrations.

`analyze_simulation` computes what is asked for from the files of a simulation; the
modules `rdf`, `transport`, `vibrations`, `statistics` and `thermodynamics` hold the
functions, for trajectories of any origin.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.errors import InputError, NanoOSError
from nanoos_fw.faults import is_environment
from nanoos_fw.md.box import perpendicular_widths
from nanoos_fw.md.output import (
    read_simulation,
    simulation_thermo,
    simulation_trajectory,
)
from nanoos_fw.md.potential_terms import atomic_mass
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.protocols import MDConfig
from nanoos_fw.md.rdf import (
    RadialDistribution,
    angle_distributions,
    radial_distribution,
    radial_distributions,
)
from nanoos_fw.md.statistics import (
    block_average,
    detect_equilibration,
    statistical_inefficiency,
)
from nanoos_fw.md.thermodynamics import npt_fluctuations
from nanoos_fw.md.trajectory import Trajectory
from nanoos_fw.md.transport import (
    CM2_S_PER_A2_PS,
    diffusion,
    mean_squared_displacement,
    trajectory_msd,
)
from nanoos_fw.md.vibrations import trajectory_vibrations
from nanoos_fw.provenance import content_key

__all__ = [
    "ANALYSES",
    "Analysis",
    "AnalysisRequest",
    "RadialDistribution",
    "analyze_simulation",
    "block_average",
    "detect_equilibration",
    "mean_squared_displacement",
    "radial_distribution",
    "radial_distributions",
    "statistical_inefficiency",
]

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

AnalysisName = Literal["rdf", "adf", "msd", "vdos", "npt"]
ANALYSES: tuple[AnalysisName, ...] = ("rdf", "adf", "msd", "vdos", "npt")

# Of g(r); below, there is no shell to tell.
_LOWEST_PEAK = 1.2
_RDF_OPTIONS = ("rdf_max_a", "rdf_bins")
_OPTIONS: dict[AnalysisName, tuple[str, ...]] = {
    "rdf": _RDF_OPTIONS,
    # Without a cutoff, the first minimum of g(r) is it.
    "adf": ("adf_cutoff_a", "adf_bins", *_RDF_OPTIONS),
    "msd": ("msd_first_ps", "msd_last_ps"),
    "vdos": ("vdos_longest_ps",),
    "npt": (),
}


class AnalysisRequest(BaseModel):
    """What to compute of a trajectory.

    Parameters
    ----------
    analyses
        ``rdf`` distances and coordination, ``adf`` angles, ``msd`` displacements and
        diffusion, ``vdos`` vibrations, ``npt`` expansion and bulk modulus from the
        fluctuations of a run at constant pressure.
    rdf_max_a, rdf_bins
        Longest distance and number of bins.
    adf_cutoff_a, adf_bins
        How far neighbours are; None takes the first minimum of g(r).
    msd_first_ps, msd_last_ps
        Lags between which diffusion is fitted; None finds them.
    vdos_longest_ps
        Longest lag of the velocity autocorrelation; None takes a quarter of the run.
    memory_mb
        Bound on the memory for time series; the trajectory may be larger.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    analyses: tuple[AnalysisName, ...] = Field(default=("rdf",), min_length=1)
    rdf_max_a: float = Field(default=8.0, gt=0.0, le=100.0)
    rdf_bins: int = Field(default=160, ge=10, le=100_000)
    adf_cutoff_a: float | None = Field(default=None, gt=0.0, le=20.0)
    adf_bins: int = Field(default=180, ge=10, le=3600)
    msd_first_ps: float | None = Field(default=None, ge=0.0)
    msd_last_ps: float | None = Field(default=None, gt=0.0)
    vdos_longest_ps: float | None = Field(default=None, gt=0.0)
    memory_mb: float = Field(default=256.0, ge=1.0)

    def options(self, name: AnalysisName) -> dict[str, float | None]:
        """Return the parameters that decide the result of an analysis."""
        return {option: getattr(self, option) for option in _OPTIONS[name]}

    def key(self, name: AnalysisName) -> str:
        """Return the name that the result of an analysis is stored under.

        Other options, another key: simulations are shared, and what one campaign asked
        for must not replace what another did.
        """
        return f"{name}-{content_key(f'analysis/{name}', self.options(name))[:12]}"

    @property
    def keys(self) -> dict[str, str]:
        """The keys of all that is asked for, by name."""
        return {name: self.key(name) for name in self.analyses}


@dataclass
class Analysis:
    """Results by name of the analysis.

    Parameters
    ----------
    numbers
        Named numbers with units, and what they rest on, as JSON values.
    arrays
        Curves by analysis and name; the names end in their unit.
    failures
        Why an analysis could not be made; the others are there.
    """

    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    arrays: dict[str, dict[str, Array]] = field(default_factory=dict)
    failures: dict[str, NanoOSError] = field(default_factory=dict)

    def documents(self, request: AnalysisRequest) -> Iterator[tuple[AnalysisName, Any]]:
        """Yield all analyses as JSON values, with what was asked for."""
        for name in dict.fromkeys(request.analyses):
            asked = {"analysis": name, "options": request.options(name)}
            failure = self.failures.get(name)
            found = {"error": failure.to_dict()} if failure else self.numbers[name]
            yield name, {**asked, **found}

    def packed(self, name: str) -> bytes:
        """Return the curves of an analysis as the bytes of an ``.npz`` file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **self.arrays[name])
        return buffer.getvalue()


@dataclass(frozen=True)
class _Source:
    trajectory: Trajectory
    output_dir: Path
    config: MDConfig
    elements: tuple[str, ...]
    masses: tuple[float, ...]
    timestep_ps: float


def analyze_simulation(output_dir: Path, request: AnalysisRequest) -> Analysis:
    """Compute what is asked for of the production part of a simulation.

    An analysis that the trajectory does not allow (frames too far apart, a run too
    short) is a failure with its reason; the others are made.

    Raises
    ------
    InputError
        If the folder holds no simulation, or one without frames after equilibration.
    """
    simulation = read_simulation(output_dir)
    config = MDConfig.model_validate(simulation["config"])
    potential = Potential.model_validate(simulation["potential"])
    elements = tuple(simulation["elements"])
    trajectory = simulation_trajectory(output_dir).after(config.production_start)
    if not len(trajectory):
        raise InputError(
            f"the simulation in {output_dir} has no frames after equilibration",
            evidence={"production_start": config.production_start},
            advice="let it run on; dump_every must be smaller than num_steps",
        )
    source = _Source(
        trajectory=trajectory,
        output_dir=output_dir,
        config=config,
        elements=elements,
        masses=tuple(atomic_mass(element) for element in elements),
        timestep_ps=(config.timestep_fs or potential.timestep_fs) / 1000.0,
    )
    found = Analysis()
    for name in dict.fromkeys(request.analyses):
        try:
            _MAKERS[name](source, request, found)
        except InputError as error:
            if is_environment(error):  # a file that could not be read, say
                raise
            logger.warning("%s of %s: %s", name, output_dir, error)
            found.failures[name] = error
    return found


def _base(source: _Source) -> dict[str, Any]:
    return {
        "n_frames": len(source.trajectory),
        "first_step": source.config.production_start,
        "last_step": int(source.trajectory.step[-1]),
        "is_cut": source.trajectory.is_cut,
        # None: a ramp, so that these are means over many temperatures.
        "set_temperature_k": source.config.production_temperature_k,
    }


def _held_temperature(source: _Source, what: str) -> float:
    """Return the temperature of production; refuse a ramp."""
    held = source.config.production_temperature_k
    if held is None:
        raise InputError(
            f"{what} needs one temperature, and the temperature changes to the end",
            evidence={"production_start": source.config.production_start},
            advice="end the schedule with a part that holds",
        )
    return held


def _rdf(source: _Source, request: AnalysisRequest, found: Analysis) -> None:
    curves = radial_distributions(
        source.trajectory, request.rdf_max_a, request.rdf_bins
    )
    total = curves[None]
    arrays = {"r_a": total.r_a, "total": total.g, "coordination": total.coordination}
    partials = {}
    minima, shells = _shells(curves, source.elements)
    for pair, curve in curves.items():
        if pair is None:
            continue
        first, second = (source.elements[kind - 1] for kind in pair)
        arrays[f"coordination_{first}_{second}"] = curve.coordination
        if pair[0] <= pair[1]:  # g(r) is the same both ways round
            partials[f"{first}-{second}"] = curve.g.tolist()
            arrays[f"g_{first}_{second}"] = curve.g
    found.arrays["rdf"] = arrays
    found.numbers["rdf"] = {
        **_base(source),
        "r_a": total.r_a.tolist(),
        "total": total.g.tolist(),
        "partials": partials,
        "first_minimum_a": minima.get("all"),
        "first_minima_a": minima,
        "half_cell_a": _half_cell_a(source.trajectory),
        "coordination": shells,
        "units": {
            "r_a": "Å",
            "first_minima_a": "Å",
            "half_cell_a": "Å",
            "total": "1",
            "coordination": "1",
        },
    }


def _shells(
    curves: Mapping[tuple[int, int] | None, RadialDistribution], elements: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return where the first shell of each pair ends, and the neighbours in it.

    A pair's shell ends at the minimum of its own g(r): that of all pairs may end before
    it begins, as that of Ti and O does before Sr and O in a perovskite. ``all`` is of
    any two elements.
    """
    minima, shells = {}, {}
    # That of any two first: it is what most people look for.
    for pair in sorted(curves, key=lambda pair: pair or ()):
        curve = curves[pair]
        name = "all" if pair is None else "-".join(elements[k - 1] for k in pair)
        minimum = _first_minimum(curve.r_a, curve.g)
        if minimum is not None:
            minima[name], shells[name] = minimum, curve.shell(minimum)
    return minima, shells


def _half_cell_a(trajectory: Trajectory) -> float:
    """Return half of the smallest distance between faces: beyond, images count."""
    widths = [perpendicular_widths(matrix).min() for matrix in trajectory.matrix]
    return 0.5 * float(min(widths))


def _first_minimum(r: Array, g: Array) -> float | None:
    """Return where g(r) is lowest between its first peak and the next."""
    peak = int(np.argmax(g))
    if g[peak] < _LOWEST_PEAK:
        return None
    # The first peak is not always the highest: at low temperature the second shell of
    # diamond or zinc blende rises above it. A shell of its own falls by half.
    before = np.maximum.accumulate(g[:peak])
    fallen = np.flatnonzero((before >= _LOWEST_PEAK) & (g[:peak] < 0.5 * before))
    if len(fallen):
        peak = int(np.argmax(g[: fallen[0]]))
    # Up to one and a half times its distance: the second shell begins before.
    behind = g[peak : int(np.searchsorted(r, 1.5 * r[peak]))]
    lowest = int(np.argmin(behind))
    if lowest in (0, len(behind) - 1):  # it falls on, or ends at rdf_max_a
        return None
    return float(r[peak + lowest])


def _adf(source: _Source, request: AnalysisRequest, found: Analysis) -> None:
    cutoff = request.adf_cutoff_a
    if cutoff is None:
        total = radial_distributions(
            source.trajectory, request.rdf_max_a, request.rdf_bins
        )[None]
        cutoff = _first_minimum(total.r_a, total.g)
    if cutoff is None:
        raise InputError(
            "g(r) has no first minimum that would tell neighbours from others",
            advice="give adf_cutoff_a",
        )
    angles = angle_distributions(source.trajectory, cutoff, request.adf_bins)
    names = {
        key: "-".join(source.elements[kind - 1] for kind in key)
        for key in angles.density
    }
    found.arrays["adf"] = {
        "angle_deg": angles.angle_deg,
        **{f"density_{names[key]}": v for key, v in angles.density.items()},
    }
    found.numbers["adf"] = {
        **_base(source),
        "cutoff_a": cutoff,
        "angles_per_centre": {
            names[key]: v for key, v in angles.angles_per_centre.items()
        },
        "most_frequent_deg": {
            names[key]: float(angles.angle_deg[int(np.argmax(v))])
            for key, v in angles.density.items()
        },
        "units": {"cutoff_a": "Å", "angle": "degree", "density": "1/degree"},
    }


def _msd(source: _Source, request: AnalysisRequest, found: Analysis) -> None:
    _held_temperature(source, "a diffusion coefficient")
    msd = trajectory_msd(
        source.trajectory,
        source.timestep_ps,
        masses=source.masses,
        memory_mb=request.memory_mb,
    )
    arrays = {"time_ps": msd.time_ps, "total_a2": msd.total}
    coefficients = {}
    curves = [("all", msd.total, sum(msd.n_atoms.values()))]
    curves += [
        (source.elements[kind - 1], curve, msd.n_atoms[kind])
        for kind, curve in msd.by_type.items()
    ]
    for name, curve, n_atoms in curves:
        if name != "all":
            arrays[f"{name}_a2"] = curve
        fit = diffusion(
            msd.time_ps,
            curve,
            n_atoms,
            first_ps=request.msd_first_ps,
            last_ps=request.msd_last_ps,
        )
        value, error = fit.coefficient_a2_ps, fit.standard_error_a2_ps
        coefficients[name] = {
            "value": value,
            "standard_error": error,
            "unit": "Å²/ps",
            "value_cm2_s": None if value is None else value * CM2_S_PER_A2_PS,
            "diffusive": fit.diffusive,
            "exponent": fit.exponent,
            "first_ps": fit.first_ps,
            "last_ps": fit.last_ps,
        }
    found.arrays["msd"] = arrays
    found.numbers["msd"] = {
        **_base(source),
        "diffusion": coefficients,
        "note": "of the periodic box, without the finite-size correction of Yeh and "
        "Hummer",
        "interval_ps": float(msd.time_ps[1]),
        "units": {"time_ps": "ps", "total_a2": "Å²"},
    }


def _vdos(source: _Source, request: AnalysisRequest, found: Analysis) -> None:
    held = _held_temperature(source, "a density of states")
    vibrations = trajectory_vibrations(
        source.trajectory,
        source.timestep_ps,
        source.masses,
        temperature_k=held,
        longest_ps=request.vdos_longest_ps,
        memory_mb=request.memory_mb,
    )
    found.arrays["vdos"] = {
        "time_ps": vibrations.time_ps,
        "vacf": vibrations.vacf,
        "frequency_thz": vibrations.frequency_thz,
        "total_per_thz": vibrations.total,
        **{
            f"{source.elements[kind - 1]}_per_thz": curve
            for kind, curve in vibrations.by_type.items()
        },
    }
    n_atoms = sum(vibrations.n_atoms.values())
    found.numbers["vdos"] = {
        **_base(source),
        "temperature_k": vibrations.temperature_k,
        "n_modes": vibrations.n_modes,
        "n_modes_expected": 3 * n_atoms - 3,
        "limit_thz": vibrations.limit_thz,
        "is_resolved": vibrations.is_resolved,
        "units": {"frequency_thz": "THz", "total_per_thz": "1/THz", "vacf": "1"},
    }


def _npt(source: _Source, request: AnalysisRequest, found: Analysis) -> None:
    del request
    if source.config.workflow_type != "MD_NPT_LAMMPS":
        raise InputError(
            f"fluctuations of the volume need MD_NPT_LAMMPS, not "
            f"{source.config.workflow_type}"
        )
    table = simulation_thermo(source.output_dir).after(source.config.production_start)
    results = npt_fluctuations(
        table, source.config.temperature_k, source.config.pressure_bar
    )
    found.arrays["npt"] = {}
    found.numbers["npt"] = {
        **{name: value.to_dict() for name, value in results.items()},
        "n_rows": len(table),
    }


_MAKERS = {"rdf": _rdf, "adf": _adf, "msd": _msd, "vdos": _vdos, "npt": _npt}
