"""Predictions and simulations as files, with units and provenance, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanoos_fw import __version__
from nanoos_fw.crystals import decode_arrays
from nanoos_fw.errors import InputError
from nanoos_fw.operations.row_files import Kind, Row, read_rows, write_rows
from nanoos_fw.provenance import utc_now
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.stores.predictions import Prediction
from nanoos_fw.stores.simulations import Simulation, SimulationStore
from nanoos_fw.stores.structures import StructureStore
from nanoos_fw.units import UNITS

_AT_ONCE = 500
_PREDICTION: dict[str, Kind] = {
    "structure": "text", "formula": "text", "prediction": "double",
    "uncertainty": "double", "half_width": "double", "coverage": "double",
    "distance": "double", "out_of_domain": "bool",
}  # fmt: skip
_SIMULATION: dict[str, Kind] = {
    "key": "text", "structure": "text", "formula": "text", "method": "text",
    "kind": "text", "status": "text",
}  # fmt: skip
_REST = "rest"


@dataclass(frozen=True)
class ImportedResults:
    """What a file of results held.

    Parameters
    ----------
    kind
        ``predictions`` or ``simulations``.
    rows
        In the file.
    added
        Of them, those that were not in the store.
    """

    kind: str
    rows: int
    added: int


def export_predictions(
    database: Any, model: str, path: Path, in_set: str | None = None
) -> int:
    """Write the stored predictions of a model, in the order of their structures' keys.

    Parameters
    ----------
    database
        Of the stores.
    model
        Reference in the registry.
    path
        ``.csv``, ``.jsonl``, ``.parquet`` or ``.extxyz``, which holds the structures.
    in_set
        Set of structures; all without.

    Returns
    -------
    int
        The number of rows.
    """
    registry, structures = ModelRegistry(database), StructureStore(database)
    record = registry.get(model)
    units = dict.fromkeys(("prediction", "uncertainty", "half_width"), record.unit)
    head = {
        **_head("predictions", units),
        "model": {
            "reference": record.reference,
            "target": record.target,
            "unit": record.unit,
            "sha256": record.sha256,
        },
        "set": in_set,
    }

    def rows() -> Iterator[Row]:
        for keys in _parts(structures.keys(in_set)):
            found = registry.predictions(record.reference, keys)
            formulas = structures.formulas([row.structure for row in found])
            for row in found:
                values = {**asdict(row), "formula": formulas.get(row.structure)}
                yield {name: values[name] for name in _PREDICTION}

    return write_rows(path, head, _PREDICTION, rows(), _crystals(structures))


def export_simulations(database: Any, kind: str, path: Path) -> int:
    """Write the stored simulations of a kind, in the order of their keys.

    Numbers of a result have columns of their own, in the units of
    :mod:`nanoos_fw.units`; all that is no number (curves, analyses, the error of a
    failed one, files, environment) is in the column ``rest``. ``.extxyz`` holds the
    structures that the simulations began with.
    """
    store, structures = SimulationStore(database), StructureStore(database)
    names: set[str] = set()
    for simulation in store.each(kind):
        names |= {name for name, v in simulation.result.items() if _is_number(v)}
    names -= {*_SIMULATION, _REST}  # such a number stays in the rest
    columns: dict[str, Kind] = dict.fromkeys(sorted(names), "double")
    units = {name: UNITS[name] for name in sorted(names) if name in UNITS}
    head = {**_head("simulations", units), "simulations": kind}

    def rows() -> Iterator[Row]:
        for simulation in store.each(kind):
            values = asdict(simulation)
            result = values.pop("result")
            numbers = {n: result.pop(n) for n in names if _is_number(result.get(n))}
            formulas = structures.formulas([simulation.structure])
            row: Row = {
                "key": simulation.key,
                "formula": formulas.get(simulation.structure),
                **{name: values.pop(name) for name in ("structure", "method")},
                **{name: values.pop(name) for name in ("kind", "status")},
            }
            row = {name: row[name] for name in _SIMULATION}
            row |= {name: numbers.get(name) for name in columns}
            yield {**row, _REST: {**values, "result": result}}

    every: dict[str, Kind] = {**_SIMULATION, **columns, _REST: "json"}
    return write_rows(path, head, every, rows(), _crystals(structures))


def import_results(database: Any, path: Path) -> ImportedResults:
    """Put an exported file of predictions or simulations into the stores.

    What is there already stays as it is, so that importing twice changes nothing.
    Structures and models are not in the file: bring them in first.

    Raises
    ------
    InputError
        If the file is of another kind, or of a model that is not registered here with
        the same weights.
    """
    head, rows = read_rows(path)
    kind = head.get("results")
    if kind == "predictions":
        registry = ModelRegistry(database)
        model = head["model"]
        record = registry.get(model["reference"])
        if record.sha256 != model["sha256"]:
            raise InputError(
                f"{record.reference} has other weights here than where {path.name} is "
                "from",
                evidence={"here": record.sha256, "there": model["sha256"]},
            )
        before = registry.n_predictions(record.reference)
        count = 0
        for part in _batches(rows):
            count += len(part)
            registry.put_predictions(
                record.reference,
                [
                    Prediction(**{k: v for k, v in row.items() if k != "formula"})
                    for row in part
                ],
            )
        added = registry.n_predictions(record.reference) - before
        return ImportedResults(kind, count, added)
    if kind == "simulations":
        store = SimulationStore(database)
        count = added = 0
        for part in _batches(rows):
            found = [_simulation(row, path) for row in part]
            count += len(found)
            added += sum(store.by_key(own.key) is None for own in found)
            store.put_many(found)
        return ImportedResults(kind, count, added)
    raise InputError(
        f"{path} holds no predictions of structures or simulations",
        advice="screenings are read by nanoos_fw.operations.row_files.read_rows",
    )


# ------------------------------------------------------------------------- private


def _head(kind: str, units: Mapping[str, str]) -> dict[str, Any]:
    return {
        "results": kind,
        "units": dict(units),
        "exported": utc_now(),
        "nanoos_fw": __version__,
    }


def _is_number(value: Any) -> bool:
    # Whole numbers stay what they are, and what is not finite has no column.
    return isinstance(value, float) and math.isfinite(value)


def _crystals(structures: StructureStore) -> Any:
    def crystal_of(row: Row) -> Any:
        key = row["structure"]
        return decode_arrays(structures.encoded([key])[key])

    return crystal_of


def _simulation(row: Row, path: Path) -> Simulation:
    rest = dict(row[_REST])
    given = {name: row[name] for name in ("structure", "method", "kind", "status")}
    numbers = {
        name: value
        for name, value in row.items()
        if name not in _SIMULATION and name != _REST and value is not None
    }
    found = Simulation(**given, **{**rest, "result": {**rest["result"], **numbers}})
    if found.key != row["key"]:
        raise InputError(
            f"{path}: a row has another key than its structure and method",
            evidence={"key": row["key"], "expected": found.key},
        )
    return found


def _parts(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), _AT_ONCE):
        yield keys[start : start + _AT_ONCE]


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    waiting: list[Row] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == _AT_ONCE:
            yield waiting
            waiting = []
    yield waiting
