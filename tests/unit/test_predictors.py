from __future__ import annotations

import json

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from safetensors.numpy import save

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn import Architecture, ModelCard, atom_features, save_checkpoint
from nanoos_fw.ml.forest import fit_forest, graph_scalars
from nanoos_fw.ml.graphs import build_graph, pack_graph
from nanoos_fw.ml.network import CrystalGraphNetwork
from nanoos_fw.ml.predictors import PropertyModel, open_model, register_reader
from nanoos_fw.ml.screening import predict_in_chunks

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
