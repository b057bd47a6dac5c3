"""Report data of ranking, discovery and molecular dynamics."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from nanoos_fw.errors import InputError
from nanoos_fw.reports.base import (
    NotAvailable,
    Quantity,
    ReportModel,
    Series,
    Text,
    Vector,
    plain,
    require_lengths,
)


class CrystalPicture(ReportModel):
    """The cell of a candidate, to be drawn.

    Parameters
    ----------
    lattice
        ``(3, 3)`` Å, one vector per row.
    frac_coords
        ``(n_atoms, 3)`` fractional coordinates.
    symbols
        ``(n_atoms,)`` element symbols.
    """

    lattice: Annotated[tuple[Vector, Vector, Vector], BeforeValidator(plain)]
    frac_coords: Annotated[tuple[Vector, ...], BeforeValidator(plain)]
    symbols: tuple[str, ...]


class RankedCandidate(ReportModel):
    """One row of the ranking.

    Parameters
    ----------
    rank
        From 1, the best prediction first.
    candidate_id
        Content key of the structure.
    formula, prototype
        Reduced formula such as ``"Cu3Au"``; prototype name such as ``"L1_2"``.
    predicted, uncertainty
        Prediction and its standard deviation, in the unit of the target.
    lammps
        Formation energy after relaxation with LAMMPS, eV/atom; a reason where the
        relaxation was wanted and failed; None where it was not wanted, or is not of
        what is predicted.
    out_of_domain
        Whether the screening flagged it as unlike the training data; None if the
        screening has no such flag.
    structure
        Cell to draw, or None.
    """

    rank: PositiveInt
    candidate_id: str
    formula: Text
    prototype: str
    predicted: float
    uncertainty: NonNegativeFloat | None
    lammps: float | NotAvailable | None = None
    out_of_domain: bool | None = None
    structure: CrystalPicture | None = None


class Ranking(ReportModel):
    """The best-ranked candidates.

    Parameters
    ----------
    candidates
        Rows in rank order; 20 to 50 read well.
    n_ranked
        Number of candidates ranked in all.
    tie_rule
        "equal predictions are ordered by content key".
    quantity
        That is predicted.
    highest
        Whether the highest predictions come first.
    """

    candidates: Annotated[tuple[RankedCandidate, ...], Field(min_length=1)]
    n_ranked: PositiveInt
    tie_rule: str = ""
    quantity: Quantity = Quantity()
    highest: bool = False

    @property
    def has_lammps(self) -> bool:
        """Whether LAMMPS computes what is predicted."""
        return self.quantity == Quantity()

    @property
    def end(self) -> str:
        """Which end of the predictions comes first, in a word."""
        return "highest" if self.highest else "lowest"

    @model_validator(mode="after")
    def _in_order(self) -> Ranking:
        ranks = [row.rank for row in self.candidates]
        if ranks != sorted(set(ranks)) or len(ranks) > self.n_ranked:
            raise InputError(
                "ranking: ranks must rise, each once, and not exceed n_ranked",
                evidence={"ranks": ranks[:20], "n_ranked": self.n_ranked},
                advice="sort the candidates by rank",
            )
        return self


class Discovery(ReportModel):
    """All candidates computed, so that the ranking can be judged.

    Parameters
    ----------
    energies_in_predicted_order
        ``(n,)`` computed formation energies, eV/atom, of the candidates in the
        order of their predicted rank.
    population
        Which candidates these are: "candidates never used in training, validation
        or test". Training structures among them would flatter the model.
    k
        How many best candidates are to be found.
    n_failed
        Candidates of the population left out since their computation failed.
    """

    energies_in_predicted_order: Series
    population: Text
    k: PositiveInt = 10
    n_failed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _enough(self) -> Discovery:
        n = len(self.energies_in_predicted_order)
        require_lengths("discovery", n)
        if n <= self.k:
            raise InputError(
                f"discovery: {n} computed candidates, need more than k = {self.k}",
                advice="lower k, or use NotAvailable(reason=...)",
            )
        return self


class Average(ReportModel):
    """Time average of one quantity over the production part.

    Parameters
    ----------
    mean, standard_error
        In the unit of the quantity. None where the run is too short for an error
        bar, which is then shown as such.
    """

    mean: float
    standard_error: NonNegativeFloat | None


class NamedAverage(Average):
    """Average of a further quantity: ``name`` as "density", ``unit`` as "g/cm³"."""

    name: Text
    unit: str


class ThermoSeries(ReportModel):
    """One thermodynamic quantity along a run.

    Parameters
    ----------
    values
        ``(n_frames,)`` in the unit of the field that holds it.
    average
        Over the production part, with its error.
    set_point
        What the thermostat or barostat was asked for.
    """

    values: Series
    average: Average | NotAvailable
    set_point: float | None = None


class RDFCurves(ReportModel):
    """Radial distribution functions.

    Parameters
    ----------
    r
        ``(n,)`` distances, Å.
    total
        ``(n,)`` g(r) over all pairs, no unit.
    partials
        ``"Cu-Au"`` to ``(n,)`` g(r) of that pair.
    """

    r: Series
    total: Series
    partials: dict[str, Series] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _belongs_together(self) -> RDFCurves:
        require_lengths("rdf", len(self.r), total=self.total, **self.partials)
        return self


class DiffusionResult(ReportModel):
    """A diffusion coefficient in Å²/ps; no value where the motion is not diffusive."""

    value: float | None
    standard_error: NonNegativeFloat | None
    diffusive: bool


class MSDCurves(ReportModel):
    """Mean squared displacements.

    Parameters
    ----------
    time_ps
        ``(n,)`` lags, ps.
    total
        ``(n,)`` Å², of all atoms.
    by_element
        Element to ``(n,)`` Å².
    diffusion
        Element, or ``"all"``, to its coefficient.
    """

    time_ps: Series
    total: Series
    by_element: dict[str, Series] = Field(default_factory=dict)
    diffusion: dict[str, DiffusionResult] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _belongs_together(self) -> MSDCurves:
        require_lengths("msd", len(self.time_ps), total=self.total, **self.by_element)
        return self


class VDOSCurves(ReportModel):
    """Vibrational densities of states.

    Parameters
    ----------
    frequency_thz
        ``(n,)`` THz.
    total
        ``(n,)`` modes per THz, of all atoms.
    by_element
        Element to ``(n,)`` modes per THz.
    is_resolved
        Whether the frames are close enough to see the fastest vibrations.
    """

    frequency_thz: Series
    total: Series
    by_element: dict[str, Series] = Field(default_factory=dict)
    is_resolved: bool

    @model_validator(mode="after")
    def _belongs_together(self) -> VDOSCurves:
        require_lengths(
            "vdos", len(self.frequency_thz), total=self.total, **self.by_element
        )
        return self


class MDPanel(ReportModel):
    """One finished molecular dynamics run.

    Parameters
    ----------
    rank, candidate_id, formula, prototype
        The candidate, as in the ranking.
    ensemble
        "NPT", "NVT", "NVE".
    control
        Thermostat and barostat with damping: "Nosé-Hoover, 0.1 ps and 1 ps".
    n_atoms, n_steps, timestep_fs
        Size and length of the run.
    equilibration_ps
        Time left out of averages and RDF.
    time_ps
        ``(n_frames,)`` ps.
    temperature_k, pressure_bar, volume_a3, potential_energy_ev
        Series of the whole simulated cell in K, bar, Å³ and eV.
    other_averages
        Density, lattice constants and the like.
    rdf
        Radial distribution functions of the production part.
    msd, vdos
        Displacements and vibrations of the production part; None if not asked for.
    """

    rank: PositiveInt
    candidate_id: str
    formula: Text
    prototype: str
    ensemble: Text
    control: str = ""
    n_atoms: PositiveInt
    n_steps: PositiveInt
    timestep_fs: PositiveFloat
    equilibration_ps: NonNegativeFloat
    time_ps: Series
    temperature_k: ThermoSeries
    pressure_bar: ThermoSeries
    volume_a3: ThermoSeries
    potential_energy_ev: ThermoSeries
    other_averages: tuple[NamedAverage, ...] = ()
    rdf: RDFCurves | NotAvailable
    msd: MSDCurves | NotAvailable | None = None
    vdos: VDOSCurves | NotAvailable | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> MDPanel:
        require_lengths(
            f"MD run of {self.formula}, rank {self.rank}",
            len(self.time_ps),
            temperature_k=self.temperature_k.values,
            pressure_bar=self.pressure_bar.values,
            volume_a3=self.volume_a3.values,
            potential_energy_ev=self.potential_energy_ev.values,
        )
        return self


class MissingRun(ReportModel):
    """A run that was wanted and has no result: "not available: reason"."""

    rank: PositiveInt
    formula: Text
    prototype: str
    reason: Text
