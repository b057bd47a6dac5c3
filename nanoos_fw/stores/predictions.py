"""Predictions: one row per model version and structure, written once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoos_fw.stores.database import store_errors, upsert_many

_OPTIONAL = ("half_width", "coverage", "distance")


@dataclass(frozen=True)
class Prediction:
    """The prediction of one model version for one structure, in the target's unit.

    Parameters
    ----------
    structure
        Key of the structure.
    prediction, uncertainty
        Mean and calibrated spread; the latter None where the model states none.
    out_of_domain
        Elements that training did not hold, or far from its structures.
    half_width, coverage
        The truth is within ``prediction ± half_width`` with this probability; None
        where the model is not calibrated.
    distance
        To the nearest training structures; see ``ml.uncertainty``.
    """

    structure: str
    prediction: float
    uncertainty: float | None
    out_of_domain: bool
    half_width: float | None = None
    coverage: float | None = None
    distance: float | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any], coverage: float) -> Prediction:
        """Return a row of ``ml.screening.predict_in_chunks``."""
        half_width = row.get("half_width")
        return cls(
            structure=row["structure_id"],
            prediction=row["mean"],
            uncertainty=row["std"],
            out_of_domain=row["out_of_domain"],
            half_width=half_width,
            coverage=None if half_width is None else coverage,
            distance=row.get("distance"),
        )

    def to_row(self) -> dict[str, Any]:
        """Return the row that ``ml.screening.rank_candidates`` ranks."""
        return {
            "structure_id": self.structure,
            "mean": self.prediction,
            "std": self.uncertainty,
            "half_width": self.half_width,
            "distance": self.distance,
            "out_of_domain": self.out_of_domain,
        }


class PredictionStore:
    """The collection ``predictions``.

    A row is of a model version, a structure, and the version of features by which it
    was predicted: those of another one are not seen.
    """

    def __init__(self, database: Any) -> None:
        self._predictions = database["predictions"]

    def put(self, model: str, rows: Iterable[Prediction]) -> int:
        """Store predictions once per (model, structure); return how many are new."""
        key = _key(model)
        upserts = [
            (
                {"model": key, "structure": row.structure},
                {
                    "$setOnInsert": {
                        "prediction": row.prediction,
                        "uncertainty": row.uncertainty,
                        "out_of_domain": row.out_of_domain,
                        **{name: getattr(row, name) for name in _OPTIONAL},
                    }
                },
            )
            for row in rows
        ]
        with store_errors("store predictions"):
            return len(upsert_many(self._predictions, upserts))

    def get(self, model: str, structures: Sequence[str]) -> list[Prediction]:
        """Return the predictions there are for the structures, in their order."""
        query = {"model": _key(model), "structure": {"$in": list(structures)}}
        with store_errors("read predictions"):
            found = {d["structure"]: d for d in self._predictions.find(query)}
        return [
            Prediction(
                structure=key,
                prediction=float(found[key]["prediction"]),
                uncertainty=found[key]["uncertainty"],
                out_of_domain=bool(found[key]["out_of_domain"]),
                **{name: found[key].get(name) for name in _OPTIONAL},
            )
            for key in structures
            if key in found
        ]

    def count(self, model: str) -> int:
        """Return how many structures a model version was asked about."""
        with store_errors("count predictions"):
            return int(self._predictions.count_documents({"model": _key(model)}))


# ------------------------------------------------------------------------- private


def _key(model: str) -> str:
    """Return what stands for a model version and the present version of features."""
    from nanoos_fw.ml.features import FEATURE_VERSION

    # The first version is left out, as it was before there was a choice.
    return model if FEATURE_VERSION == 1 else f"{model}/features {FEATURE_VERSION}"
