"""Datasets as tables for other programs: pandas, CSV, JSON lines, Parquet."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from nanoos_fw.errors import InputError, MissingDependencyError
from nanoos_fw.ml.datasets import Dataset
from nanoos_fw.ml.splits import reduced_formulas
from nanoos_fw.provenance import write_atomic

FORMATS = (".csv", ".jsonl", ".parquet")


def export_dataset_to_pandas(dataset: Dataset) -> Any:
    """Return a ``pandas.DataFrame`` with one row per structure.

    Columns: id, part, target, its unit, atoms, edges, elements, reduced formula.
    ``attrs`` has the units by column, and the dataset's hash.

    Raises
    ------
    MissingDependencyError
        If pandas is not installed.
    """
    try:
        pd = importlib.import_module("pandas")
    except ImportError as error:
        raise MissingDependencyError(
            "exporting to pandas needs pandas", advice="pip install pandas"
        ) from error
    from pymatgen.core.periodic_table import Element

    starts = dataset.graphs.atom_start
    elements = [
        " ".join(
            Element.from_Z(int(z)).symbol
            for z in np.unique(dataset.graphs.numbers[starts[row] : starts[row + 1]])
        )
        for row in range(dataset.num_samples)
    ]
    frame = pd.DataFrame(
        {
            "structure_id": list(dataset.ids),
            "part": list(dataset.parts),
            dataset.config.target_property: np.array(dataset.targets),
            "unit": dataset.unit,
            "n_atoms": np.diff(starts),
            "n_edges": np.diff(dataset.graphs.edge_start),
            "elements": elements,
            "formula": reduced_formulas(dataset.graphs),
        }
    )
    frame.attrs.update(
        units={dataset.config.target_property: dataset.unit},
        dataset_hash=dataset.dataset_hash,
    )
    return frame


def export_dataset(dataset: Dataset, path: Path) -> int:
    """Write one row per structure and return how many.

    The ending of the file chooses the format. Every row carries the unit of the
    target and the hash of the dataset; Parquet has them in its metadata too.

    Raises
    ------
    InputError
        If the ending is none of ``FORMATS``, or the file cannot be written.
    MissingDependencyError
        If Parquet is asked for without pyarrow.
    """
    if path.suffix not in FORMATS:
        raise InputError(
            f"{path.name!r} names no format",
            advice=f"let the name end in {', '.join(FORMATS)}",
        )
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MissingDependencyError(
            "writing Parquet needs pyarrow",
            advice="pip install pyarrow, or write .csv or .jsonl",
        )
    frame = export_dataset_to_pandas(dataset)
    frame["dataset_hash"] = dataset.dataset_hash
    try:
        write_atomic(path, _content(frame, path.suffix))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    return dataset.num_samples


def _content(frame: Any, suffix: str) -> bytes | str:
    if suffix == ".csv":
        return str(frame.to_csv(index=False))
    if suffix == ".jsonl":
        # Not by pandas, which rounds: these are the targets to the last digit.
        rows = frame.to_dict("records")
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    buffer = io.BytesIO()
    frame.to_parquet(buffer, engine="pyarrow", index=False)
    return buffer.getvalue()
