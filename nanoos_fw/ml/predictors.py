"""One interface for all models: graphs in, mean and uncertainty out.

To plug in another kind of model, write a class with the attributes and methods of
:class:`PropertyModel`, keep its weights in a safetensors file whose metadata has one
entry named after your format, and call :func:`register_reader` with that name and a
function that makes the model from the bytes. Screening, ranking and reports then take
it like the others. Registered so far: networks (``nanoos_fw.cgcnn``; the card's
architecture says which) and forests (``nanoos_fw.forest``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.cgcnn import CGCNNModel
from nanoos_fw.ml.forest import load_forest
from nanoos_fw.ml.line_graph_model import LineGraphModel
from nanoos_fw.ml.model_files import LineGraphArchitecture, read_checkpoint
from nanoos_fw.ml.weight_files import (
    FETCH,
    FOREST_FORMAT,
    NETWORK_FORMAT,
    weight_formats,
)
from nanoos_fw.provenance import sha256_bytes

if TYPE_CHECKING:
    from nanoos_fw.ml.features import AnyGraph
    from nanoos_fw.ml.uncertainty import Predictions


@runtime_checkable
class PropertyModel(Protocol):
    """A model of one property of crystals, with weights."""

    @property
    def model_name(self) -> str:
        """Name under which predictions are recorded."""

    @property
    def model_type(self) -> str:
        """Kind of model, such as ``CGCNN``."""

    @property
    def target_property(self) -> str:
        """What is predicted."""

    @property
    def unit(self) -> str:
        """Unit of predictions."""

    @property
    def checkpoint_sha256(self) -> str | None:
        """Of the file that the model was read from."""

    @property
    def n_members(self) -> int:
        """Networks or trees that are averaged."""

    def unseen_elements(self, graph: AnyGraph) -> list[str]:
        """Return the elements of a graph that the training set did not hold."""

    def predict(self, graph_repr: AnyGraph) -> dict[str, Any]:
        """Predict one structure: see :meth:`.NetworkModel.predict`."""

    def predict_many(
        self, graphs: Sequence[AnyGraph], batch_size: int = 256
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return mean and uncertainty (None if the model states none), ``(n,)``."""

    def predict_full(
        self, graphs: Sequence[AnyGraph], *, coverage: float = 0.9
    ) -> Predictions:
        """Predict many structures, with intervals and distance to the training."""


Reader = Callable[..., PropertyModel]
"""Called with the bytes of a file, and ``model_name``, ``model_version`` and
``threads`` by keyword."""


def register_reader(file_format: str, reader: Reader) -> None:
    """Let :func:`open_model` read another kind of model.

    Parameters
    ----------
    file_format
        Entry in the metadata of the safetensors files.
    reader
        Makes the model.

    Raises
    ------
    InputError
        If the format has a reader already.
    """
    if file_format in _READERS:
        raise InputError(f"the format {file_format!r} has a reader already")
    _READERS[file_format] = reader


def open_model(
    source: str | Path | bytes,
    *,
    model_name: str = "model",
    model_version: str | None = None,
    target_property: str | None = None,
    sha256: str | None = None,
    threads: int | None = None,
) -> PropertyModel:
    """Read a model of any kind, ready to predict.

    Parameters
    ----------
    source
        File or its bytes.
    model_name, model_version
        As predictions shall name it.
    target_property
        Refuse a model of another property.
    sha256
        Refuse a file with another checksum.
    threads
        Of predictions; None takes ``OMP_NUM_THREADS``, or all cores.

    Raises
    ------
    InputError
        If there is no such file, or it predicts another property.
    CorruptArtifactError
        If it is no model, or does not match its checksum.
    """
    if isinstance(source, bytes):
        data, name = source, "checkpoint"
    else:
        path = Path(source)
        if not path.is_file():
            raise InputError(
                f"there is no checkpoint {path}",
                advice="train a model, or fetch the file from the model registry",
            )
        data, name = path.read_bytes(), str(path)
    digest = sha256_bytes(data)
    if sha256 is not None and digest != sha256:
        raise CorruptArtifactError(
            f"{name} does not match its checksum",
            evidence={"sha256": digest, "sha256_expected": sha256},
            advice="fetch the file again",
        )
    formats = [key for key in weight_formats(data) if key in _READERS]
    if len(formats) != 1:
        raise CorruptArtifactError(
            f"{name} is not a model of a known kind",
            evidence={"known": sorted(_READERS)},
            advice=f"{FETCH}; register_reader teaches this program other kinds",
        )
    model = _READERS[formats[0]](
        data, model_name=model_name, model_version=model_version, threads=threads
    )
    if target_property not in (None, model.target_property):
        raise InputError(
            f"{name} predicts {model.target_property}, not {target_property}",
            advice="load it as a model of its own property",
        )
    return model


# ------------------------------------------------------------------------- private


def _read_network(
    data: bytes, *, model_name: str, model_version: str | None, threads: int | None
) -> PropertyModel:
    card, _ = read_checkpoint(data)
    angles = isinstance(card.architecture, LineGraphArchitecture)
    kind = LineGraphModel if angles else CGCNNModel
    model = kind(
        model_name, card.target_property, model_version=model_version, threads=threads
    )
    return model.load_bytes(data, name=model_name)


def _read_forest(
    data: bytes, *, model_name: str, model_version: str | None, threads: int | None
) -> PropertyModel:
    del threads  # numpy's loops over rows have one
    return load_forest(data, model_name=model_name, model_version=model_version)


_READERS: dict[str, Reader] = {
    NETWORK_FORMAT: _read_network,
    FOREST_FORMAT: _read_forest,
}
