from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from pymatgen.core import Lattice, Structure
from safetensors.numpy import load_file

from nanoos_fw.crystals import encode_structure
from nanoos_fw.errors import CorruptArtifactError, InputError, OutOfTimeError
from nanoos_fw.firetasks.featurization import FeatureParameters
from nanoos_fw.ml.angles import build_angles, edge_vectors
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn import CGCNNModel
from nanoos_fw.ml.datasets import (
    DatasetConfig,
    build_regression_dataset,
    graph_digests,
    open_dataset,
    write_dataset,
)
from nanoos_fw.ml.features import extract_structure_features, featurize_arrays
from nanoos_fw.ml.featurizing import FeatureGuard, FeaturizingChild, _packed
from nanoos_fw.ml.graphs import build_graph, pack_graph, read_arrays, unpack_graph
from nanoos_fw.ml.line_graph import (
    LineGraphTable,
    line_graphs_of,
    line_graphs_of_crystals,
    with_angles,
)
from nanoos_fw.ml.line_graph_model import LineGraphModel
from nanoos_fw.ml.model_files import (
    Architecture,
    LineGraphArchitecture,
    ModelCard,
    atom_features,
    save_checkpoint,
)
from nanoos_fw.ml.network import TensorBatch, build_network
from nanoos_fw.ml.predictors import PropertyModel, open_model
from nanoos_fw.ml.screening import predict_in_chunks
from nanoos_fw.ml.training import TrainingConfig, TrainingResult, main, with_parent
from nanoos_fw.parallel import Communicator, StopRequest
from nanoos_fw.provenance import sha256_bytes

SIZES = LineGraphArchitecture(
    kind="line_graph",
    hidden_dim=12,
    angle_layers=2,
    atom_layers=1,
    gaussian_max=5.0,
    angle_cutoff=3.6,
)
FACES = [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
PEROVSKITE = Structure(
    Lattice.cubic(3.9),
    ["Sr", "Ti", "O", "O", "O"],
    [[0, 0, 0], [0.5, 0.5, 0.5], *FACES],
)
IRON = Structure(Lattice.cubic(2.87), ["Fe", "Fe"], [[0] * 3, [0.5] * 3])
LOW = Structure(
    Lattice([[3.9, 0, 0], [0.3, 4.1, 0], [-0.2, 0.1, 4.4]]),
    ["Ti", "O", "O"],
    [[0.02, 0, 0], [0.5, 0.48, 0.1], [0.1, 0.5, 0.53]],
)
ALL = [PEROVSKITE, IRON, LOW]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only get slower with more, the more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def table_of(crystals, sizes=SIZES) -> LineGraphTable:
    table, _, errors = line_graphs_of_crystals(
        crystals, cutoff_radius=sizes.gaussian_max, angle_cutoff=sizes.angle_cutoff
    )
    assert errors == {}
    return table


def network(seed=0, sizes=SIZES):
    generator = torch.Generator().manual_seed(seed)
    net = build_network(sizes, atom_features())
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else 0.4 * noise)
    return net.double().eval()


def run(net, table, rows=None):
    rows = np.arange(len(table)) if rows is None else rows
    with torch.inference_mode():
        return net(TensorBatch.from_batch(table.batch(rows), torch.float64)).numpy()


def write_model(path, seeds=(0, 1), sizes=SIZES):
    card = ModelCard(
        target_property="energy_per_atom",
        unit="eV/atom",
        target_mean=-3.0,
        target_std=2.0,
        n_members=len(seeds),
        architecture=sizes,
        cutoff_radius=5.0,
        max_neighbors=None,
        elements=(8, 22, 26, 38),
        dataset_hash="0",
        n_train=3,
    )
    states = [network(seed).float().state_dict() for seed in seeds]
    return save_checkpoint(path, card, states, atom_features(), np.zeros(119))


def packed(crystals, cutoff=5.0):
    """As the feature store has them."""
    flat, _ = read_arrays([encode_structure(crystal) for crystal in crystals])
    made = featurize_arrays(flat, cutoff, None, vectors=True)
    return [graph for graph, _ in made]


def test_packed_graphs_keep_vectors(tmp_path):
    parameters = {"cutoff_radius": 5.0, "max_neighbors": None, "vectors": True}
    encoded = {str(i): encode_structure(crystal) for i, crystal in enumerate(ALL)}
    with FeaturizingChild(parameters, FeatureGuard()) as child:
        stored = {one.key: one.graph for one in child.featurize(encoded)}
    together = packed(ALL)
    alone = [_packed(s, parameters, FeatureGuard())[0] for s in ALL]
    # However they are computed, the bytes are the same.
    assert [stored[str(i)] for i in range(3)] == together == alone
    table, expected = with_angles(GraphTable.from_packed(alone), 3.6), table_of(ALL)
    np.testing.assert_array_equal(table.vectors, expected.vectors)
    one_by_one = GraphTable.from_graphs([unpack_graph(blob) for blob in alone])
    np.testing.assert_array_equal(one_by_one.vectors, expected.vectors)
    assert pack_graph(unpack_graph(alone[0]), vectors=True) == alone[0]
    # Their first columns are those of graphs without.
    plain = GraphTable.from_packed([
        pack_graph(build_graph(s, cutoff_radius=5.0, max_neighbors=None)) for s in ALL
    ])  # fmt: skip
    assert plain.vectors is None
    for name in ("numbers", "degrees", "neighbors", "distances", "edge_start"):
        np.testing.assert_array_equal(getattr(table, name), getattr(plain, name))
    with pytest.raises(InputError, match="do not hold"):
        with_angles(plain, 3.6)
    # Whoever asked before there were vectors finds the same features.
    assert FeatureParameters().model_dump() == {
        "cutoff_radius": 8.0,
        "max_neighbors": 12,
    }
    assert FeatureParameters(vectors=True).model_dump()["vectors"] is True
    # And a dataset keeps them on its way to a training, whichever form they came in.
    config = DatasetConfig(target_property="x", min_samples=3, train_fraction=0.7,
                           val_fraction=0.3, test_fraction=0.0)  # fmt: skip
    targets = {"0": 1.0, "1": 2.0, "2": 3.0}
    blobs = dict(zip(targets, alone, strict=True))
    graphs = {name: unpack_graph(blob) for name, blob in blobs.items()}
    manifests = [
        write_dataset(build_regression_dataset(given, targets, config), tmp_path / name)
        for name, given in (("packed", blobs), ("graphs", graphs))
    ]
    assert manifests[0] == manifests[1]
    written = open_dataset(tmp_path / "packed")
    np.testing.assert_array_equal(written.graphs.vectors, expected.vectors)
    assert graph_digests(written.graphs) == [sha256_bytes(blob) for blob in alone]
    # One without vectors in the same place leaves none behind.
    bare = {name: pack_graph(graph) for name, graph in graphs.items()}
    other = write_dataset(
        build_regression_dataset(bare, targets, config), tmp_path / "packed"
    )
    assert other["dataset_hash"] != manifests[0]["dataset_hash"]
    assert open_dataset(tmp_path / "packed").graphs.vectors is None
    assert not (tmp_path / "packed" / "vectors.npy").exists()


@pytest.mark.parametrize("crystal", ALL)
def test_pairs_and_cosines_are_those_of_the_angles(crystal):
    graph = build_graph(crystal, cutoff_radius=3.6, max_neighbors=None)
    found = build_angles(graph, edge_vectors(graph, crystal.frac_coords))
    batch = table_of([crystal]).batch([0])
    assert batch.edge_pairs.shape == (2, 2 * found.edge_pairs.shape[1])
    # The order of edges differs with the cutoff: compare distances and cosines.
    ends = np.sort(batch.distances[batch.edge_pairs], axis=0)
    mine = np.stack([*ends, batch.cosines])
    both = np.sort(graph.distances[found.edge_pairs], axis=0)
    theirs = np.repeat(np.stack([*both, np.cos(found.angles)]), 2, axis=1)
    for rows in (mine, theirs):
        rows[:] = rows[:, np.lexsort(np.round(rows, 4))]
    np.testing.assert_allclose(mine, theirs, atol=2e-4)
    assert (np.diff(batch.edge_pairs[0]) >= 0).all()


def test_tables_select_and_join_rows():
    many = [ALL[i % 3] for i in range(70)]  # more than are built at once
    table = table_of(many)
    assert len(table) == 70
    picked = table.select([68, 1])
    whole, part = table.batch([68, 1]), picked.batch([0, 1])
    for name, array in vars(whole).items():
        np.testing.assert_array_equal(getattr(part, name), array)
    plain = GraphTable.from_graphs(
        [build_graph(s, cutoff_radius=5.0, max_neighbors=None) for s in ALL]
    )
    np.testing.assert_array_equal(table.select([0, 1, 2]).distances, plain.distances)


def test_crystals_without_a_graph_are_told():
    lonely = Structure(Lattice.cubic(20), ["Fe"], [[0] * 3])
    table, positions, errors = line_graphs_of_crystals(
        [IRON, lonely, {"sites": 1}, LOW.as_dict()], cutoff_radius=5.0, angle_cutoff=3.6
    )
    assert positions.tolist() == [0, 3]
    assert sorted(errors) == [1, 2]
    expected = table_of([IRON, LOW])
    np.testing.assert_array_equal(table.vectors, expected.vectors)
    nothing, _, errors = line_graphs_of_crystals(
        [lonely], cutoff_radius=5.0, angle_cutoff=3.6
    )
    assert nothing is None
    assert list(errors) == [0]


def test_the_network_equals_its_formula_written_atom_by_atom():
    net = network(3)
    state = {name: tensor.double() for name, tensor in net.state_dict().items()}
    table = table_of([LOW])
    batch = table.batch([0])
    d = torch.from_numpy(batch.distances).double()
    i, j = (torch.from_numpy(row) for row in batch.edge_index)

    def linear(name, x):
        y = x @ state[f"{name}.weight"].T
        return y + state[f"{name}.bias"] if f"{name}.bias" in state else y

    def norm(name, x):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[
            f"{name}.bias"
        ]

    def embed(name, x, centers, width):
        x = torch.exp(-(((x[:, None] - centers) / width) ** 2))
        return linear(f"{name}.2", torch.nn.functional.silu(linear(f"{name}.0", x)))

    def fade(x, cutoff):
        return torch.where(x < cutoff, 0.5 * (torch.cos(np.pi * x / cutoff) + 1), 0.0)

    def convolve(name, nodes, edges, centre, other, factor):
        new_nodes, new_edges = [], []
        z = torch.stack([
            linear(f"{name}.edge_gate", edges[e])
            + linear(f"{name}.centre_gate", nodes[centre[e]])
            + linear(f"{name}.neighbor_gate", nodes[other[e]])
            for e in range(len(edges))
        ])  # fmt: skip
        for node in range(len(nodes)):
            above = torch.zeros(12, dtype=torch.float64)
            below = torch.zeros(12, dtype=torch.float64)
            for e in torch.nonzero(centre == node)[:, 0].tolist():
                gate = torch.sigmoid(z[e]) * factor[e]
                above += gate * linear(f"{name}.message", nodes[other[e]])
                below += gate
            new = linear(f"{name}.own", nodes[node]) + above / (below + 1e-3)
            new_nodes.append(new)
        silu = torch.nn.functional.silu
        new_nodes = nodes + silu(norm(f"{name}.node_norm", torch.stack(new_nodes)))
        new_edges = edges + silu(norm(f"{name}.edge_norm", z))
        return new_nodes, new_edges

    atoms = linear("atoms", torch.from_numpy(atom_features()[batch.numbers]).double())
    bonds = embed("bonds", d, torch.arange(26).double() * 0.2, 0.3)
    pairs = torch.from_numpy(batch.edge_pairs)
    centers = torch.linspace(-1, 1, 20).double()
    angles = embed("angles", torch.from_numpy(batch.cosines).double(), centers, 2 / 19)
    short = fade(d, 3.6)
    for layer in range(3):
        if layer < 2:
            bonds, angles = convolve(
                f"on_bonds.{layer}", bonds, angles, *pairs,
                short[pairs[0]] * short[pairs[1]],
            )  # fmt: skip
        atoms, bonds = convolve(f"on_atoms.{layer}", atoms, bonds, i, j, fade(d, 5.0))
    expected = float(linear("output", atoms.mean(0)))
    assert run(net, table)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("crystal", ALL)
def test_predictions_are_invariant(crystal):
    net = network(1)
    expected = run(net, table_of([crystal]))[0]
    rng = np.random.default_rng(0)
    shifted = crystal.copy()
    shifted.translate_sites(range(len(crystal)), rng.uniform(size=3))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotated = Structure(
        Lattice(crystal.lattice.matrix @ rotation), crystal.species, crystal.frac_coords
    )
    permuted = Structure.from_sites([crystal[i] for i in rng.permutation(len(crystal))])
    others = [shifted, rotated, permuted, crystal * (2, 1, 2)]
    np.testing.assert_allclose(run(net, table_of(others)), expected, atol=2e-5)


def test_angles_decide_something():
    net, table = network(1), table_of([LOW])
    batch = TensorBatch.from_batch(table.batch([0]), torch.float64)
    bent = TensorBatch(**{**vars(batch), "cosines": -batch.cosines})
    with torch.inference_mode():
        assert abs(float(net(batch)) - float(net(bent))) > 2e-4
    plain = TensorBatch(**{**vars(batch), "cosines": None})
    with pytest.raises(InputError, match="without angles"):
        net(plain)


@pytest.mark.parametrize("cutoff", [5.0, 3.6])
def test_nothing_jumps_where_a_neighbour_comes_into_reach(cutoff):
    net = network(2)
    a = cutoff * np.array([1 - 1e-6, 1 + 1e-6])  # the shell at the lattice constant
    cells = [Structure(Lattice.cubic(x), ["Fe", "O"], [[0] * 3, [0.5] * 3]) for x in a]
    inside, outside = (table_of([cell]) for cell in cells)
    if cutoff == 5.0:
        assert len(inside.distances) > len(outside.distances)
    else:
        pairs = [t.batch([0]).edge_pairs.shape[1] for t in (inside, outside)]
        assert pairs[0] > pairs[1]
    assert run(net, inside)[0] == pytest.approx(run(net, outside)[0], abs=1e-4)


def test_models_predict_from_structures_and_their_features(tmp_path):
    digest = write_model(tmp_path / "m")
    model = open_model(tmp_path / "m", model_name="angles", sha256=digest)
    assert isinstance(model, LineGraphModel)
    assert isinstance(model, PropertyModel)
    reprs = [extract_structure_features(s, 5.0, None)[0] for s in ALL]
    mean, std = model.predict_many(reprs)
    outputs = np.array([run(network(seed), table_of(ALL)) for seed in (0, 1)])
    np.testing.assert_allclose(mean, -3 + 2 * outputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, 2 * outputs.std(0, ddof=1), rtol=1e-3)
    found, positions, errors = model.predict_crystals([s.as_dict() for s in ALL])
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    assert (positions.tolist(), errors) == ([0, 1, 2], {})
    answer = model.predict(reprs[0])
    assert answer["model_type"] == "LineGraph"
    assert answer["prediction"] == pytest.approx(mean[0], rel=1e-6)
    assert answer["out_of_domain"] is False


def test_graphs_that_do_not_do_are_refused(tmp_path):
    write_model(tmp_path / "m")
    model = open_model(tmp_path / "m")
    graph = build_graph(LOW, cutoff_radius=5.0, max_neighbors=None)
    for form in (graph, pack_graph(graph, geometry=True)):
        with pytest.raises(InputError, match="vectors"):
            model.predict(form)
    with pytest.raises(InputError, match="which of equally far neighbours"):
        model.predict(extract_structure_features(LOW, 5.0, 12)[0])
    turned = extract_structure_features(LOW, 5.0, None)[0]
    turned["vectors"] = turned["vectors"][::-1]
    with pytest.raises(InputError, match="not those of its edges"):
        line_graphs_of([turned], angle_cutoff=3.6)
    good = packed([LOW])
    with pytest.raises(InputError, match="beyond the cutoff"):
        line_graphs_of(good, angle_cutoff=5.5)
    with pytest.raises(InputError, match="with and without"):
        line_graphs_of([*good, pack_graph(graph)], angle_cutoff=3.6)
    with pytest.raises(CorruptArtifactError):
        line_graphs_of([good[0][:-4]], angle_cutoff=3.6)
    with pytest.raises(CorruptArtifactError, match="not a CGCNN"):
        CGCNNModel("m", "energy_per_atom").load_from_checkpoint(tmp_path / "m")


def test_cards_tell_the_architectures_apart():
    fields = {
        "target_property": "x", "unit": "", "target_mean": 0.0, "target_std": 1.0,
        "n_members": 1, "cutoff_radius": 5.0, "max_neighbors": None, "elements": (1,),
        "dataset_hash": "", "n_train": 1,
    }  # fmt: skip
    for sizes in (SIZES, Architecture(hidden_dim=9)):
        card = ModelCard(**fields, architecture=sizes)
        again = ModelCard.model_validate_json(card.model_dump_json())
        assert again.architecture == sizes


ANGLE = "angle"
CRYSTALS = {}
for _number in range(20):
    _crystal = LOW.copy()
    _crystal.perturb(0.15, seed=_number)
    CRYSTALS[f"s{_number:02d}"] = _crystal
SMALL = {
    "target": ANGLE,
    "model_type": "line_graph",
    "hidden_dim": 12,
    "num_layers": 3,
    "angle_layers": 2,
    "angle_cutoff": 3.6,
    "epochs": 4,
    "batch_size": 5,
    "ensemble_size": 2,
    "weight_decay": 0.0,
    "element_reference": False,
    "learning_rate": 0.01,
    "averaging_epochs": 1.0,
    "forest_baseline": False,
}


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    """Write what no sum over single distances can tell: the smallest angle."""
    table = table_of(list(CRYSTALS.values()))
    names = list(CRYSTALS)
    targets = {
        name: 10 * float(table.batch([row]).cosines.max())
        for row, name in enumerate(names)
    }
    graphs = dict(zip(names, packed(list(CRYSTALS.values())), strict=True))
    config = DatasetConfig(target_property=ANGLE, train_fraction=0.6,
                           val_fraction=0.2, test_fraction=0.2, unit="")  # fmt: skip
    directory = tmp_path_factory.mktemp("angles")
    write_dataset(build_regression_dataset(graphs, targets, config), directory)
    return directory


class StopAfter(StopRequest):
    """Asks to stop at the n-th question."""

    def __init__(self, questions):
        super().__init__()
        self.left = questions

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0


def train(dataset_dir, work_dir, stop=None, parent=None, **changes):
    work_dir.mkdir(exist_ok=True)
    config = TrainingConfig(**{**SMALL, **changes})
    if parent is not None:
        config = with_parent(config, parent)
    answer = main(
        {
            "config": config.model_dump(mode="json"),
            "dataset_dir": str(dataset_dir),
            "threads": 1,
            "parent": None if parent is None else str(parent),
        },
        work_dir,
        Communicator(),
        stop or StopRequest(),
    )
    return TrainingResult(**json.loads(json.dumps(answer, allow_nan=False)))


def test_the_training_loop_of_all_networks_learns_angles(dataset_dir, tmp_path):
    result = train(dataset_dir, tmp_path / "work", epochs=120, ensemble_size=1)
    spread = open_dataset(dataset_dir).targets.std()
    assert result.metrics["train"]["mae"] < 0.2 * spread
    assert result.metrics["test"]["mae"] < 0.7 * result.baselines["mean"]["test"]["mae"]


def test_a_training_of_angles_resumes_bit_for_bit_and_its_model_predicts(
    dataset_dir, tmp_path
):
    changes = {"dropout": 0.2}
    whole = train(dataset_dir, tmp_path / "whole", **changes)
    parts = tmp_path / "parts"
    for questions in (3, 5):  # in the middle of an epoch, twice
        with pytest.raises(OutOfTimeError):
            train(dataset_dir, parts, StopAfter(questions), **changes)
    resumed = train(dataset_dir, parts, **changes)
    assert resumed.checkpoint_sha256 == whole.checkpoint_sha256
    assert resumed.curves == whole.curves
    assert resumed.predictions == whole.predictions
    model = open_model(Path(whole.checkpoint), sha256=whole.checkpoint_sha256)
    assert isinstance(model, LineGraphModel)
    rows = whole.predictions["test"]
    crystals = [CRYSTALS[row["structure_id"]] for row in rows]
    reprs = [extract_structure_features(s, 5.0, None)[0] for s in crystals]
    for graphs in (packed(crystals), reprs):  # as the store has them, and as made now
        found = model.predict_full(graphs)
        for name in ("mean", "std"):
            expected = [row[name] for row in rows]
            np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-4)
        assert found.distance is not None
    # Screening takes packed graphs.
    ids = [row["structure_id"] for row in rows]
    pairs = zip(ids, packed(crystals), strict=True)
    screened = [row for chunk in predict_in_chunks(model, pairs, 2) for row in chunk]
    np.testing.assert_allclose(
        [row["mean"] for row in screened], [row["mean"] for row in rows], rtol=1e-5
    )
    # It can be trained further; sizes that are not given are its own.
    later = train(
        dataset_dir, tmp_path / "later", parent=Path(whole.checkpoint), epochs=1,
        freeze=("on_bonds.0",),
    )  # fmt: skip
    assert later.config.angle_layers == 2
    before, after = (
        load_file(path) for path in (whole.checkpoint, later.last_checkpoint)
    )
    same = {n for n in after if "members" in n and np.array_equal(before[n], after[n])}
    assert {n for n in same if ".on_bonds.0." in n}
    assert not {n for n in same if ".on_bonds.1." in n and "gate.weight" in n}
    with pytest.raises(InputError, match="angle_cutoff is 3"):
        train(dataset_dir, tmp_path / "x", parent=Path(whole.checkpoint),
              angle_cutoff=3.0)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"readout_dim": 3},
        {"angle_layers": 4},
        {"precision": "bfloat16"},
        {"model_type": "cgcnn"},
    ],
)
def test_configs_that_contradict_the_kind_of_network_are_refused(change):
    with pytest.raises(ValidationError):
        TrainingConfig(**{**SMALL, **change})


def test_datasets_without_angles_are_refused(dataset_dir, tmp_path):
    dataset = open_dataset(dataset_dir)
    bare = {
        name: build_graph(CRYSTALS[name], cutoff_radius=5.0, max_neighbors=12)
        for name in dataset.ids
    }
    targets = dict(zip(dataset.ids, dataset.targets.tolist(), strict=True))
    other = build_regression_dataset(bare, targets, dataset.config)
    write_dataset(other, tmp_path / "bare")
    with pytest.raises(InputError, match="--vectors"):
        train(tmp_path / "bare", tmp_path / "work")


def test_a_batch_without_angles_can_be_trained_on():
    net = network(0).train()
    table = with_angles(GraphTable.from_packed(packed(ALL)), 0.1)
    output = net(TensorBatch.from_batch(table.batch([0, 1, 2]), torch.float64))
    output.sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert torch.isfinite(output).all()
