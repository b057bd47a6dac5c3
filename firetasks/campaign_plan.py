"""What a screening campaign is told: one model for YAML, Python and CLI."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from nanoos_fw.errors import InputError
from nanoos_fw.firetasks.base import Parameters
from nanoos_fw.firetasks.featurization import FeatureParameters
from nanoos_fw.firetasks.md import MDMethod
from nanoos_fw.firetasks.relaxation import RelaxationMethod
from nanoos_fw.firetasks.streams import StreamPlan
from nanoos_fw.md.inputs import timestep_warnings
from nanoos_fw.ml.datasets import DatasetConfig
from nanoos_fw.ml.training import TrainingConfig
from nanoos_fw.stores.structures import StoredStructure

logger = logging.getLogger(__name__)


class CampaignPlan(Parameters):
    """All that decides the numbers of a screening campaign.

    Parameters
    ----------
    name
        Key of the campaign, and of its sets in the structure store.
    work_root
        Folder of all work directories, on a file system that all nodes share.
    report
        File of the HTML report.
    relaxation
        How labels are computed: potential and minimisation.
    label_fraction
        Part of the candidates that is labelled for training, chosen at random.
    seed
        Of that choice; the other seeds are in ``dataset`` and ``training``.
    chunk
        Structures per firework, (relaxation, featurization and screening).
    top_k
        Best-ranked candidates that are relaxed.
    md_runs
        Best-ranked candidates that go through molecular dynamics.
    stream
        A sequence that is screened instead of the stored candidates, which are then
        there to be labelled, all of them if ``label_fraction`` is 1. Only the best of
        the sequence are stored.
    """

    name: str = Field(
        min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    description: str = ""
    work_root: str
    report: str
    relaxation: RelaxationMethod
    features: FeatureParameters = FeatureParameters()
    dataset: DatasetConfig
    training: TrainingConfig
    md: MDMethod
    label_fraction: float = Field(default=0.25, gt=0, le=1)
    seed: int = Field(default=0, ge=0)
    relaxations_per_firework: int = Field(default=50, ge=1)
    structures_per_firework: int = Field(default=500, ge=1)
    top_k: int = Field(default=10, ge=1)
    md_runs: int = Field(default=3, ge=0)
    stream: StreamPlan | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Campaigns are known by these values, also those from before streams.
        values: dict[str, Any] = handler(self)
        if self.stream is None:
            values.pop("stream", None)
        return values

    @property
    def candidates(self) -> str:
        """Set of the candidates in the structure store."""
        return f"{self.name}/candidates"

    @property
    def references(self) -> str:
        """Set of the elemental reference structures."""
        return f"{self.name}/references"

    @property
    def labelled(self) -> str:
        """Set of the candidates that are labelled for training."""
        return f"{self.name}/labelled"

    @property
    def model_name(self) -> str:
        """Name in the model registry."""
        return f"{self.name}-{self.training.target}"

    def check(self, structures: Iterable[StoredStructure] = ()) -> None:
        """Refuse what LAMMPS would refuse later, before anything is queued.

        Parameters
        ----------
        structures
            That will be relaxed; see :meth:`PotentialChoice.check`.

        Raises
        ------
        InputError
            If the potential cannot be used, or the molecular dynamics would fail in
            every run.
        MissingDependencyError
            If the installed LAMMPS lacks a style.
        """
        potential = self.relaxation.potential.check(structures)
        if not self.md_runs:
            return
        if self.md_runs > self.top_k:
            raise InputError(
                f"campaign {self.name!r} would simulate {self.md_runs} candidates, of "
                f"which {self.top_k} are ranked and relaxed",
                advice="lower md_runs, or raise top_k",
            )
        self.md.check()
        for warning in timestep_warnings(self.md.config, potential, potential.elements):
            logger.warning("campaign %s: %s", self.name, warning)


def choose_labelled(candidates: Sequence[str], fraction: float, seed: int) -> list[str]:
    """Return the candidates to label: a random part, the same for the same keys."""
    keys = sorted(candidates)
    count = max(1, round(fraction * len(keys)))
    chosen = np.random.default_rng(seed).choice(len(keys), size=count, replace=False)
    return sorted(keys[index] for index in chosen)
