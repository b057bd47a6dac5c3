"""What a campaign report shows, as frozen models without a database behind them.

The collector fills one :class:`ReportData`; a part it cannot fill is a
:class:`NotAvailable` with the reason, never a guessed number. Energies are formation
energies in eV/atom, lengths in Å, and lower energies rank first.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from nanoos_fw.errors import InputError


def _plain(value: Any) -> Any:
    """Accept numpy arrays wherever a sequence of numbers is expected."""
    return value.tolist() if isinstance(value, np.ndarray) else value


Series = Annotated[tuple[float, ...], BeforeValidator(_plain)]
Epochs = Annotated[tuple[int, ...], BeforeValidator(_plain)]
Vector = tuple[float, float, float]
Text = Annotated[str, Field(min_length=1)]
Setting = str | int | float | bool | None


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _require_lengths(owner: str, expected: int, **series: Series | None) -> None:
    """Refuse arrays that do not belong together."""
    wrong = {
        name: len(values)
        for name, values in series.items()
        if values is not None and len(values) != expected
    }
    if wrong:
        raise InputError(
            f"{owner}: {', '.join(wrong)} must have {expected} values",
            evidence={"expected": expected, **wrong},
            advice="collect all arrays of one object from the same document",
        )
    if expected == 0:
        raise InputError(
            f"{owner} holds no values",
            advice="use NotAvailable(reason=...) for a part that has no data",
        )


class NotAvailable(_Model):
    """A part of the report that could not be filled, and why.

    Parameters
    ----------
    reason
        Shown as "not available: reason", so without a capital or a full stop.
    """

    reason: Text


class StageCount(_Model):
    """How far one stage of the campaign came.

    Parameters
    ----------
    planned
        Number of candidates that entered the stage.
    finished, failed
        Number that ended with a result, and with an error. The rest is pending.
    """

    planned: NonNegativeInt
    finished: NonNegativeInt
    failed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _adds_up(self) -> StageCount:
        if self.finished + self.failed > self.planned:
            raise InputError(
                "a stage has more ended than planned candidates",
                evidence=self.model_dump(),
                advice="count every candidate once, by its last state",
            )
        return self

    @property
    def pending(self) -> int:
        """Number of candidates that neither finished nor failed."""
        return self.planned - self.finished - self.failed


class Funnel(_Model):
    """Counts along the campaign.

    Parameters
    ----------
    candidates
        Number of candidate structures.
    labelled
        Candidates given to LAMMPS for a training label.
    screened
        Candidates given to the model.
    relaxed
        Best-ranked candidates relaxed with LAMMPS to check the model.
    simulated
        Candidates given to molecular dynamics.
    """

    candidates: NonNegativeInt
    labelled: StageCount
    screened: StageCount
    relaxed: StageCount
    simulated: StageCount


class Labels(_Model):
    """Formation energies that the model learns from.

    Parameters
    ----------
    energies_by_prototype
        Prototype name to formation energies, eV/atom.
    method
        How they were computed, as a phrase: "LAMMPS relaxation of cell and atoms
        with the potential ...".
    """

    energies_by_prototype: dict[str, Series]
    method: Text

    @model_validator(mode="after")
    def _has_values(self) -> Labels:
        _require_lengths("labels", sum(map(len, self.energies_by_prototype.values())))
        return self


class MemberCurve(_Model):
    """Learning curve of one ensemble member.

    Parameters
    ----------
    member
        Number of the member, from 1.
    seed
        Seed of its initial weights and batch order.
    epochs
        ``(n,)`` epoch numbers, rising.
    train_loss
        ``(n,)`` training loss per epoch.
    validation_mae
        ``(n,)`` validation MAE per epoch, eV/atom.
    best_epoch
        Epoch whose weights were kept; one of ``epochs``.
    """

    member: PositiveInt
    seed: int
    epochs: Epochs
    train_loss: Series
    validation_mae: Series
    best_epoch: int

    @model_validator(mode="after")
    def _belongs_together(self) -> MemberCurve:
        _require_lengths(
            f"learning curve of member {self.member}",
            len(self.epochs),
            train_loss=self.train_loss,
            validation_mae=self.validation_mae,
        )
        if self.best_epoch not in self.epochs:
            raise InputError(
                f"member {self.member} has no epoch {self.best_epoch} on its curve",
                evidence={"first": self.epochs[0], "last": self.epochs[-1]},
                advice="number best_epoch like epochs",
            )
        return self

    @property
    def best_validation_mae(self) -> float:
        """Validation MAE at the kept epoch, eV/atom."""
        return self.validation_mae[self.epochs.index(self.best_epoch)]


class Training(_Model):
    """How the ensemble was trained.

    Parameters
    ----------
    members
        One curve per ensemble member.
    loss_name
        What ``train_loss`` is, with its unit: "mean squared error of the
        standardised target, no unit".
    n_train, n_validation, n_test
        Number of structures in each part.
    n_parameters
        Number of trainable parameters of one member, if known.
    """

    members: Annotated[tuple[MemberCurve, ...], Field(min_length=1)]
    loss_name: Text
    n_train: PositiveInt
    n_validation: NonNegativeInt
    n_test: NonNegativeInt
    n_parameters: PositiveInt | None = None


class Scores(_Model):
    """Errors of one predictor on the test part.

    Parameters
    ----------
    name
        "mean of the training labels", "linear regression on composition".
    mae, rmse
        Mean absolute and root-mean-square error, eV/atom.
    r2
        Coefficient of determination; None if the targets do not vary.
    """

    name: Text
    mae: NonNegativeFloat
    rmse: NonNegativeFloat
    r2: float | None


class PredictionInterval(_Model):
    """A calibrated interval around each test prediction.

    Parameters
    ----------
    level
        Stated coverage, between 0 and 1.
    half_widths
        ``(n_test,)`` half widths, eV/atom.
    method
        "split conformal on the validation part".
    """

    level: Annotated[float, Field(gt=0, lt=1)]
    half_widths: Series
    method: Text


class Evaluation(_Model):
    """The model on structures it has never seen.

    Parameters
    ----------
    targets, predictions
        ``(n_test,)`` eV/atom.
    uncertainties
        ``(n_test,)`` standard deviation stated by the model, eV/atom, or None.
    uncertainty_name
        "standard deviation over 4 ensemble members".
    mean_predictor
        Scores of always predicting the mean of the training labels.
    baselines
        Scores of other predictors on the same test part.
    interval
        A calibrated interval, if the screening uses one.
    formulas
        ``(n_test,)`` names shown on hover, or None.
    """

    targets: Series
    predictions: Series
    uncertainties: Series | None
    uncertainty_name: str = ""
    mean_predictor: Scores | NotAvailable
    baselines: tuple[Scores, ...] = ()
    interval: PredictionInterval | None = None
    formulas: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> Evaluation:
        expected = len(self.targets)
        interval = self.interval.half_widths if self.interval else None
        _require_lengths(
            "evaluation",
            expected,
            predictions=self.predictions,
            uncertainties=self.uncertainties,
            interval=interval,
        )
        if self.formulas is not None and len(self.formulas) != expected:
            raise InputError(
                f"evaluation: formulas must have {expected} values",
                evidence={"expected": expected, "formulas": len(self.formulas)},
            )
        negative = [u for u in self.uncertainties or () if u < 0]
        if negative:
            raise InputError(
                "evaluation: uncertainties are standard deviations, not negative",
                evidence={"negative": len(negative), "smallest": min(negative)},
            )
        return self


class CrystalPicture(_Model):
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

    lattice: Annotated[tuple[Vector, Vector, Vector], BeforeValidator(_plain)]
    frac_coords: Annotated[tuple[Vector, ...], BeforeValidator(_plain)]
    symbols: tuple[str, ...]


class RankedCandidate(_Model):
    """One row of the ranking.

    Parameters
    ----------
    rank
        From 1, lowest predicted formation energy first.
    candidate_id
        Content key of the structure.
    formula, prototype
        Reduced formula such as ``"Cu3Au"``; prototype name such as ``"L1_2"``.
    predicted, uncertainty
        Predicted formation energy and its standard deviation, eV/atom.
    lammps
        Formation energy after relaxation with LAMMPS, eV/atom; a reason where the
        relaxation was wanted and failed; None where it was not wanted.
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


class Ranking(_Model):
    """The best-ranked candidates.

    Parameters
    ----------
    candidates
        Rows in rank order; 20 to 50 read well.
    n_ranked
        Number of candidates ranked in all.
    tie_rule
        "equal predictions are ordered by content key".
    """

    candidates: Annotated[tuple[RankedCandidate, ...], Field(min_length=1)]
    n_ranked: PositiveInt
    tie_rule: str = ""

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


class Discovery(_Model):
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
        _require_lengths("discovery", n)
        if n <= self.k:
            raise InputError(
                f"discovery: {n} computed candidates, need more than k = {self.k}",
                advice="lower k, or use NotAvailable(reason=...)",
            )
        return self


class Average(_Model):
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


class ThermoSeries(_Model):
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


class RDFCurves(_Model):
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
        _require_lengths("rdf", len(self.r), total=self.total, **self.partials)
        return self


class MDPanel(_Model):
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

    @model_validator(mode="after")
    def _belongs_together(self) -> MDPanel:
        _require_lengths(
            f"MD run of {self.formula}, rank {self.rank}",
            len(self.time_ps),
            temperature_k=self.temperature_k.values,
            pressure_bar=self.pressure_bar.values,
            volume_a3=self.volume_a3.values,
            potential_energy_ev=self.potential_energy_ev.values,
        )
        return self


class MissingRun(_Model):
    """A run that was wanted and has no result: "not available: reason"."""

    rank: PositiveInt
    formula: Text
    prototype: str
    reason: Text


class Failure(_Model):
    """Objects of one stage that failed for one cause.

    Parameters
    ----------
    stage
        "label", "train", "screen", "relax", "md", "analyse".
    cause
        ``kind`` of the error: "out_of_time", "simulation".
    subject
        The object, as formula or content key.
    message, advice
        What happened and the next step, as in :class:`~nanoos_fw.errors.NanoOSError`.
    count
        Number of objects, if several are shown in one row.
    """

    stage: Text
    cause: Text
    subject: Text
    message: Text
    advice: str | None = None
    count: PositiveInt = 1


class PotentialSource(_Model):
    """The interatomic potential: name, where it is published, and its checksum."""

    name: Text
    citation: Text
    sha256: Text


class StageTiming(_Model):
    """What one stage cost.

    Parameters
    ----------
    stage
        Name of the stage.
    tasks
        Number of launches.
    wall_s
        Sum over launches of their wall time, s.
    core_hours
        Sum over launches of wall time times allocated cores, h, if known.
    elapsed_s
        From the first start to the last end, waiting included, s, if known.
    """

    stage: Text
    tasks: NonNegativeInt
    wall_s: NonNegativeFloat
    core_hours: NonNegativeFloat | None = None
    elapsed_s: NonNegativeFloat | None = None


class Provenance(_Model):
    """Where the numbers come from.

    Parameters
    ----------
    versions
        Package to version.
    hosts
        Names of the machines that computed.
    seeds
        Purpose to seed.
    keys
        What to content key or SHA-256, as hexadecimal text: "dataset", "model
        weights (SHA-256)", "campaign".
    model_name
        Name and version in the registry.
    potential
        The interatomic potential.
    timings
        One row per stage.
    settings
        Setting to value, dotted names for nested ones. No passwords; one inside a
        URI is masked.
    """

    versions: dict[str, str]
    hosts: tuple[str, ...]
    seeds: dict[str, int]
    keys: dict[str, str]
    model_name: str | NotAvailable
    potential: PotentialSource | NotAvailable
    timings: tuple[StageTiming, ...] | NotAvailable
    settings: dict[str, Setting]


class ReportData(_Model):
    """All that one campaign report shows.

    Parameters
    ----------
    campaign
        Name of the campaign.
    created
        When the data were collected, with a time zone.
    description
        The campaign in the user's own words; may be empty.
    """

    schema_version: Literal[1] = 1
    campaign: Text
    created: datetime
    description: str = ""
    funnel: Funnel | NotAvailable
    labels: Labels | NotAvailable
    training: Training | NotAvailable
    evaluation: Evaluation | NotAvailable
    ranking: Ranking | NotAvailable
    discovery: Discovery | NotAvailable
    md: tuple[MDPanel | MissingRun, ...] | NotAvailable
    failures: tuple[Failure, ...] | NotAvailable
    provenance: Provenance | NotAvailable


def regression_scores(name: str, targets: Series, predictions: Series) -> Scores:
    """Return MAE, RMSE and R² of predictions, eV/atom.

    Parameters
    ----------
    name
        Name of the predictor.
    targets, predictions
        ``(n,)`` eV/atom.

    Raises
    ------
    InputError
        If the lengths differ or there is no value.

    Notes
    -----
    R² = 1 - Σ(y - ŷ)² / Σ(y - ȳ)² with the mean of the targets given here, so that
    a mean predictor fitted elsewhere may fall below zero.
    """
    _require_lengths(name, len(targets), predictions=predictions)
    y = np.asarray(targets, dtype=np.float64)
    error = np.asarray(predictions, dtype=np.float64) - y
    spread = float(np.sum((y - y.mean()) ** 2))
    return Scores(
        name=name,
        mae=float(np.mean(np.abs(error))),
        rmse=float(np.sqrt(np.mean(error**2))),
        r2=1.0 - float(np.sum(error**2)) / spread if spread > 0 else None,
    )
