"""Rounds of active-learning campaigns, and the labels they have so far."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.ml.acquisition import Pick
from nanoos_fw.provenance import utc_now
from nanoos_fw.stores.database import store_errors
from nanoos_fw.stores.labels import formation_energies, simulated_values
from nanoos_fw.stores.simulations import Simulation, SimulationStore
from nanoos_fw.stores.structures import StructureStore

LABEL_KIND = "label"
_PER_ATOM = "_per_atom"
_PARTS = ("dataset", "model", "waiting")


@dataclass(frozen=True)
class Round:
    """A round: what was chosen and why, and what came of it.

    Parameters
    ----------
    number
        From 0, the first batch.
    picks
        The batch, in the order in which it was taken; empty where the campaign ended.
    chosen_by
        Model version whose predictions chose it; None for the first.
    stop
        ``rule`` and ``reason``, if the campaign ended instead.
    progress
        Numbers that the decision went by.
    dataset
        Of the labels up to this round: ``hash``, ``counts`` by part, ``labels``,
        ``failed`` (of this batch, with reasons), ``best``, ``errors``.
    model
        ``reference``, ``parent`` and ``metrics`` of the version trained on it.
    waiting
        Where the batch was written to, while labels are to come from files.
    """

    number: int
    picks: tuple[Pick, ...] = ()
    chosen_by: str | None = None
    stop: Mapping[str, str] | None = None
    progress: Mapping[str, Any] = field(default_factory=dict)
    dataset: Mapping[str, Any] | None = None
    model: Mapping[str, Any] | None = None
    waiting: Mapping[str, Any] | None = None
    created: str = ""

    @property
    def batch(self) -> list[str]:
        """Structure keys of the batch."""
        return [pick.id for pick in self.picks]


class ActiveStore:
    """The collection ``active_rounds``: one document for each decision, made once."""

    def __init__(self, database: Any) -> None:
        self._rounds = database["active_rounds"]

    def decide(self, campaign: str, decision: Round) -> Round:
        """Store the decision of a round, unless there is one; return what is there."""
        from pymongo.errors import DuplicateKeyError

        document = {
            "_id": _key(campaign, decision.number),
            "campaign": campaign,
            "number": decision.number,
            "picks": [
                [p.id, p.score, p.mean, p.std, p.out_of_domain] for p in decision.picks
            ],
            "chosen_by": decision.chosen_by,
            "stop": None if decision.stop is None else dict(decision.stop),
            "progress": dict(decision.progress),
            "created": utc_now(),
        }
        with (
            store_errors(f"decide round {decision.number} of {campaign}"),
            contextlib.suppress(DuplicateKeyError),
        ):
            self._rounds.insert_one(document)
        return self.get(campaign, decision.number)

    def find(self, campaign: str, number: int) -> Round | None:
        """Return a round, or None if it has not been decided."""
        with store_errors(f"read round {number} of {campaign}"):
            document = self._rounds.find_one({"_id": _key(campaign, number)})
        return None if document is None else _round(document)

    def get(self, campaign: str, number: int) -> Round:
        """Return a round.

        Raises
        ------
        InputError
            If it has not been decided.
        """
        found = self.find(campaign, number)
        if found is None:
            raise InputError(
                f"campaign {campaign!r} has no round {number}",
                advice=f"see 'nanoos active status {campaign}'",
            )
        return found

    def rounds(self, campaign: str) -> list[Round]:
        """Return all rounds that have been decided, the first first."""
        with store_errors(f"read the rounds of {campaign}"):
            documents = list(self._rounds.find({"campaign": campaign}))
        return [_round(d) for d in sorted(documents, key=lambda d: d["number"])]

    def record(self, campaign: str, number: int, part: str, values: Any) -> None:
        """Record what came of a round; recording it again changes nothing."""
        assert part in _PARTS, part
        with store_errors(f"record {part} of round {number} of {campaign}"):
            self._rounds.update_one(
                {"_id": _key(campaign, number)}, {"$set": {part: values}}
            )

    def reopen(self, campaign: str, number: int) -> None:
        """Take back that a campaign has ended, so that it is decided anew."""
        with store_errors(f"reopen campaign {campaign}"):
            self._rounds.delete_one(
                {"_id": _key(campaign, number), "stop": {"$ne": None}}
            )


# --------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class LabelSource:
    """Where the labels of a campaign are.

    Parameters
    ----------
    target, unit
        What they are; ``unit`` is empty if nobody has said it.
    method
        Key of the simulations that hold them.
    relaxations
        The simulations are relaxations by LAMMPS; otherwise each holds one ``value``.
    references
        Relaxed elements, for formation energies.
    imported
        Properties of the stored structures count, too.
    """

    target: str
    unit: str
    method: str
    relaxations: bool = False
    references: tuple[str, ...] = ()
    imported: bool = False


@dataclass(frozen=True)
class LabelValues:
    """Labels by structure key, why some have none, and which are still to come."""

    values: dict[str, float]
    failures: dict[str, str]
    pending: list[str]
    unit: str


def label_values(
    database: Any, source: LabelSource, keys: Sequence[str]
) -> LabelValues:
    """Return the labels that there are of some structures.

    Raises
    ------
    InputError
        If a label has another unit than the target, or a reference is missing.
    """
    structures, simulations = StructureStore(database), SimulationStore(database)
    if source.relaxations:
        return _relaxed(structures, simulations, source, keys)
    values: dict[str, float] = {}
    failures: dict[str, str] = {}
    units: dict[str, str] = {}
    if source.imported:
        values, units = _properties(structures, source, keys)
    for key, simulation in simulations.results(keys, source.method, ["value", "unit"]):
        if simulation.status == "failed":
            if key not in values:
                failures[key] = _message(simulation.error)
            continue
        value: Any = simulation.result.get("value")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            failures[key] = f"the stored label is no finite number: {value!r}"
            continue
        values[key] = float(value)
        units[key] = str(simulation.result.get("unit") or "")
    for key, unit in units.items():
        if unit and source.unit and unit != source.unit:
            raise InputError(
                f"the label of {key} is in {unit}, not in {source.unit}",
                advice="label in the unit of the target, or set dataset.unit",
            )
    named = source.unit or next((unit for unit in units.values() if unit), "")
    pending = [key for key in keys if key not in values and key not in failures]
    return LabelValues(values, failures, pending, named)


def put_labels(
    database: Any,
    source: LabelSource,
    values: Mapping[str, float],
    failures: Mapping[str, Mapping[str, Any]],
    *,
    about: Mapping[str, Any],
) -> None:
    """Store labels, and why some could not be made; what is there stays.

    Parameters
    ----------
    values
        In the unit of the target, by structure key.
    failures
        ``NanoOSError.to_dict()`` by structure key.
    about
        Where they were made.
    """
    done: Iterable[Simulation] = (
        Simulation(
            structure=key,
            method=source.method,
            kind=LABEL_KIND,
            status="done",
            result={"value": float(value), "unit": source.unit, "name": source.target},
            environment=dict(about),
        )
        for key, value in values.items()
    )
    failed = (
        Simulation(
            structure=key,
            method=source.method,
            kind=LABEL_KIND,
            status="failed",
            error=dict(error),
            environment=dict(about),
        )
        for key, error in failures.items()
    )
    SimulationStore(database).put_many([*done, *failed])


# ------------------------------------------------------------------------- private


def _key(campaign: str, number: int) -> str:
    return f"{campaign}/{number:05d}"


def _round(document: Mapping[str, Any]) -> Round:
    return Round(
        number=int(document["number"]),
        picks=tuple(Pick(*values) for values in document["picks"]),
        chosen_by=document["chosen_by"],
        stop=document["stop"],
        progress=document["progress"],
        created=document["created"],
        **{part: document.get(part) for part in _PARTS},
    )


def _relaxed(
    structures: StructureStore,
    simulations: SimulationStore,
    source: LabelSource,
    keys: Sequence[str],
) -> LabelValues:
    if source.references:
        found = formation_energies(
            structures,
            simulations,
            keys=keys,
            references=source.references,
            method=source.method,
        )
        values, unit = found.energies, "eV/atom"
        failures, pending = found.failures, found.pending
    else:
        named = simulated_values(
            structures, simulations, keys=keys, method=source.method, name=source.target
        )
        values, unit = named.values, named.unit
        failures, pending = named.failures, named.pending
    if source.unit and unit and unit != source.unit:
        raise InputError(
            f"LAMMPS gives {source.target} in {unit}, not in {source.unit}",
            advice="leave dataset.unit out",
        )
    reasons = {key: _message(error) for key, error in failures.items()}
    return LabelValues(values, reasons, pending, unit)


def _properties(
    structures: StructureStore, source: LabelSource, keys: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return what came with the structures, or in a table, and its units."""
    whole = source.target.removesuffix(_PER_ATOM)
    values: dict[str, float] = {}
    units: dict[str, str] = {}
    for key, entry in structures.labels(keys).items():
        name, divisor, suffix = source.target, 1, ""
        if name not in entry.properties and whole != name:
            name, divisor, suffix = whole, entry.n_sites, "/atom"
        if name in entry.properties:
            values[key] = float(entry.properties[name]) / divisor
            unit = entry.units.get(name)
            units[key] = f"{unit}{suffix}" if unit else ""
    return values, units


def _message(error: Mapping[str, Any] | None) -> str:
    return str((error or {}).get("message") or "no reason was stored")
