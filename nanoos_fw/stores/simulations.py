"""Simulation results: one document per (structure, method), written once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nanoos_fw.provenance import content_key, utc_now
from nanoos_fw.stores.database import store_errors, upsert_many

Status = Literal["done", "failed"]

_KEYS_PER_QUERY = 5000


@dataclass(frozen=True)
class Simulation:
    """A finished simulation.

    Parameters
    ----------
    structure
        Key of the structure it started from.
    method
        Key of the method: potential, settings, code version (``method_key``).
    kind
        ``relaxation`` or ``md``.
    status
        ``failed`` is a result too: it is not tried again without a reason.
    result
        Named values in the units of ``nanoos_fw.units``; small arrays as lists.
    error
        ``NanoOSError.to_dict()`` of a failed one.
    files
        Name -> absolute path of the files it left.
    """

    structure: str
    method: str
    kind: str
    status: Status
    result: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Content key: the same structure by the same method is the same result."""
        return simulation_key(self.structure, self.method)


def simulation_key(structure: str, method: str) -> str:
    """Return the key of the simulation of a structure by a method."""
    return content_key("simulation", {"structure": structure, "method": method})


def method_key(kind: str, description: Mapping[str, Any]) -> str:
    """Return the key of a method from all that decides its numbers."""
    return content_key(f"method/{kind}", dict(description))


class SimulationStore:
    """The collection ``simulations``."""

    def __init__(self, database: Any) -> None:
        self._simulations = database["simulations"]

    def put_many(self, simulations: Iterable[Simulation]) -> None:
        """Store results; one that is there already stays as it is."""
        upserts = [
            (
                {"_id": simulation.key},
                {
                    "$setOnInsert": {
                        "structure": simulation.structure,
                        "method": simulation.method,
                        "kind": simulation.kind,
                        "status": simulation.status,
                        "result": simulation.result,
                        "error": simulation.error,
                        "files": simulation.files,
                        "environment": simulation.environment,
                        "created": utc_now(),
                    }
                },
            )
            for simulation in simulations
        ]
        with store_errors("store simulations"):
            upsert_many(self._simulations, upserts)

    def find(self, structures: Sequence[str], method: str) -> dict[str, Simulation]:
        """Return the results of one method by structure key."""
        query = {"structure": {"$in": list(structures)}, "method": method}
        with store_errors("read simulations"):
            documents = list(self._simulations.find(query))
        found = {d["structure"]: _simulation(d) for d in documents}
        return {key: found[key] for key in structures if key in found}

    def results(
        self, structures: Sequence[str], method: str, names: Sequence[str]
    ) -> Iterator[tuple[str, Simulation]]:
        """Yield structure key and simulation with some parts of its result alone.

        A relaxation holds coordinates, and a trajectory thousands of numbers, which
        are not read here.

        Parameters
        ----------
        names
            Names in ``result``, with dots for what is inside of them.
        """
        fields = dict.fromkeys(("structure", "method", "kind", "status", "error"), 1)
        fields |= {f"result.{name}": 1 for name in names}
        for start in range(0, len(structures), _KEYS_PER_QUERY):
            part = list(structures[start : start + _KEYS_PER_QUERY])
            query = {"structure": {"$in": part}, "method": method}
            with store_errors("read simulations"):
                for document in self._simulations.find(query, fields):
                    whole = {"result": {}, "files": {}, "environment": {}, **document}
                    yield document["structure"], _simulation(whole)

    def methods(self, limit: int = 20) -> list[str]:
        """Return the keys of methods that there are results of, sorted."""
        with store_errors("list methods"):
            return sorted(self._simulations.distinct("method"))[:limit]

    def newest(self, kind: str, limit: int) -> list[Simulation]:
        """Return the last stored simulations of a kind, without thermo and analyses."""
        left_out = {"result.thermo": 0, "result.analyses": 0}
        with store_errors("read simulations"):
            documents = list(
                self._simulations.find({"kind": kind}, left_out)
                .sort("created", -1)
                .limit(limit)
            )
        return [_simulation(document) for document in documents]

    def each(self, kind: str) -> Iterator[Simulation]:
        """Yield all simulations of a kind in the order of their keys, one at a time."""
        with store_errors("read simulations"):
            for document in self._simulations.find({"kind": kind}).sort("_id", 1):
                yield _simulation(document)

    def by_key(self, key: str) -> Simulation | None:
        """Return the simulation of a content key, or None."""
        with store_errors("read a simulation"):
            document = self._simulations.find_one({"_id": key})
        return None if document is None else _simulation(document)

    def analysed(self, simulation: Simulation, key: str, result: Any) -> None:
        """Add an analysis to a stored simulation, under the key of what was asked."""
        with store_errors("store an analysis"):
            self._simulations.update_one(
                {"_id": simulation.key}, {"$set": {f"result.analyses.{key}": result}}
            )


def _simulation(document: Mapping[str, Any]) -> Simulation:
    return Simulation(
        structure=document["structure"],
        method=document["method"],
        kind=document["kind"],
        status=document["status"],
        result=dict(document["result"]),
        error=document["error"],
        files=dict(document["files"]),
        environment=dict(document["environment"]),
    )
