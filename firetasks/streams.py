"""Campaigns whose candidates are made where they are predicted, by the millions.

Only the structures to be labelled, and the best of the ranking, are in the store; the
others are numbers of a sequence, see :mod:`nanoos_fw.ml.candidates`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nanoos_fw.crystals import structure_key
from nanoos_fw.errors import InputError
from nanoos_fw.firetasks.base import NanoTask, Parameters, TaskContext
from nanoos_fw.firetasks.fans import bounds
from nanoos_fw.firetasks.featurization import FeatureParameters
from nanoos_fw.firetasks.screening import WindowParameters, run_window_in
from nanoos_fw.ml.candidate_filters import CandidateFilter
from nanoos_fw.ml.candidates import CandidateSource, CandidateSpec, open_candidates
from nanoos_fw.ml.ranking import Ranked, Ranking, rank_top
from nanoos_fw.ml.screening_engine import DEFAULT_CHUNK, ScreenSpec
from nanoos_fw.stores.models import Prediction
from nanoos_fw.stores.screens import (
    Screen,
    ScreenStore,
    register_screen,
    stream_name,
)
from nanoos_fw.stores.structures import NewStructure

_MAX_LISTED = 50


class StreamPlan(Parameters):
    """Candidates of a campaign that are not stored.

    Parameters
    ----------
    candidates
        The sequence.
    filters
        Candidates that fail are counted by reason and not predicted.
    new_compositions
        Select none that has the composition of a labelled structure.
    chunk
        Candidates that are predicted and stored together.
    candidates_per_firework
        About so many in a firework; more, if these would be too many fireworks.
    """

    candidates: CandidateSpec
    filters: CandidateFilter = CandidateFilter()
    new_compositions: bool = False
    chunk: int = Field(default=DEFAULT_CHUNK, ge=1, le=65536)
    candidates_per_firework: int = Field(default=1_000_000, ge=1)

    def elements(self) -> set[str]:
        """Return the symbols that predicted candidates may hold."""
        return self.filters.kept_elements(open_candidates(self.candidates).elements())

    def windows(self) -> list[tuple[int, int]]:
        """Return the windows of the fireworks: whole chunks, all of the sequence."""
        count = len(open_candidates(self.candidates))
        per_firework = max(1, self.candidates_per_firework // self.chunk)
        return [
            (start * self.chunk, min(stop * self.chunk, count))
            for start, stop in bounds(-(-count // self.chunk), per_firework)
        ]


class ScreenStreamParameters(WindowParameters):
    """Parameters of ScreenStreamTask."""

    campaign: str


class ScreenStreamTask(NanoTask):
    """Generate, filter and predict a window of a campaign's sequence."""

    _fw_name = "{{nanoos_fw.firetasks.ScreenStreamTask}}"
    parameters_model = ScreenStreamParameters
    parameters: ScreenStreamParameters
    keeps_workers = True

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Screen the chunks that are not stored yet with the campaign's model."""
        screen, _ = _opened(place, self.parameters.campaign)
        return run_window_in(place, screen, self.parameters)


class RankStreamParameters(Parameters):
    """Parameters of RankStreamTask."""

    campaign: str
    top_k: int = Field(ge=1)


class RankStreamTask(NanoTask):
    """Rank a campaign's sequence, lowest prediction first, and store the best."""

    _fw_name = "{{nanoos_fw.firetasks.RankStreamTask}}"
    parameters_model = RankStreamParameters
    parameters: RankStreamParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Select the best that have no label, store and record them.

        Equal predictions are ordered by the candidate's number; of candidates that
        are one crystal the first counts.
        """
        parameters = self.parameters
        campaign, top_k = parameters.campaign, parameters.top_k
        screen, plan = _opened(place, campaign)
        store = ScreenStore(place.database)
        progress = store.progress(screen)
        if not progress.done:
            raise InputError(
                f"{progress.candidates} of {screen.count} candidates of campaign "
                f"{campaign!r} have been screened",
                advice="rerun the fireworks that screen them",
            )
        labelled = set(place.structures.keys(f"{campaign}/labelled"))
        ranking = Ranking(new_compositions=plan.new_compositions)
        source = open_candidates(screen.spec["candidates"])
        best: dict[str, int] = {}
        k = top_k + len(labelled)
        while True:
            ranked = rank_top(store.chunks(screen.key), k, ranking)
            best = _distinct(source, ranked, labelled, top_k)
            if len(best) == top_k or k >= ranked.n_ranked:
                break
            k *= 4  # many are one crystal
        if len(best) < top_k:
            raise InputError(
                f"{len(best)} candidates are ranked, fewer than top_k = {top_k}",
                evidence={
                    "candidates": screen.count,
                    "predicted": progress.predicted,
                    "in_domain": ranked.n_ranked,
                },
                advice="see why with 'nanoos screen export --refused', or lower top_k",
            )
        self._put(place, store, screen, source, best)
        keys = list(best)
        place.campaigns.record(campaign, ranking=keys, n_ranked=ranked.n_ranked)
        return {"ranked": ranked.n_ranked, "best": keys[:_MAX_LISTED]}

    def _put(
        self,
        place: TaskContext,
        store: ScreenStore,
        screen: Screen,
        source: CandidateSource,
        best: dict[str, int],
    ) -> None:
        """Store the selected structures and what the model says of them."""
        entries = [
            NewStructure(
                structure=source.structure(index),
                label=source.label(index) or f"{screen.name} {index}",
                source=f"candidate {index} of screening {screen.name}",
            )
            for index in best.values()
        ]
        place.structures.add(entries, in_set=f"{self.parameters.campaign}/selected")
        rows = [_prediction(store, screen, key, index) for key, index in best.items()]
        place.models.put_predictions(screen.models[0]["reference"], rows)


# ------------------------------------------------------------------------- private


def _opened(place: TaskContext, campaign: str) -> tuple[Screen, StreamPlan]:
    """Return the screening of a campaign, registered with its model, and its plan."""
    plan = place.campaigns.get(campaign)["plan"]
    if plan.get("stream") is None:
        raise InputError(f"the plan of campaign {campaign!r} has no stream")
    stream = StreamPlan.model_validate(plan["stream"])
    features = FeatureParameters.model_validate(plan["features"])
    spec = ScreenSpec(
        candidates=stream.candidates,
        models=(place.campaigns.output(campaign, "model"),),
        filters=stream.filters,
        known_set=f"{campaign}/labelled",
        chunk=stream.chunk,
        cutoff_radius=features.cutoff_radius,
        max_neighbors=features.max_neighbors,
    )
    name = stream_name(campaign)
    return register_screen(place.database, name, spec, campaign=campaign), stream


def _distinct(
    source: CandidateSource, ranked: Ranked, labelled: set[str], top_k: int
) -> dict[str, int]:
    """Return keys and numbers of the first different crystals without a label."""
    best: dict[str, int] = {}
    for index in ranked.indices.tolist():
        key = structure_key(source.structure(index))
        if key not in labelled:
            best.setdefault(key, index)
        if len(best) == top_k:
            break
    return best


def _prediction(store: ScreenStore, screen: Screen, key: str, index: int) -> Prediction:
    chunk = store.chunk_of(screen, index)
    at = int(chunk.indices.searchsorted(index))
    own = chunk.models[0]
    std, half_width, distance = (
        None if values is None else float(values[at])
        for values in (own.std, own.half_width, own.distance)
    )
    return Prediction(
        structure=key,
        prediction=float(own.mean[at]),
        uncertainty=std,
        out_of_domain=bool(own.out_of_domain[at]),
        half_width=half_width,
        coverage=None if half_width is None else float(screen.spec["coverage"]),
        distance=distance,
    )
