"""Checkpoints that a training begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.model_files import LineGraphArchitecture, ModelCard, read_checkpoint
from nanoos_fw.ml.training_config import TrainingConfig, read_training_config
from nanoos_fw.provenance import sha256_bytes


def check_without_parent(config: TrainingConfig) -> None:
    """Refuse a config that needs a parent.

    Raises
    ------
    InputError
        If it does.
    """
    if config.parent_sha256 is not None:
        raise InputError(
            "the config names a parent by its checksum, but no file was given",
            advice="give the file as parent",
        )
    if config.freeze or config.normalizer == "keep":
        raise InputError(
            "freeze and normalizer = keep need a parent to take them from",
            advice="give a checkpoint as parent",
        )


def with_parent(config: TrainingConfig, parent: Path) -> TrainingConfig:
    """Return a config that names a parent and has its sizes.

    Raises
    ------
    InputError
        If the file is missing, or the config gives sizes that the parent does not
        have, or the parent is the answer to another question.
    CorruptArtifactError
        If the file is no checkpoint.
    """
    card, _, digest = read_parent(parent, config.parent_sha256)
    if card.target_property != config.target:
        raise InputError(
            f"{parent} predicts {card.target_property}, not {config.target}",
            advice="train further what predicts the same property",
        )
    sizes = _sizes(card)
    given = config.model_dump(exclude_unset=True)
    for name, value in sizes.items():
        if name in given and given[name] != value:
            raise InputError(
                f"{name} is {given[name]} in the config but {value} in {parent}",
                advice=f"leave {name} out to take that of the parent",
            )
    # Copies keep what was given apart from defaults, for the next time.
    values = {**given, **sizes, "parent_sha256": digest}
    return read_training_config(values)


def read_parent(
    path: Path, sha256: str | None
) -> tuple[ModelCard, dict[str, NDArray[Any]], str]:
    """Return card, arrays and SHA-256 of a checkpoint to train further.

    ``sha256`` is what the config names; None takes any file.
    """
    if not path.is_file():
        raise InputError(
            f"there is no checkpoint {path} to train further",
            advice="give the file of a model, or fetch it from the model registry",
        )
    raw = path.read_bytes()
    digest = sha256_bytes(raw)
    if sha256 not in (None, digest):
        raise InputError(
            f"{path} is not the parent that the config names",
            evidence={"sha256": digest, "sha256_expected": sha256},
        )
    card, arrays = read_checkpoint(raw, str(path))
    return card, arrays, digest


def check_parent(
    training: TrainingConfig, card: ModelCard, table: GraphTable, path: Path
) -> None:
    """Refuse a parent whose sizes, graphs or classes are not those of a training."""
    sizes = _sizes(card)
    differ = {
        name: (getattr(training, name), value)
        for name, value in sizes.items()
        if getattr(training, name) != value
    }
    built = (table.cutoff_radius, table.max_neighbors)
    if built != (card.cutoff_radius, card.max_neighbors):
        differ["cutoff_radius, max_neighbors"] = (
            built,
            (card.cutoff_radius, card.max_neighbors),
        )
    if len(training.classes) != len(card.classes):
        differ["classes"] = (training.classes, card.classes)
    if differ:
        raise InputError(
            f"training and parent {path} do not fit: {', '.join(differ)}",
            evidence={
                name: {"training": ours, "parent": theirs}
                for name, (ours, theirs) in differ.items()
            },
            advice="use the parent's sizes and graphs",
        )


# ------------------------------------------------------------------------- private


def _sizes(card: ModelCard) -> dict[str, Any]:
    """Return the fields of a config that a parent decides."""
    architecture = card.architecture
    if isinstance(architecture, LineGraphArchitecture):
        return {
            "model_type": "line_graph",
            "hidden_dim": architecture.hidden_dim,
            "num_layers": architecture.angle_layers + architecture.atom_layers,
            "angle_layers": architecture.angle_layers,
            "angle_cutoff": architecture.angle_cutoff,
            "angle_gaussians": architecture.n_angle_gaussians,
            "gaussian_step": architecture.gaussian_step,
        }
    return {
        "model_type": "cgcnn",
        "hidden_dim": architecture.hidden_dim,
        "num_layers": architecture.num_layers,
        "readout_dim": architecture.readout_dim,
        "dense_layers": architecture.dense_layers,
        "gaussian_step": architecture.gaussian_step,
    }
