"""Datasets from the stores: labels and cached features of a set of structures."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.ml.datasets import (
    Dataset,
    DatasetConfig,
    TrainValSplit,
    open_dataset,
    split_train_val,
    write_regression_dataset,
)
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.splits import Leakage
from nanoos_fw.stores.features import FeatureStore
from nanoos_fw.stores.labels import (
    FORMATION_ENERGY,
    formation_energies,
    simulated_values,
)
from nanoos_fw.stores.simulations import SimulationStore
from nanoos_fw.stores.structures import StructureStore
from nanoos_fw.units import unit_of

_PER_ATOM = "_per_atom"
_LABELS_AT_ONCE = 5000


@dataclass(frozen=True)
class BuiltDataset:
    """A dataset, and the structures that are not in it.

    Parameters
    ----------
    without_label
        Keys of structures without a value of the target.
    failed_labels
        Structures whose simulation failed -> why. Also in ``without_label``.
    without_features
        Labelled structures without features -> why.
    leakage
        What the parts share.
    """

    dataset: Dataset
    without_label: list[str]
    failed_labels: dict[str, str]
    without_features: dict[str, str]
    leakage: Leakage

    @property
    def split(self) -> TrainValSplit:
        """The three parts, their graphs in memory."""
        return split_train_val(self.dataset)


@dataclass(frozen=True)
class TargetValues:
    """Values of a target by structure key.

    Parameters
    ----------
    values
        In ``unit``.
    unit
        None if nobody has said it.
    times
        When each structure was stored; empty unless asked for.
    failures
        Structures whose simulation failed -> why.
    """

    values: dict[str, float]
    unit: str | None
    times: dict[str, str]
    failures: dict[str, str]


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
    directory: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    **config: Any,
) -> BuiltDataset:
    """Build a dataset of stored structures, split it, and check the split.

    Parameters
    ----------
    database
        Of ``open_database``.
    target_property
        Without ``method``: a property that was imported with the structures or in a
        table (``energy``), or ``<property>_per_atom``, which is divided by the number
        of sites unless it was imported under that name. With ``method``:
        ``formation_energy_per_atom``, or a property of
        :func:`nanoos_fw.stores.labels.simulated_values`.
    train_fraction, min_samples
        Of ``DatasetConfig``. Without ``val_fraction`` and ``test_fraction`` in
        ``config`` the rest is halved between them.
    keys, in_set
        The structures, or the set that names them.
    features
        Extraction parameters of the cached features.
    method, references
        Key of the simulation method, and for formation energies the elements that
        were relaxed by it.
    directory
        Write the dataset there while its graphs are read, a few hundred at a time,
        and return it memory-mapped. None takes a temporary one (``TMPDIR``), which is
        gone from the disk when nothing uses the dataset any more.
    on_progress
        Called with the numbers of graphs read, and of all.
    **config
        Further fields of ``DatasetConfig``. With ``mock_targets`` the values are made
        up from the keys, and labels are not looked at.

    Raises
    ------
    InputError
        If no structures are given, too few have label and features, or the config
        is not valid.
    """
    structures = StructureStore(database)
    if (keys is None) == (in_set is None):
        raise InputError("give either the keys or the set of the structures")
    keys = structures.keys(in_set) if keys is None else list(dict.fromkeys(keys))
    if "val_fraction" not in config and "test_fraction" not in config:
        config["val_fraction"] = config["test_fraction"] = (1 - train_fraction) / 2
    settings = _settings(
        target_property=target_property,
        train_fraction=train_fraction,
        min_samples=min_samples,
        **config,
    )
    found = collect_targets(
        database,
        settings,
        keys=keys,
        method=method,
        references=references,
    )
    dataset, without, leakage = build_from_targets(
        database,
        found,
        settings,
        features=features,
        directory=directory,
        on_progress=on_progress,
    )
    return BuiltDataset(
        dataset=dataset,
        without_label=[key for key in keys if key not in found.values],
        failed_labels=found.failures,
        without_features=without,
        leakage=leakage,
    )


def collect_targets(
    database: Any,
    settings: DatasetConfig,
    *,
    keys: Sequence[str],
    method: str | None = None,
    references: Sequence[str] = (),
) -> TargetValues:
    """Return the target of every structure that has one.

    Raises
    ------
    InputError
        If none has, or the labels have another unit than the dataset is to have.
    """
    structures = StructureStore(database)
    target = settings.target_property
    times: dict[str, str] = {}
    if settings.split == "time":
        # Only where they decide something: a second import has other times, and equal
        # datasets are to have equal bytes.
        for part in _parts(keys):
            known = structures.labels(part)
            times |= {key: entry.created for key, entry in known.items()}
    if settings.mock_targets:
        found = TargetValues({key: _mock(key) for key in keys}, None, {}, {})
    elif method is not None:
        found = _simulated(database, target, keys, method, references)
    else:
        found = _imported(structures, keys, target)
    # What the name stands for, where the settings leave it out: the dataset says so.
    if found.unit and settings.target_unit not in ("", found.unit):
        raise InputError(
            f"the labels {target!r} are in {found.unit}, not in {settings.target_unit}",
            advice="give the unit of the labels, or import them in the unit you want",
        )
    return replace(found, times=times)


def build_from_targets(
    database: Any,
    found: TargetValues,
    settings: DatasetConfig,
    *,
    features: Mapping[str, Any],
    directory: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[Dataset, dict[str, str], Leakage]:
    """Join targets and cached features; see :func:`build_train_val_datasets`.

    Returns
    -------
    tuple
        The dataset, why labelled structures have no features, and the leakage.
    """
    if found.unit is not None and not settings.target_unit:
        # Only where the name alone does not tell it: keys of datasets hash this.
        settings = settings.model_copy(update={"unit": found.unit})
    store, labelled = FeatureStore(database), sorted(found.values)
    state = store.state(labelled, features, FEATURE_VERSION)
    usable = [key for key in labelled if state.get(key) == "ok"]
    lacking = [key for key in labelled if state.get(key) != "ok"]
    status = store.status(lacking, features, FEATURE_VERSION)
    without = {key: entry.reason or entry.state for key, entry in status.items()}
    if len(usable) < settings.min_samples:
        raise InputError(
            f"{len(usable)} of {len(labelled)} labelled structures have features, "
            f"fewer than min_samples = {settings.min_samples}",
            evidence={"without_features": dict(list(without.items())[:5])},
            advice="run 'nanoos features compute', or lower min_samples",
        )
    targets = {key: found.values[key] for key in usable}
    times = found.times if settings.split == "time" else None

    def graphs() -> Iterator[tuple[str, bytes]]:
        stream = store.stream_graphs(usable, features, FEATURE_VERSION)
        for number, entry in enumerate(stream, start=1):
            yield entry
            if number % _LABELS_AT_ONCE == 0:
                on_progress(number, len(usable))
        on_progress(len(usable), len(usable))

    with contextlib.ExitStack() as stack:
        if directory is None:
            # The pages stay mapped, and their space taken, as long as the dataset is
            # in use; the names of the files are not needed for that.
            folder = tempfile.TemporaryDirectory(prefix="nanoos-dataset-")
            directory = Path(stack.enter_context(folder))
        _, leakage = write_regression_dataset(
            graphs(), targets, settings, directory, times=times
        )
        return open_dataset(directory, verify=False), without, leakage


# ------------------------------------------------------------------------- private


def _settings(**fields: Any) -> DatasetConfig:
    from pydantic import ValidationError

    try:
        return DatasetConfig(**fields)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors()
        )
        raise InputError(f"bad dataset settings: {problems}") from error


def _parts(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), _LABELS_AT_ONCE):
        yield keys[start : start + _LABELS_AT_ONCE]


def _mock(key: str) -> float:
    """Return a number in [-1, 1) that the key alone decides."""
    digest = hashlib.sha256(f"mock target of {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**63 - 1.0


def _simulated(
    database: Any,
    target: str,
    keys: Sequence[str],
    method: str,
    references: Sequence[str],
) -> TargetValues:
    structures, simulations = StructureStore(database), SimulationStore(database)
    if target != FORMATION_ENERGY:
        found = simulated_values(
            structures, simulations, keys=keys, method=method, name=target
        )
        failures = _messages(found.failures)
        return TargetValues(found.values, found.unit or None, {}, failures)
    if not references:
        raise InputError(
            f"{FORMATION_ENERGY} needs the relaxed elements",
            advice="give references: structures of the pure elements",
        )
    energies = formation_energies(
        structures, simulations, keys=keys, references=references, method=method
    )
    if not energies.energies:
        raise InputError(
            f"none of {len(keys)} structures has a relaxation by method {method!r}",
            evidence={"methods": simulations.methods()},
            advice="the methods in the evidence have results",
        )
    return TargetValues(energies.energies, "eV/atom", {}, _messages(energies.failures))


def _messages(errors: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {key: str(e.get("message", "unknown")) for key, e in errors.items()}


def _imported(
    structures: StructureStore, keys: Sequence[str], target: str
) -> TargetValues:
    """Return the labels that came with the structures, or in a table."""
    whole = target.removesuffix(_PER_ATOM)
    values: dict[str, float] = {}
    units: dict[str, str] = {}
    without_unit: str | None = None
    names: set[str] = set()
    for part in _parts(keys):
        for key, entry in structures.labels(part).items():
            names |= set(entry.properties)
            if target in entry.properties:
                values[key] = float(entry.properties[target])
                unit = entry.units.get(target)
            elif whole != target and whole in entry.properties:
                values[key] = float(entry.properties[whole]) / entry.n_sites
                unit = entry.units.get(whole)
                unit = unit if unit is None else f"{unit}/atom"
            else:
                continue
            if unit is not None:
                units.setdefault(unit, key)
            else:
                without_unit = without_unit or key
    if without_unit and units and set(units) != {unit_of(target)}:
        # Nobody has said that they are in the unit of the others.
        units["not known"] = without_unit
    if not values:
        raise InputError(
            f"none of {len(keys)} structures has a label {target!r}",
            evidence={"properties": sorted(names)[:20]},
            advice=f"imported properties: {', '.join(sorted(names)[:10]) or 'none'}",
        )
    if len(units) > 1:
        raise InputError(
            f"the labels {target!r} have several units: {', '.join(sorted(units))}",
            evidence={"structure_by_unit": units},
            advice="import them again in one unit, with --replace",
        )
    # Numbers of a known name are in its unit: import converts or refuses others.
    unit = next(iter(units), None) or unit_of(target) or None
    return TargetValues(values, unit, {}, {})
