from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from pymatgen.core import Lattice, Structure
from safetensors.numpy import save

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn import Architecture, ModelCard, atom_features, save_checkpoint
from nanoos_fw.ml.forest_fitting import fit_forest
from nanoos_fw.ml.graph_scalars import graph_scalars
from nanoos_fw.ml.graphs import build_graph, pack_graph
from nanoos_fw.ml.model_files import read_checkpoint
from nanoos_fw.ml.network import CrystalGraphNetwork
from nanoos_fw.ml.predictors import PropertyModel, open_model, register_reader
from nanoos_fw.ml.screening import predict_in_chunks
from nanoos_fw.provenance import canonical_json

CRYSTALS = [
    Structure(Lattice.cubic(a), ["Cu", "Au"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    for a in (3.0, 3.1, 3.2, 3.3)
]


def network_file(path):
    sizes = Architecture(hidden_dim=8, num_layers=1, readout_dim=4)
    card = ModelCard(
        target_property="energy_per_atom",
        unit="eV/atom",
        target_mean=0.0,
        target_std=1.0,
        n_members=2,
        architecture=sizes,
        cutoff_radius=8.0,
        max_neighbors=12,
        elements=(29, 79),
        dataset_hash="0",
        n_train=4,
    )
    torch.manual_seed(0)  # not whatever the tests before have left
    states = [
        CrystalGraphNetwork(sizes, atom_features()).state_dict() for _ in range(2)
    ]
    return save_checkpoint(path, card, states, atom_features(), np.zeros(119))


def forest_file(path):
    table = GraphTable.from_graphs([build_graph(c) for c in CRYSTALS])
    forest = fit_forest(
        graph_scalars(table),
        np.arange(4.0),
        n_trees=3,
        target_property="energy_per_atom",
        unit="eV/atom",
    )
    return forest.save(path)


@pytest.mark.parametrize("write", [network_file, forest_file])
def test_all_kinds_of_models_have_one_interface(write, tmp_path):
    digest = write(tmp_path / "m")
    model = open_model(
        tmp_path / "m",
        model_name="m",
        model_version="m@3",
        target_property="energy_per_atom",
        sha256=digest,
        threads=1,
    )
    assert isinstance(model, PropertyModel)
    graphs = [build_graph(crystal) for crystal in CRYSTALS]
    mean, std = model.predict_many(graphs)
    answers = [model.predict(graph) for graph in graphs]
    np.testing.assert_allclose([a["prediction"] for a in answers], mean, rtol=1e-6)
    np.testing.assert_allclose([a["uncertainty"] for a in answers], std, rtol=1e-4)
    for answer in answers:
        assert answer["model_name"] == "m"
        assert answer["model_version"] == "m@3"
        assert answer["unit"] == "eV/atom"
        assert answer["checkpoint_sha256"] == digest
        assert answer["out_of_domain"] is False
    packed = [(str(i), pack_graph(graph)) for i, graph in enumerate(graphs)]
    rows = [row for rows in predict_in_chunks(model, packed, 3) for row in rows]
    assert [row["structure_id"] for row in rows] == ["0", "1", "2", "3"]
    np.testing.assert_allclose([row["mean"] for row in rows], mean, rtol=1e-5)
    strange = Structure(Lattice.cubic(3), ["Pt", "Cu"], [[0, 0, 0], [0.5] * 3])
    assert model.predict(build_graph(strange))["unseen_elements"] == ["Pt"]


WITHOUT = """
import json, sys
for name in sys.argv[2:]:
    sys.modules[name] = None  # as if it were not installed
from pymatgen.core import Lattice, Structure
from nanoos_fw.ml.predictors import open_model
cells = [
    Structure(Lattice.cubic(a), ["Cu", "Au"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    for a in (3.0, 3.1, 3.2, 3.3)
]
found, _, _ = open_model(sys.argv[1]).predict_crystals([c.as_dict() for c in cells])
print(json.dumps([found.mean.tolist(), found.std.tolist()]))
"""


def test_predictions_need_neither_torch_nor_sklearn(tmp_path):
    network_file(tmp_path / "m")
    mean, std = open_model(tmp_path / "m").predict_many(
        [build_graph(crystal) for crystal in CRYSTALS]
    )
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "m"), "torch", "sklearn"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    np.testing.assert_array_equal(json.loads(done.stdout), [mean, std])


def test_checkpoints_of_older_releases_are_read(tmp_path):
    network_file(tmp_path / "m")
    card, arrays = read_checkpoint((tmp_path / "m").read_bytes())
    fields = card.model_dump(mode="json")
    for name in ("classes", "pad_neighbors", "origin", "uncertainty"):
        del fields[name]
    for name in ("dense_layers", "n_outputs"):
        del fields["architecture"][name]
    # As release 0.1.0 wrote them: by torch, with the digest over torch's names.
    text = canonical_json(fields)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    header = canonical_json({"card": text, "card_sha256": digest.hexdigest()})
    data = safetensors.torch.save(tensors, metadata={"nanoos_fw.cgcnn": header})
    graph = build_graph(CRYSTALS[0])
    old, new = (
        open_model(data).predict(graph),
        open_model(tmp_path / "m").predict(graph),
    )
    assert old["prediction"] == new["prediction"]
    assert old["uncertainty"] == new["uncertainty"]


def test_wrong_files_are_refused(tmp_path):
    network_file(tmp_path / "m")
    with pytest.raises(InputError, match="not bandgap"):
        open_model(tmp_path / "m", target_property="bandgap")
    with pytest.raises(CorruptArtifactError, match="checksum"):
        open_model(tmp_path / "m", sha256="0" * 64)
    with pytest.raises(InputError, match="no checkpoint"):
        open_model(tmp_path / "none")
    with pytest.raises(CorruptArtifactError, match="known kind"):
        open_model(save({"x": np.zeros(2)}, metadata={"other": "1"}))
    for data in (b"", b"\x80\x02}q\x00.", b"\x05\x00\x00\x00\x00\x00\x00\x00[1,2]"):
        with pytest.raises(CorruptArtifactError):
            open_model(data)


def test_another_kind_can_be_plugged_in():
    class Constant:
        def __init__(self, data, *, model_name, model_version, threads):
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            self.value = float(header["__metadata__"]["test.constant"])
            self.model_name = model_name
            self.target_property = "answer"

    register_reader("test.constant", Constant)
    data = save({"x": np.zeros(1)}, metadata={"test.constant": "42"})
    model = open_model(data, model_name="deep thought", target_property="answer")
    assert (model.value, model.model_name) == (42.0, "deep thought")
    with pytest.raises(InputError, match="already"):
        register_reader("test.constant", Constant)
