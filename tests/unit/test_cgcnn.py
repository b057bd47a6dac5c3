from __future__ import annotations

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure
from torch.nn import functional

from nanoos_fw.errors import CorruptArtifactError, InputError, MissingDependencyError
from nanoos_fw.ml.batches import collate_graphs
from nanoos_fw.ml.cgcnn import (
    Architecture,
    CGCNNModel,
    ModelCard,
    atom_features,
    save_checkpoint,
)
from nanoos_fw.ml.features import extract_structure_features
from nanoos_fw.ml.graphs import build_graph, pack_graph
from nanoos_fw.ml.network import CrystalGraphNetwork, TensorBatch

ARCHITECTURE = Architecture(hidden_dim=16, num_layers=3, readout_dim=8)
FACES = [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
ALLOY = Structure(Lattice.cubic(3.7), ["Au", "Cu", "Cu", "Cu"], [[0, 0, 0], *FACES])
OXIDE = Structure(
    Lattice([[3.9, 0, 0], [0.3, 4.1, 0], [-0.2, 0.1, 4.4]]),
    ["Ti", "O", "O"],
    [[0.02, 0, 0], [0.5, 0.48, 0.1], [0.1, 0.5, 0.53]],
)
PEROVSKITE = Structure(  # has a tie at the 12th neighbour
    Lattice.cubic(3.9),
    ["Sr", "Ti", "O", "O", "O"],
    [[0, 0, 0], [0.5, 0.5, 0.5], *FACES],
)


def network(seed: int) -> CrystalGraphNetwork:
    """A network with random weights and random running moments."""
    generator = torch.Generator().manual_seed(seed)
    net = CrystalGraphNetwork(ARCHITECTURE, atom_features())
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "running_var" in name:
                tensor.copy_(noise.abs() + 0.5)
            else:
                tensor.copy_(0.4 * noise)
    return net.eval()


def write_model(path, n_members=3, reference=None, **changes):
    fields = {
        "target_property": "energy_per_atom",
        "unit": "eV/atom",
        "target_mean": -3.0,
        "target_std": 2.0,
        "n_members": n_members,
        "architecture": ARCHITECTURE,
        "cutoff_radius": 8.0,
        "max_neighbors": 12,
        "elements": (8, 22, 29, 38, 79),
        "dataset_hash": "0" * 40,
        "n_train": 7,
    }
    card = ModelCard(**{**fields, **changes})
    members = [network(seed).state_dict() for seed in range(n_members)]
    reference = np.zeros(119) if reference is None else reference
    return save_checkpoint(path, card, members, atom_features(), reference)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    write_model(path)
    return CGCNNModel("m", "energy_per_atom").load_from_checkpoint(path)


def predict(model, structure):
    return model.predict(build_graph(structure))["prediction"]


@pytest.mark.parametrize("structure", [ALLOY, OXIDE, PEROVSKITE])
def test_prediction_is_invariant(model, structure):
    expected = predict(model, structure)
    rng = np.random.default_rng(0)
    shifted = structure.copy()
    shifted.translate_sites(range(len(structure)), rng.uniform(size=3))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotated = Structure(
        Lattice(structure.lattice.matrix @ rotation),
        structure.species,
        structure.frac_coords,
    )
    permuted = Structure.from_sites(
        [structure[i] for i in rng.permutation(len(structure))]
    )
    for other in (shifted, rotated, permuted, structure * (2, 1, 2)):
        assert predict(model, other) == pytest.approx(expected, abs=2e-5)


def test_prediction_depends_on_distances_and_elements(model):
    stretched = OXIDE.copy()
    stretched.scale_lattice(OXIDE.volume * 1.02)
    replaced = OXIDE.copy()
    replaced.replace_species({"Ti": "Sr"})
    values = {round(predict(model, s), 4) for s in (OXIDE, stretched, replaced)}
    assert len(values) == 3


def published_formula(net, graph):
    """One crystal by the equations of the paper, with [v_i, v_j, u_ij] laid out."""
    state = {name: tensor.double() for name, tensor in net.state_dict().items()}
    embedding = torch.from_numpy(atom_features()).double()[graph.numbers.tolist()]
    atoms = embedding @ state["embedding.weight"].T + state["embedding.bias"]
    mu = torch.arange(41).double() * 0.2
    u = torch.exp(-((torch.from_numpy(graph.distances)[:, None] - mu) ** 2) / 0.04)
    i, j = (torch.from_numpy(row.astype(np.int64)) for row in graph.edge_index)

    def norm(x, name):
        return functional.batch_norm(
            x,
            *(state[f"{name}.{key}"] for key in ("running_mean", "running_var")),
            state[f"{name}.weight"],
            state[f"{name}.bias"],
            training=False,
        )

    for layer in range(3):
        name = f"convolutions.{layer}"
        weight = torch.cat(
            [state[f"{name}.{key}.weight"] for key in ("centre", "neighbor", "edge")], 1
        )
        z = torch.cat([atoms[i], atoms[j], u], 1) @ weight.T
        gate, core = norm(z, f"{name}.edge_norm").chunk(2, 1)
        messages = torch.sigmoid(gate) * functional.softplus(core)
        summed = torch.stack([messages[i == n].sum(0) for n in range(len(atoms))])
        atoms = functional.softplus(atoms + norm(summed, f"{name}.atom_norm"))
    x = functional.softplus(atoms.mean(0))
    x = functional.softplus(state["dense.weight"] @ x + state["dense.bias"])
    return float(state["output.weight"] @ x + state["output.bias"])


@pytest.mark.parametrize("structure", [ALLOY, OXIDE])
def test_network_equals_the_published_formula(structure):
    graph = build_graph(structure)
    batch = TensorBatch.from_batch(collate_graphs([graph]), torch.float32)
    with torch.inference_mode():
        found = float(network(5)(batch))
    assert found == pytest.approx(published_formula(network(5), graph), abs=2e-5)


def test_prediction_is_mean_std_and_reference(tmp_path):
    reference = np.zeros(119)
    reference[[29, 79]] = (-1.0, 4.0)
    write_model(tmp_path / "m", reference=reference)
    model = CGCNNModel("m", "energy_per_atom").load_from_checkpoint(tmp_path / "m")
    graph = build_graph(ALLOY)
    outputs = []
    for seed in range(3):
        batch = TensorBatch.from_batch(collate_graphs([graph]), torch.float32)
        with torch.inference_mode():
            outputs.append(float(network(seed)(batch)))
    members = -3.0 + 2.0 * np.array(outputs) + (3 * -1.0 + 4.0) / 4
    answer = model.predict(graph)
    assert answer["prediction"] == pytest.approx(members.mean(), abs=1e-5)
    assert answer["uncertainty"] == pytest.approx(members.std(ddof=1), rel=1e-4)
    assert (answer["unit"], answer["n_members"]) == ("eV/atom", 3)


def test_uncertainty_scale_multiplies_the_spread(tmp_path):
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", uncertainty_scale=2.5)
    a, b = (
        CGCNNModel("m", "energy_per_atom")
        .load_from_checkpoint(tmp_path / name)
        .predict(build_graph(OXIDE))
        for name in "ab"
    )
    assert b["uncertainty"] == pytest.approx(2.5 * a["uncertainty"])
    assert b["prediction"] == a["prediction"]


def test_one_member_has_no_uncertainty(tmp_path):
    write_model(tmp_path / "m", n_members=1)
    model = CGCNNModel("m", "energy_per_atom").load_from_checkpoint(tmp_path / "m")
    assert model.predict(build_graph(ALLOY))["uncertainty"] is None
    assert model.predict_many([build_graph(ALLOY)])[1] is None


def test_many_equals_one_by_one_in_any_form_and_batch(model):
    graphs = [build_graph(s) for s in (ALLOY, OXIDE, PEROVSKITE)]
    graph_repr, _ = extract_structure_features(ALLOY, 8.0, max_neighbors=12)
    forms = [graph_repr, pack_graph(graphs[1]), graphs[2]]
    alone = [model.predict(graph)["prediction"] for graph in graphs]
    for batch_size in (1, 2, 100):
        mean, std = model.predict_many(forms, batch_size=batch_size)
        np.testing.assert_allclose(mean, alone, atol=1e-5)
        assert std.shape == (3,)
    again, _ = model.predict_many(forms, batch_size=100)
    np.testing.assert_array_equal(again, mean)


def test_no_graphs_give_no_predictions(model):
    mean, std = model.predict_many([])
    assert mean.shape == std.shape == (0,)


def test_unseen_elements_are_flagged(model):
    copper = ALLOY.copy()
    copper.replace_species({"Au": "Pd"})
    assert model.predict(build_graph(ALLOY))["out_of_domain"] is False
    answer = model.predict(build_graph(copper))
    assert answer["out_of_domain"] is True
    assert answer["unseen_elements"] == ["Pd"]


def test_without_weights_the_error_says_how_to_get_them():
    model = CGCNNModel("cgcnn_bandgap_v1", target_property="bandgap")
    with pytest.raises(MissingDependencyError, match="train_cgcnn_model"):
        model.predict(build_graph(ALLOY))
    assert model.n_members == 0


@pytest.mark.parametrize("changes", [{"cutoff_radius": 7.0}, {"max_neighbors": 8}])
def test_graphs_of_another_kind_are_refused(model, changes):
    with pytest.raises(InputError, match="needs graphs"):
        model.predict(build_graph(ALLOY, **changes))


def test_equal_models_have_equal_files(tmp_path):
    assert write_model(tmp_path / "a") == write_model(tmp_path / "b")
    assert write_model(tmp_path / "c", n_train=8) != write_model(tmp_path / "a")


def test_a_checkpoint_brings_its_own_sizes_and_card(model):
    assert model.architecture == ARCHITECTURE
    assert model.card.elements == (8, 22, 29, 38, 79)
    assert model.n_members == 3


def test_a_checkpoint_of_another_property_is_refused(tmp_path):
    write_model(tmp_path / "m")
    with pytest.raises(InputError, match="not bandgap"):
        CGCNNModel("m", "bandgap").load_from_checkpoint(tmp_path / "m")


def test_a_missing_checkpoint_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        CGCNNModel("m", "bandgap").load_from_checkpoint(tmp_path / "m")


def test_changed_checkpoints_are_noticed(tmp_path):
    write_model(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    for position in (12, len(data) // 2, len(data) - 3):
        broken = bytearray(data)
        broken[position] ^= 1
        with pytest.raises(CorruptArtifactError):
            CGCNNModel("m", "energy_per_atom").load_bytes(bytes(broken))
    with pytest.raises(CorruptArtifactError, match="checksum"):
        CGCNNModel("m", "energy_per_atom").load_bytes(data, sha256="0" * 64)


def test_pickled_weights_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the file was unpickled",))

    torch.save({"state_dict": Bomb()}, tmp_path / "m.pth")
    with pytest.raises(CorruptArtifactError, match="safetensors"):
        CGCNNModel("m", "bandgap").load_from_checkpoint(tmp_path / "m.pth")


def test_atom_features_tell_all_elements_apart():
    table = atom_features()
    assert np.isfinite(table).all()
    assert not table[0].any()
    assert len(np.unique(table[1:104], axis=0)) == 103
