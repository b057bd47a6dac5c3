"""Files of weights: safetensors, with a card that says what they are, and a digest.

Nothing in such a file is code: reading one cannot run anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.provenance import canonical_json, sha256_bytes, write_atomic

NETWORK_FORMAT = "nanoos_fw.cgcnn"
FOREST_FORMAT = "nanoos_fw.forest"
"""Entries of a file's metadata by which networks and forests are known."""

FETCH = (
    "weights are read from safetensors files only, since unpickling a file can run "
    "code; fetch or train the model again"
)
_NAMES = {NETWORK_FORMAT: "CGCNN checkpoint", FOREST_FORMAT: "forest"}
_CARD, _DIGEST, _MOCK = "card", "card_sha256", "mock_targets"
# Fields that came later, and what a file without them means: such files keep the
# bytes, and with them the digest, that they had before.
_LATER = {_MOCK: False, "feature_version": 1}

AnyCard = TypeVar("AnyCard", bound="WeightCard")


class WeightCard(BaseModel):
    """What all files of weights say of themselves.

    Parameters
    ----------
    mock_targets
        The weights come from made-up numbers, or began as weights that do: the
        registry makes no alias point to them.
    feature_version
        Of the features that the weights were fitted to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mock_targets: bool = False
    feature_version: int = 1


def save_weights(
    path: Path, kind: str, card: WeightCard, arrays: Mapping[str, NDArray[Any]]
) -> str:
    """Write card and arrays as one safetensors file, atomically; return its SHA-256.

    Parameters
    ----------
    kind
        ``NETWORK_FORMAT`` or ``FOREST_FORMAT``.
    """
    from safetensors.numpy import save

    text = _text(card)
    # Safetensors checks no content: the digest covers card and tensors. One entry
    # only, since the file format leaves the order of several to chance.
    header = {_CARD: text, _DIGEST: _digest(kind, text, arrays)}
    data = save(dict(arrays), metadata={kind: canonical_json(header)})
    write_atomic(path, data)
    return sha256_bytes(data)


def read_weights(
    data: bytes, name: str, kind: str, card_type: type[AnyCard]
) -> tuple[AnyCard, dict[str, NDArray[Any]]]:
    """Return card and arrays of the bytes of a file of :func:`save_weights`.

    Raises
    ------
    CorruptArtifactError
        If the bytes are no such file, or do not match their checksum.
    InputError
        If the weights were fitted to features of another version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
        header = json.loads(weight_formats(data)[kind])
        card = card_type.model_validate_json(header[_CARD])
        intact = header[_DIGEST] == _digest(kind, header[_CARD], arrays)
    except (SafetensorError, ValidationError, KeyError, ValueError) as error:
        raise CorruptArtifactError(
            f"{name} is not a {_NAMES[kind]}: {error}", advice=FETCH
        ) from error
    if not intact:
        raise CorruptArtifactError(
            f"the arrays of {name} do not match their checksum", advice=FETCH
        )
    if card.feature_version != FEATURE_VERSION:
        raise InputError(
            f"{name} was fitted to features of version {card.feature_version}, this "
            f"program makes version {FEATURE_VERSION}: its predictions would be wrong",
            advice="train it again, import it again if it was imported, or use the "
            "release that it was made with",
        )
    return card, arrays


def weight_formats(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file, by kind; empty of another file."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return dict(header["__metadata__"])
    except (ValueError, TypeError, KeyError):
        return {}


def says_mock_targets(path: Path) -> bool:
    """Tell whether a file of weights says that it comes from made-up numbers."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                return False
            file.seek(0)
            found = weight_formats(file.read(8 + length))
        for kind in _NAMES:
            if kind in found:
                card = json.loads(json.loads(found[kind])[_CARD])
                return bool(card.get(_MOCK))
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    return False


# ------------------------------------------------------------------------- private


def _text(card: WeightCard) -> str:
    """Return the card as the text that a file holds and its digest covers."""
    fields = card.model_dump(mode="json")
    for name, meant in _LATER.items():
        if fields[name] == meant:
            del fields[name]
    return canonical_json(fields)


def _digest(kind: str, card: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(card.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        # Types are named as each kind named them first: older files stay valid.
        of_torch = kind == NETWORK_FORMAT
        dtype = f"torch.{array.dtype}" if of_torch else array.dtype.str
        digest.update(f"{name}{array.shape}{dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
