"""The entries of system models in every database, with or without their weights."""

from __future__ import annotations

from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.ml.system_models import SYSTEM_MODELS, install_advice
from nanoos_fw.provenance import utc_now

__all__ = [
    "DECLARED_VERSION",
    "SYSTEM_MODELS",
    "check_name",
    "declare_system_models",
    "install_advice",
]

DECLARED_VERSION = 0
"""Version of an entry that has no weights; weights begin at 1."""


def check_name(name: str, target: str) -> None:
    """Refuse names that cannot be used for models of a target.

    Raises
    ------
    InputError
        If the name is empty, cannot be told from a reference, or is taken.
    """
    if not name or "@" in name or ":" in name:
        raise InputError(f"model name {name!r} must not be empty or hold '@', ':'")
    system = SYSTEM_MODELS.get(name)
    if system is not None and target != system.target:
        raise InputError(
            f"{name!r} is the name of a model for {system.target!r}, not {target!r}",
            advice="choose another name",
        )


def declare_system_models(database: Any) -> None:
    """Enter the system models that the database does not know yet, without weights."""
    for model in SYSTEM_MODELS.values():
        reference = f"{model.name}@{DECLARED_VERSION}"
        document = {
            "name": model.name,
            "version": DECLARED_VERSION,
            "target": model.target,
            "unit": model.unit,
            "model_type": "CGCNN",
            "sha256": None,
            "checkpoint_path": "",
            "storage": "none",
            "training_key": f"system/{model.name}",
            "training_config": {},
            "metrics": {},
            "dataset_info": {"source": model.source},
            "environment": {},
            "details": None,
            "parent": None,
            "is_system_provided": True,
            "removed": None,
            "created": utc_now(),
        }
        database["models"].update_one(
            {"_id": reference}, {"$setOnInsert": document}, upsert=True
        )
