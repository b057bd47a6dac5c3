"""What a campaign report shows, as frozen models without a database behind them.

The collector fills one :class:`ReportData`; a part it cannot fill is a
:class:`NotAvailable` with the reason, never a guessed number. Predictions are in the
unit of their :class:`Quantity`, other energies are formation energies in eV/atom,
lengths in Å.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from nanoos_fw.errors import InputError
from nanoos_fw.reports.active import ActiveLearning
from nanoos_fw.reports.base import (
    NotAvailable,
    Quantity,
    ReportModel,
    Text,
)
from nanoos_fw.reports.candidate_data import (
    Average,
    CrystalPicture,
    DiffusionResult,
    Discovery,
    MDPanel,
    MissingRun,
    MSDCurves,
    NamedAverage,
    RankedCandidate,
    Ranking,
    RDFCurves,
    ThermoSeries,
    VDOSCurves,
)
from nanoos_fw.reports.learning_data import (
    AliasMove,
    CalibrationCurve,
    Evaluation,
    Labels,
    MemberCurve,
    PredictionInterval,
    Scores,
    Training,
    regression_scores,
)
from nanoos_fw.reports.screen_data import ScreenPart

__all__ = [
    "AliasMove",
    "Average",
    "CalibrationCurve",
    "CrystalPicture",
    "DiffusionResult",
    "Discovery",
    "Evaluation",
    "Failure",
    "Funnel",
    "Labels",
    "MDPanel",
    "MSDCurves",
    "MemberCurve",
    "MissingRun",
    "NamedAverage",
    "NotAvailable",
    "PotentialSource",
    "PredictionInterval",
    "Provenance",
    "Quantity",
    "RDFCurves",
    "RankedCandidate",
    "Ranking",
    "ReportData",
    "Scores",
    "StageCount",
    "StageTiming",
    "ThermoSeries",
    "Training",
    "VDOSCurves",
    "regression_scores",
]

Setting = str | int | float | bool | None


class StageCount(ReportModel):
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


class Funnel(ReportModel):
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


class Failure(ReportModel):
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


class PotentialSource(ReportModel):
    """The interatomic potential: name, where it is published, and its checksum."""

    name: Text
    citation: Text
    sha256: Text


class StageTiming(ReportModel):
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


class Provenance(ReportModel):
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


class ReportData(ReportModel):
    """All that one campaign report shows.

    Parameters
    ----------
    campaign
        Name of the campaign.
    created
        When the data were collected, with a time zone.
    description
        The campaign in the user's own words; may be empty.
    active
        The rounds of a campaign that learns actively.
    screens
        Screenings that belong to the campaign; shown if there are any.
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
    active: ActiveLearning | None = None
    screens: tuple[ScreenPart, ...] = ()
