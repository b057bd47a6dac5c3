"""What an active-learning campaign is told: one model for YAML, Python and CLI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nanoos_fw.firetasks.base import Parameters
from nanoos_fw.firetasks.featurization import FeatureParameters
from nanoos_fw.firetasks.relaxation import RelaxationMethod
from nanoos_fw.ml.acquisition import Objective, Selection
from nanoos_fw.ml.datasets import DatasetConfig
from nanoos_fw.ml.stopping import StopRules
from nanoos_fw.ml.training import TrainingConfig
from nanoos_fw.stores.labels import FORMATION_ENERGY
from nanoos_fw.stores.simulations import method_key


class AlloyCandidates(Parameters):
    """Ordered binary alloys of some metals, as the demonstration screens them."""

    alloys: tuple[str, ...] = Field(min_length=2)


class StoredCandidates(Parameters):
    """Sets of the structure store.

    Parameters
    ----------
    set
        Of the candidates.
    references
        Of the elements in their ground states, for formation energies.
    """

    set: str = Field(min_length=1)
    references: str | None = None


class LammpsLabels(Parameters):
    """Labels are computed by LAMMPS: a relaxation, or single points."""

    kind: Literal["lammps"] = "lammps"
    method: RelaxationMethod


class TaskLabels(Parameters):
    """Labels are computed by a firetask of the user's.

    Parameters
    ----------
    task
        Dotted name of its class, such as ``mypackage.dft.RelaxWithVasp``; see
        :class:`nanoos_fw.firetasks.labelling.LabelTask` for what it must do.
    options
        Passed on to it as they are; they decide the labels, so they are part of their
        key.
    category
        Of the fireworks, ``_category``.
    """

    kind: Literal["task"]
    task: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
    options: dict[str, Any] = Field(default_factory=dict)
    category: str = "md"


class FileLabels(Parameters):
    """Labels come from files: each batch is written out, and the campaign waits.

    Parameters
    ----------
    format
        Of the files that are written, one for each candidate.
    """

    kind: Literal["files"]
    format: Literal["extxyz", "poscar", "cif"] = "extxyz"


Labelling = Annotated[
    LammpsLabels | TaskLabels | FileLabels, Field(discriminator="kind")
]


class Initial(Parameters):
    """The first batch, chosen before there is a model.

    Parameters
    ----------
    method
        ``random``, or ``k-centre``: the most ordinary candidate first, then always the
        one farthest from those taken, in composition and surroundings.
    """

    size: int = Field(default=40, ge=1)
    method: Literal["random", "k-centre"] = "k-centre"


class Retraining(Parameters):
    """How the model of a round follows from that of the round before.

    Parameters
    ----------
    warm_start
        Begin with the weights of the parent version, the version of the round
        before. Without it each round trains anew.
    epochs, learning_rate
        Of warm starts; None takes those of ``training``.
    """

    warm_start: bool = True
    epochs: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)


class ActivePlan(Parameters):
    """All that decides the numbers of an active-learning campaign.

    Parameters
    ----------
    name
        Key of the campaign, and of its sets in the structure store.
    candidates
        Where they come from.
    labels
        How a label is made.
    objective
        Whether low or high values of ``training.target`` are wanted.
    initial, selection
        The first batch, and the others.
    stop
        When it ends.
    min_label_share
        Share of a batch that must have labels; with fewer the round fails and waits
        for someone to look at it.
    retraining, training, dataset, features
        Of the models. The split ``stable`` leaves every structure in its part for
        good, so that a warm start has not seen the validation part.
    top_k
        Candidates in the final ranking.
    seed
        Of the choices; the other seeds are in ``dataset`` and ``training``.
    work_root, report
        Folder of all work directories, on a file system that all nodes share; file of
        the HTML report, None writes it into the folder.
    report_every_round
        Write the report after each round, not only at the end.
    """

    name: str = Field(
        min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    description: str = ""
    candidates: AlloyCandidates | StoredCandidates
    labels: Labelling
    objective: Objective = "min"
    initial: Initial = Initial()
    selection: Selection = Selection()
    stop: StopRules
    min_label_share: float = Field(default=0.5, ge=0, le=1)
    retraining: Retraining = Retraining()
    training: TrainingConfig
    dataset: DatasetConfig
    features: FeatureParameters = FeatureParameters()
    top_k: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)
    labels_per_firework: int = Field(default=50, ge=1)
    structures_per_firework: int = Field(default=500, ge=1)
    work_root: str | None = None
    report: str | None = None
    report_every_round: bool = True

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, values: Any) -> Any:
        # It is said once, in ``training``.
        if isinstance(values, dict) and isinstance(values.get("training"), dict):
            target = values["training"].get("target")
            dataset = values.get("dataset") or {}
            if isinstance(dataset, dict) and target is not None:
                parts = {"train_fraction": 0.8, "val_fraction": 0.2, "split": "stable",
                         "test_fraction": 0.0, "target_property": target}  # fmt: skip
                if any(name.endswith("_fraction") for name in dataset):
                    parts = {"split": "stable", "target_property": target}
                values = {**values, "dataset": {**parts, **dataset}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> ActivePlan:
        target = self.training.target
        if self.dataset.target_property != target:
            raise ValueError(
                f"dataset is of {self.dataset.target_property}, training of {target}"
            )
        if self.dataset.mock_targets:
            raise ValueError("mock_targets are no labels to learn from actively")
        if self.initial.size < self.dataset.min_samples:
            raise ValueError(
                f"initial.size {self.initial.size} is below dataset.min_samples "
                f"{self.dataset.min_samples}"
            )
        needs_spread = self.selection.acquisition not in ("mean", "random")
        if needs_spread and self.training.ensemble_size < 2 and not (
            self.training.dropout
        ):  # fmt: skip
            raise ValueError(
                f"{self.selection.acquisition!r} needs an uncertainty: ensemble_size "
                "of two or more, or dropout"
            )
        formation = target == FORMATION_ENERGY and self.labels.kind == "lammps"
        if (
            formation
            and isinstance(self.candidates, StoredCandidates)
            and self.candidates.references is None
        ):
            raise ValueError(
                f"{FORMATION_ENERGY} needs candidates.references: the set of the "
                "elements in their ground states"
            )
        return self

    @property
    def candidate_set(self) -> str:
        """Set of the candidates in the structure store."""
        return f"{self.name}/candidates"

    @property
    def reference_set(self) -> str:
        """Set of the elemental reference structures."""
        return f"{self.name}/references"

    @property
    def labelled_set(self) -> str:
        """Set of the candidates that were given out to be labelled."""
        return f"{self.name}/labelled"

    @property
    def target(self) -> str:
        """What is learnt."""
        return self.training.target

    @property
    def unit(self) -> str:
        """Unit of the target; empty if nobody has said it."""
        return self.dataset.target_unit

    @property
    def model_name(self) -> str:
        """Name in the model registry; each round is a version."""
        return f"{self.name}-{self.target}"

    @property
    def needs_references(self) -> bool:
        """Whether labels are energies against those of the elements."""
        return self.labels.kind == "lammps" and self.target == FORMATION_ENERGY

    def training_of(self, round_number: int) -> TrainingConfig:
        """Return the settings of the training of a round, without its parent."""
        if round_number == 0 or not self.retraining.warm_start:
            return self.training
        changes = {
            "epochs": self.retraining.epochs,
            "learning_rate": self.retraining.learning_rate,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        return self.training.model_copy(update=given)

    def label_key(self) -> str:
        """Return the key under which labels that are not LAMMPS' are stored."""
        if isinstance(self.labels, TaskLabels):
            about = {"task": self.labels.task, "options": self.labels.options}
            return method_key("label", {**about, "target": self.target})
        return method_key("label", {"imported": self.name, "target": self.target})
