"""The results of each stage of the small campaign: read, dropped, compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from small_campaign import NAME


def keys_of(database: Any, firework: Mapping[str, Any], stage: str) -> list[str]:
    """Return the structures of a firework; of a training none."""
    task = firework["spec"]["_tasks"][0]
    if stage == "md":
        ranking = database["campaigns"].find_one({"_id": NAME})["outputs"]["ranking"]
        return [ranking[task["rank"] - 1]]
    return list(task.get("structures", ()))


def results(database: Any, stage: str, keys: list[str]) -> list[tuple[str, Any]]:
    """Return the results of a firework: what identifies each, and its value."""
    of_keys = {"structure": {"$in": keys}}
    if stage == "featurize":
        found = database["structure_features"].find(of_keys)
        return [(d["structure"], (d["status"], d["sha256"])) for d in found]
    if stage == "screen":
        found = database["predictions"].find(of_keys)
        names = ("model", "prediction", "uncertainty", "half_width", "out_of_domain")
        return [(d["structure"], [d[name] for name in names]) for d in found]
    if stage == "train":
        found = database["models"].find({"is_system_provided": False})
        return [(d["name"], (d["version"], d["metrics"])) for d in found]
    kind = "md" if stage == "md" else "relaxation"
    found = database["simulations"].find({"kind": kind, **of_keys})
    return [(d["structure"], (d["status"], _numbers(d["result"]))) for d in found]


def _numbers(value: Any) -> Any:
    """Return a result without what no two runs share: times, digests of files."""
    if isinstance(value, Mapping):
        left_out = {"artifact", "wall_time_s"}
        return {k: _numbers(v) for k, v in value.items() if k not in left_out}
    return value


def drop_results(database: Any, stage: str, keys: list[str]) -> None:
    """Remove the results of a firework, with the files that are theirs alone."""
    of_keys = {"structure": {"$in": keys}}
    artifacts: list[str] = []
    if stage == "featurize":
        database["structure_features"].delete_many(of_keys)
    elif stage == "screen":
        database["predictions"].delete_many(of_keys)
    elif stage == "train":
        own = {"is_system_provided": False}
        for model in database["models"].find(own):
            artifacts += [model["sha256"], model.get("details", "")]
        database["models"].delete_many(own)
        database["model_aliases"].delete_many({})
        database["campaigns"].update_one(
            {"_id": NAME}, {"$unset": {"outputs.model": 1}}
        )
    else:
        kind = "md" if stage == "md" else "relaxation"
        query = {"kind": kind, **of_keys}
        for row in database["simulations"].find(query):
            analyses = row["result"].get("analyses", {})
            artifacts += [a["artifact"] for a in analyses.values() if "artifact" in a]
        database["simulations"].delete_many(query)
    files = database["artifacts.files"]
    ids = [d["_id"] for d in files.find({"filename": {"$in": artifacts}})]
    files.delete_many({"_id": {"$in": ids}})
    database["artifacts.chunks"].delete_many({"files_id": {"$in": ids}})


def difference(found: Any, expected: Any, where: str = "") -> str:
    """Return where nested values differ, or nothing; numbers may by 1e-6.

    Ranks add in any order.
    """
    if isinstance(expected, Mapping):
        if found.keys() != expected.keys():
            return f"{where}: {sorted(found)} instead of {sorted(expected)}"
        pairs = [(name, found[name], expected[name]) for name in expected]
    elif isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"{where}: {len(found)} instead of {len(expected)}"
        pairs = [
            (str(n), *pair) for n, pair in enumerate(zip(found, expected, strict=True))
        ]
    elif isinstance(expected, float):
        same = math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6)
        return "" if same else f"{where}: {found} instead of {expected}"
    else:
        return "" if found == expected else f"{where}: {found} instead of {expected}"
    inside = (difference(a, b, f"{where}/{name}") for name, a, b in pairs)
    return next(filter(None, inside), "")
