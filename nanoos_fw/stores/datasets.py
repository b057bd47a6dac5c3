"""Datasets from the stores: labels and cached features of a set of structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.ml.datasets import (
    Dataset,
    DatasetConfig,
    TrainValSplit,
    build_regression_dataset,
    check_leakage,
    split_train_val,
)
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.splits import Leakage
from nanoos_fw.stores.features import FeatureStore
from nanoos_fw.stores.labels import formation_energies
from nanoos_fw.stores.simulations import SimulationStore
from nanoos_fw.stores.structures import StructureLabels, StructureStore

FORMATION_ENERGY = "formation_energy_per_atom"
_PER_ATOM = "_per_atom"


@dataclass(frozen=True)
class BuiltDataset:
    """A dataset, its parts, and the structures that are not in it.

    Parameters
    ----------
    without_label
        Keys of structures without a value of the target.
    without_features
        Labelled structures without features -> why.
    leakage
        What the parts share.
    """

    dataset: Dataset
    split: TrainValSplit
    without_label: list[str]
    without_features: dict[str, str]
    leakage: Leakage


def build_train_val_datasets(
    database: Any,
    target_property: str,
    train_fraction: float = 0.8,
    min_samples: int = 10,
    *,
    keys: Sequence[str] | None = None,
    in_set: str | None = None,
    features: Mapping[str, Any],
    method: str | None = None,
    references: Sequence[str] = (),
    **config: Any,
) -> BuiltDataset:
    """Build a dataset of stored structures, split it, and check the split.

    Parameters
    ----------
    database
        Of ``open_database``.
    target_property
        A property that was imported with the structures (``energy``);
        ``<property>_per_atom``, which is divided by the number of sites unless it was
        imported under that name; or ``formation_energy_per_atom`` of a ``method``.
    train_fraction, min_samples
        Of ``DatasetConfig``. Without ``val_fraction`` and ``test_fraction`` in
        ``config`` the rest is halved between them.
    keys, in_set
        The structures, or the set that names them.
    features
        Extraction parameters of the cached features.
    method, references
        Key of the relaxation method and the relaxed elements: with them
        ``formation_energy_per_atom`` comes from the simulations.
    **config
        Further fields of ``DatasetConfig``.

    Raises
    ------
    InputError
        If no structures are given, too few have label and features, or the config
        is not valid.
    """
    from pydantic import ValidationError

    structures = StructureStore(database)
    if (keys is None) == (in_set is None):
        raise InputError("give either the keys or the set of the structures")
    keys = structures.keys(in_set) if keys is None else list(dict.fromkeys(keys))
    if "val_fraction" not in config and "test_fraction" not in config:
        config["val_fraction"] = config["test_fraction"] = (1 - train_fraction) / 2
    try:
        settings = DatasetConfig(
            target_property=target_property,
            train_fraction=train_fraction,
            min_samples=min_samples,
            **config,
        )
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors()
        )
        raise InputError(f"bad dataset settings: {problems}") from error
    known = structures.labels(keys)
    if method is not None and target_property == FORMATION_ENERGY:
        targets = formation_energies(
            structures,
            SimulationStore(database),
            keys=keys,
            references=references,
            method=method,
        ).energies
    else:
        targets = _imported(known, target_property)
    if not targets:
        names = sorted({name for entry in known.values() for name in entry.properties})
        raise InputError(
            f"none of {len(keys)} structures has a label {target_property!r}",
            evidence={"properties": names[:20]},
            advice=f"imported properties: {', '.join(names[:10]) or 'none'}",
        )
    store, labelled = FeatureStore(database), sorted(targets)
    graphs = store.graphs(labelled, features, FEATURE_VERSION)
    lacking = [key for key in labelled if key not in graphs]
    status = store.status(lacking, features, FEATURE_VERSION)
    without = {key: entry.reason or entry.state for key, entry in status.items()}
    if len(graphs) < settings.min_samples:
        raise InputError(
            f"{len(graphs)} of {len(labelled)} labelled structures have features, "
            f"fewer than min_samples = {settings.min_samples}",
            evidence={"without_features": dict(list(without.items())[:5])},
            advice="run 'nanoos features compute', or lower min_samples",
        )
    dataset = build_regression_dataset(
        graphs,
        {key: targets[key] for key in graphs},
        settings,
        # Only where they decide something: a second import has other times, and
        # equal datasets are to have equal bytes.
        times=(
            {key: known[key].created for key in graphs}
            if settings.split == "time"
            else None
        ),
    )
    return BuiltDataset(
        dataset=dataset,
        split=split_train_val(dataset),
        without_label=[key for key in keys if key not in targets],
        without_features=without,
        leakage=check_leakage(dataset),
    )


def _imported(known: Mapping[str, StructureLabels], target: str) -> dict[str, float]:
    """Return the labels that came with the structures."""
    whole = target.removesuffix(_PER_ATOM)
    targets = {}
    for key, entry in known.items():
        if target in entry.properties:
            targets[key] = float(entry.properties[target])
        elif whole != target and whole in entry.properties:
            targets[key] = float(entry.properties[whole]) / entry.n_sites
    return targets
