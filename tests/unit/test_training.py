from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from pymatgen.core import Lattice, Structure
from safetensors.numpy import load_file
from torch.nn import functional

from nanoos_fw.errors import CorruptArtifactError, InputError, OutOfTimeError
from nanoos_fw.ml import training_plan
from nanoos_fw.ml.cgcnn import CGCNNModel
from nanoos_fw.ml.datasets import (
    DatasetConfig,
    build_regression_dataset,
    write_dataset,
)
from nanoos_fw.ml.ensembles import state_of
from nanoos_fw.ml.fitting import Fit
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.ml.metrics import (
    calibrate,
    classification_metrics,
    fit_element_reference,
    regression_metrics,
)
from nanoos_fw.ml.model_files import (
    ATOM_TABLE,
    REFERENCE,
    read_checkpoint,
    save_checkpoint,
)
from nanoos_fw.ml.network import GlobalBatchNorm, _GlobalNormalization
from nanoos_fw.ml.teams import share
from nanoos_fw.ml.training import (
    TrainingConfig,
    TrainingResult,
    main,
    train_cgcnn_model,
    with_parent,
)
from nanoos_fw.ml.training_config import training_key
from nanoos_fw.parallel import Communicator, StopRequest
from nanoos_fw.provenance import sha256_file

TARGET = "formation_energy_per_atom"
SMALL = {
    "target": TARGET,
    "epochs": 6,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "hidden_dim": 8,
    "num_layers": 2,
    "readout_dim": 8,
    "gaussian_step": 0.5,
    "ensemble_size": 2,
    "checkpoint_every": 2,
    "forest_baseline": False,
}


def structures() -> dict[str, Structure]:
    rng = np.random.default_rng(7)
    made = {}
    for i in range(36):
        a, b = rng.choice(["Al", "Ni", "Ti", "Fe"], 2, replace=False)
        cell = Lattice.tetragonal(2.8 + 0.6 * rng.random(), 2.8 + 0.6 * rng.random())
        structure = Structure(cell, [a, b], [[0, 0, 0], [0.5, 0.5, 0.5]])
        made[f"s{i:02d}"] = structure * ((2, 1, 1) if i % 3 == 0 else (1, 1, 1))
    return made


GRAPHS = {name: build_graph(s) for name, s in structures().items()}
# Depends on geometry and on elements, smoothly.
TARGETS = {
    name: float(graph.distances[:8].mean() + 0.01 * graph.numbers.std())
    for name, graph in GRAPHS.items()
}


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dataset")
    config = DatasetConfig(
        target_property=TARGET, train_fraction=0.7, val_fraction=0.2, test_fraction=0.1
    )
    write_dataset(build_regression_dataset(GRAPHS, TARGETS, config), directory)
    return directory


class StopAfter(StopRequest):
    """Asks to stop at the n-th question."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.left = questions

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def train(dataset_dir, work_dir, stop=None, pause_after=None, parent=None, **changes):
    work_dir.mkdir(exist_ok=True)
    config = {
        "config": TrainingConfig(**{**SMALL, **changes}).model_dump(mode="json"),
        "dataset_dir": str(dataset_dir),
        "threads": 1,
        "pause_after": pause_after,
        "parent": parent,
    }
    result = main(config, work_dir, Communicator(), stop or StopRequest())
    json.dumps(result, allow_nan=False)  # must be able to cross the process boundary
    return TrainingResult(**result)


def test_training_learns_and_reports(dataset_dir, tmp_path):
    result = train(dataset_dir, tmp_path, epochs=30)
    for part in ("train", "val", "test"):
        baseline = result.baselines["mean"][part]["mae"]
        assert result.metrics[part]["mae"] < 0.6 * baseline
    assert result.unit == "eV/atom"
    curve = result.curves[1]
    assert curve.epochs == len(curve.val_mae) == 30
    assert curve.val_mae[curve.best_epoch - 1] == min(curve.val_mae)
    assert curve.train_loss[-1] < 0.3 * curve.train_loss[0]
    rows = result.predictions["test"]
    errors = [abs(row["mean"] - row["target"]) for row in rows]
    assert np.mean(errors) == pytest.approx(result.metrics["test"]["mae"])
    model = CGCNNModel("m", TARGET).load_from_checkpoint(
        result.checkpoint, sha256=result.checkpoint_sha256
    )
    mean, std = model.predict_many([GRAPHS[row["structure_id"]] for row in rows])
    np.testing.assert_allclose(mean, [row["mean"] for row in rows], atol=1e-6)
    np.testing.assert_allclose(std, [row["std"] for row in rows], atol=1e-6)
    assert model.card.dataset_hash == result.dataset_hash
    assert set(model.card.elements) == {13, 22, 26, 28}


def test_seed_decides_everything(dataset_dir, tmp_path):
    one = train(dataset_dir, tmp_path / "1")
    two = train(dataset_dir, tmp_path / "2")
    other = train(dataset_dir, tmp_path / "3", seed=1)
    assert one.checkpoint_sha256 == two.checkpoint_sha256
    assert one.curves == two.curves
    assert other.checkpoint_sha256 != one.checkpoint_sha256
    assert one.curves[0].train_loss != one.curves[1].train_loss


def test_training_leaves_the_global_random_state_alone(dataset_dir, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    train(dataset_dir, tmp_path, epochs=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "dropout": 0.3},
        {"optimizer": "sgd", "schedule": "step", "milestones": (2,), "clip_norm": 0.5},
        {"optimizer": "adam", "schedule": "one-cycle", "precision": "bfloat16"},
    ],
)
@pytest.mark.parametrize("questions", [0, 4, 9, 25])
def test_a_resumed_training_equals_an_uninterrupted_one(
    dataset_dir, tmp_path, questions, changes
):
    changes = {**changes, "epochs": 5}
    whole = train(dataset_dir, tmp_path / "whole", **changes)
    parts = tmp_path / "parts"
    with pytest.raises(OutOfTimeError) as stopped:
        train(dataset_dir, parts, StopAfter(questions), **changes)
    steps = 3  # 25 training rows in batches of about 8
    assert stopped.value.evidence == {
        "member": questions // (5 * steps),
        "epochs": questions % (5 * steps) // steps,
        "step": questions % steps,
    }
    resumed = train(dataset_dir, parts, **changes)
    assert resumed.checkpoint_sha256 == whole.checkpoint_sha256
    assert resumed.curves == whole.curves
    assert resumed.predictions == whole.predictions


def test_a_killed_training_resumes_from_the_last_checkpoint(
    dataset_dir, tmp_path, monkeypatch
):
    whole = train(dataset_dir, tmp_path / "whole")
    run_epoch = Fit.run_epoch

    def dies(self, interrupted, after_step):
        if (self.member, self.history.epochs) == (1, 5):
            raise KeyboardInterrupt
        return run_epoch(self, interrupted, after_step)

    monkeypatch.setattr(Fit, "run_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        train(dataset_dir, tmp_path / "parts")
    epochs = []

    def counts(self, interrupted, after_step):
        epochs.append((self.member, self.history.epochs))
        return run_epoch(self, interrupted, after_step)

    monkeypatch.setattr(Fit, "run_epoch", counts)
    resumed = train(dataset_dir, tmp_path / "parts")
    assert epochs == [(1, 4), (1, 5)]  # checkpoint_every = 2
    assert resumed.checkpoint_sha256 == whole.checkpoint_sha256


def test_checkpoints_go_by_the_clock_within_an_epoch_too(
    dataset_dir, tmp_path, monkeypatch
):
    changes = {"checkpoint_every": 100, "epochs": 4, "ensemble_size": 1}
    whole = train(dataset_dir, tmp_path / "whole", **changes)
    step = Fit._step

    def dies(self, rows, number, rate):
        if number == 8:  # the last of three steps of the third epoch
            raise KeyboardInterrupt
        return step(self, rows, number, rate)

    monkeypatch.setattr(Fit, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(dataset_dir, tmp_path / "parts", checkpoint_minutes=0, **changes)
    names = sorted(path.name for path in (tmp_path / "parts").glob("member0-*"))
    assert [name[:26] for name in names] == [
        "member0-epoch00002-step000001"[:26],
        "member0-epoch00002-step000002"[:26],
    ]
    numbers = []

    def counts(self, rows, number, rate):
        numbers.append(number)
        return step(self, rows, number, rate)

    monkeypatch.setattr(Fit, "_step", counts)
    resumed = train(dataset_dir, tmp_path / "parts", checkpoint_minutes=0, **changes)
    assert numbers == [8, 9, 10, 11]
    assert model_bytes(resumed) == model_bytes(whole)


def model_bytes(result):
    """All weights of a model; its file also tells of the configuration."""
    return {
        name: value.tobytes() for name, value in load_file(result.checkpoint).items()
    }


def test_finished_members_are_never_fitted_again(dataset_dir, tmp_path, monkeypatch):
    first = train(dataset_dir, tmp_path)
    monkeypatch.setattr(Fit, "run_epoch", lambda *_: pytest.fail("fitted again"))
    assert train(dataset_dir, tmp_path).checkpoint_sha256 == first.checkpoint_sha256


def test_a_changed_checkpoint_falls_back_to_the_one_before(
    dataset_dir, tmp_path, caplog
):
    whole = train(dataset_dir, tmp_path)
    files = sorted(tmp_path.glob("member1-*"))
    assert len(files) == 2
    data = files[1].read_bytes()
    files[1].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with caplog.at_level("WARNING"):
        again = train(dataset_dir, tmp_path)
    assert files[1].name in caplog.text
    assert again.checkpoint_sha256 == whole.checkpoint_sha256
    for path in tmp_path.glob("member1-*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptArtifactError, match="member 1"):
        train(dataset_dir, tmp_path)


def test_a_damaged_checkpoint_is_none_of_those_that_stay(dataset_dir, tmp_path):
    with pytest.raises(OutOfTimeError):
        train(dataset_dir, tmp_path, StopAfter(6 * 3 + 3 * 3 + 1))
    (last,) = tmp_path.glob("member1-epoch00003-step000001-*")
    last.write_bytes(last.read_bytes()[:100])
    train(dataset_dir, tmp_path, pause_after=4)
    kept = sorted(tmp_path.glob("member1-*.safetensors"))
    assert [path.name[:18] for path in kept] == [
        "member1-epoch00002", "member1-epoch00004",
    ]  # fmt: skip
    assert all(sha256_file(path) in path.name for path in kept)


def test_as_many_checkpoints_stay_as_asked_for(dataset_dir, tmp_path):
    train(dataset_dir, tmp_path, keep_checkpoints=1)
    assert len(list(tmp_path.glob("member*-*"))) == 2


def test_a_training_does_not_go_on_with_other_data_of_the_elements(
    dataset_dir, tmp_path, monkeypatch
):
    with pytest.raises(OutOfTimeError):
        train(dataset_dir, tmp_path, StopAfter(5))
    table = training_plan.atom_features()
    table[13, -1] += 0.1
    with monkeypatch.context() as changed:
        changed.setattr(training_plan, "atom_features", lambda: table)
        with pytest.raises(InputError, match="other data of the elements"):
            train(dataset_dir, tmp_path)
    train(dataset_dir, tmp_path, pause_after=1)


def test_a_work_directory_belongs_to_one_training(dataset_dir, tmp_path):
    train(dataset_dir, tmp_path, epochs=2)
    with pytest.raises(InputError, match="another training"):
        train(dataset_dir, tmp_path, epochs=2, seed=5)


def test_patience_stops_early_and_the_best_weights_stay(dataset_dir, tmp_path):
    options = {"epochs": 60, "learning_rate": 0.05, "schedule": "constant"}
    result = train(dataset_dir, tmp_path / "a", patience=4, ensemble_size=1, **options)
    curve = result.curves[0]
    assert curve.epochs == curve.best_epoch + 4 < 60
    # The validation metric is that of the best epoch, not of the last.
    assert result.metrics["val"]["mae"] == pytest.approx(min(curve.val_mae), rel=1e-5)
    assert curve.val_mae[-1] > min(curve.val_mae)


def test_a_linear_function_of_composition_is_learned_by_the_reference(tmp_path):
    # With a reference, adding such a function to all targets adds it to predictions.
    config = DatasetConfig(target_property=TARGET, val_fraction=0.2, test_fraction=0.0)
    slopes = np.zeros(119)
    slopes[[13, 22, 26, 28]] = (-3.0, 5.0, -8.0, 1.0)
    predictions = []
    for name, factor in (("plain", 0.0), ("tilted", 1.0)):
        tilt = {key: factor * slopes[g.numbers].mean() for key, g in GRAPHS.items()}
        targets = {key: TARGETS[key] + tilt[key] for key in TARGETS}
        dataset = build_regression_dataset(GRAPHS, targets, config)
        write_dataset(dataset, tmp_path / name)
        result = train(
            tmp_path / name,
            tmp_path / f"work_{name}",
            precision="float64",
            epochs=3,
            element_reference=True,
        )
        predictions.append(
            {
                r["structure_id"]: r["mean"] - tilt[r["structure_id"]]
                for r in result.predictions["val"]
            }
        )
    plain, tilted = predictions
    assert tilted == pytest.approx(plain, abs=1e-8)


def test_one_member_gives_no_uncertainty(dataset_dir, tmp_path):
    result = train(dataset_dir, tmp_path, epochs=1, ensemble_size=1)
    assert result.predictions["test"][0]["std"] is None
    assert "within_1_std" not in result.metrics["test"]


def test_uncertainty_is_calibrated_on_validation(dataset_dir, tmp_path):
    result = train(dataset_dir, tmp_path)
    assert result.metrics["val"]["within_1_std"] == pytest.approx(0.683, abs=0.15)
    assert result.uncertainty_scale != 1.0


def test_divergence_is_an_error_with_advice(dataset_dir, tmp_path):
    with pytest.raises(InputError, match="learning_rate") as caught:
        train(dataset_dir, tmp_path, learning_rate=1e30, warmup_fraction=0.0)
    assert "step" in str(caught.value)


@pytest.mark.parametrize("val", [0.2, 0.0])
def test_weights_that_the_last_step_broke_are_no_model(val, tmp_path):
    # Its loss is of the weights before it.
    config = DatasetConfig(
        target_property=TARGET, train_fraction=0.8, val_fraction=val,
        test_fraction=0.2 - val,
    )  # fmt: skip
    write_dataset(
        build_regression_dataset(GRAPHS, TARGETS, config), tmp_path / "dataset"
    )
    with pytest.raises(InputError, match="predictions are not finite"):
        train(tmp_path / "dataset", tmp_path / "work", epochs=1, batch_size=64,
              learning_rate=1e30, optimizer="sgd", schedule="constant",
              warmup_fraction=0.0)  # fmt: skip


def test_a_dataset_of_another_target_is_refused(dataset_dir, tmp_path):
    with pytest.raises(InputError, match="bandgap"):
        train(dataset_dir, tmp_path, target="bandgap")
    with pytest.raises(InputError, match="config is for"):
        train_cgcnn_model(
            "bandgap",
            TrainingConfig(target=TARGET),
            dataset_dir=dataset_dir,
            work_dir=tmp_path,
        )
    with pytest.raises(InputError, match="epoch"):
        train_cgcnn_model(
            TARGET, {"epoch": 3}, dataset_dir=dataset_dir, work_dir=tmp_path
        )


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"batch_size": 1}, {"epoch": 3}, {"optimizer": "lbfgs"}]
)
def test_bad_configs_are_refused(change):
    with pytest.raises(ValidationError):
        TrainingConfig(**{**SMALL, **change})


def test_rank_program_loads_no_database_and_no_queue():
    code = (
        "import sys, nanoos_fw.ml.training, nanoos_fw.ml.fitting; "
        "print([m for m in ('pymongo', 'fireworks', 'bson', 'gridfs') "
        "if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


# ----------------------------------------------------------------------- the pieces


class Size:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [2, 3, 7])
def test_shares_of_a_batch_are_a_partition_balanced_by_atoms(size):
    rng = np.random.default_rng(size)
    rows, sizes = rng.permutation(50)[:40], rng.integers(1, 20, 40)
    shares = [rows[share(sizes, Size(rank, size))] for rank in range(size)]
    assert sorted(np.concatenate(shares)) == sorted(rows)
    atoms = dict(zip(rows.tolist(), sizes.tolist(), strict=True))
    loads = [sum(atoms[row] for row in mine.tolist()) for mine in shares]
    assert max(loads) - min(loads) <= sizes.max()


def test_more_ranks_than_rows_leave_some_without():
    shares = [share(np.array([3, 3]), Size(rank, 3)) for rank in range(3)]
    assert [mine.tolist() for mine in shares] == [[0], [1], []]


def test_global_normalization_equals_torch_and_its_gradients():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Two inputs, of other lengths and widths, in one message each way.
    tensors = [random(9, 4) * 3 + 100, random(4), random(4)]
    tensors += [random(6, 3) - 7, random(3), random(3)]
    inputs = [t.requires_grad_() for t in tensors]

    def ours(*tensors):
        comm = Record()
        found = _GlobalNormalization.apply(comm, *tensors)[:2]
        assert comm.calls == 1
        return found

    def theirs(*tensors):
        return tuple(
            functional.batch_norm(x, None, None, weight, bias, training=True)
            for x, weight, bias in (tensors[:3], tensors[3:])
        )

    outward = [random(9, 4), random(6, 3)]
    for mine, reference in zip(ours(*inputs), theirs(*inputs), strict=True):
        torch.testing.assert_close(mine, reference)
    for mine, reference in zip(
        torch.autograd.grad(ours(*inputs), inputs, outward),
        torch.autograd.grad(theirs(*inputs), inputs, outward),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)
    assert torch.autograd.gradcheck(ours, inputs)


class Record(Communicator):
    """One rank that counts its sums."""

    calls = 0

    def sum_in_place(self, array):
        self.calls += 1


def test_global_normalization_is_exact_far_from_zero():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1)) + 1e4
    unit, zero = torch.ones(3), torch.zeros(3)
    found = _GlobalNormalization.apply(Communicator(), x, unit, zero)[0].double()
    double = x.double()
    exact = (double - double.mean(0)) / double.std(0, correction=0)
    torch.testing.assert_close(found, exact, atol=2e-3, rtol=0)


class Twin(Communicator):
    """Two ranks with the same rows: every sum doubles."""

    def __init__(self):
        super().__init__()
        self.size = 2

    def sum_in_place(self, array):
        array *= 2


def test_running_moments_count_the_rows_of_all_ranks():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    shared, alone = GlobalBatchNorm(3), torch.nn.BatchNorm1d(3)
    shared.comm = Twin()
    found, expected = shared(x), alone(torch.cat([x, x]))[:5]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(shared.running_mean, alone.running_mean)
    torch.testing.assert_close(shared.running_var, alone.running_var)


def test_metrics_equal_their_formulas():
    truth, mean = np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.0, 2.0])
    found = regression_metrics(truth, mean, np.array([0.6, 0.1, 1.1]))
    assert found == pytest.approx(
        {
            "n": 3,
            "mse": 4.25 / 3,
            "mae": 2.5 / 3,
            "rmse": (4.25 / 3) ** 0.5,
            "r2": 1 - 4.25 / (14 / 3),
            "within_1_std": 2 / 3,
            "within_2_std": 1.0,
        }
    )
    assert regression_metrics(truth[:0], mean[:0])["mae"] is None
    assert regression_metrics(truth[:1], mean[:1])["r2"] is None


def test_equal_values_have_no_r_squared():
    truth = np.full(3, 0.1)
    assert np.var(truth) > 0  # by rounding
    assert regression_metrics(truth, truth + 0.01)["r2"] is None


def test_element_reference_finds_exact_coefficients():
    rng = np.random.default_rng(0)
    fractions = np.zeros((20, 119))
    fractions[:, [3, 8, 26]] = rng.dirichlet([1, 1, 1], 20)
    slopes = np.zeros(119)
    slopes[[3, 8, 26]] = (-1.0, -5.0, -8.0)
    found = fit_element_reference(fractions, fractions @ slopes)
    np.testing.assert_allclose(found[[3, 8, 26]], slopes[[3, 8, 26]])
    assert found[79] == pytest.approx((fractions @ slopes).mean())


def test_calibration_finds_a_known_factor():
    rng = np.random.default_rng(0)
    std = rng.uniform(0.5, 2, 20000)
    error = 3.0 * std * rng.normal(size=20000)
    assert calibrate(error, np.zeros(20000), std) == pytest.approx(3.0, rel=0.03)
    assert calibrate(error[:3], np.zeros(3), np.zeros(3)) == 1.0


def test_a_training_that_paused_ends_like_one_that_did_not(dataset_dir, tmp_path):
    straight = train(dataset_dir, tmp_path / "straight")
    for epochs in (1, 3, 3, None):  # not at a checkpoint's epoch; twice the same
        paused = train(dataset_dir, tmp_path / "paused", pause_after=epochs)
        assert [c.epochs for c in paused.curves] == [epochs or 6] * 2
        if epochs:
            assert paused.curves[0].val_mae == straight.curves[0].val_mae[:epochs]
            assert paused.checkpoint_sha256 != straight.checkpoint_sha256
    assert paused.checkpoint_sha256 == straight.checkpoint_sha256
    assert paused.curves == straight.curves


def test_a_single_network_with_dropout_states_its_uncertainty(dataset_dir, tmp_path):
    result = train(dataset_dir, tmp_path, ensemble_size=1, dropout=0.3)
    model = CGCNNModel("m", TARGET).load_from_checkpoint(result.checkpoint)
    assert model.card.uncertainty.spread == "mc_dropout"
    rows = result.predictions["test"]
    graphs = [GRAPHS[row["structure_id"]] for row in rows]
    found = model.predict_full(graphs, coverage=0.5)
    np.testing.assert_allclose(found.mean, [r["mean"] for r in rows], atol=1e-5)
    np.testing.assert_allclose(found.std, [r["std"] for r in rows], rtol=1e-3)
    assert (found.std > 0).all()
    assert (found.half_width > 0).all()
    again = model.predict_full(graphs[::-1], coverage=0.5)  # repeatable, in any order
    np.testing.assert_allclose(again.std[::-1], found.std, rtol=1e-4)
    assert model.predict(graphs[0])["uncertainty"] == pytest.approx(
        found.std[0], rel=1e-4
    )
    both = train(dataset_dir, tmp_path / "both", ensemble_size=2, dropout=0.3)
    card = CGCNNModel("m", TARGET).load_from_checkpoint(both.checkpoint).card
    assert card.uncertainty.spread == "ensemble+mc_dropout"
    assert card.uncertainty.dropout_passes == 16


# ------------------------------------------------------------------- classes, parents


@pytest.fixture(scope="module")
def labels_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("labels")
    config = DatasetConfig(
        target_property="is_metal",
        unit="",
        train_fraction=0.7,
        val_fraction=0.2,
        test_fraction=0.1,
    )
    middle = float(np.median(list(TARGETS.values())))
    labels = {name: float(value > middle) for name, value in TARGETS.items()}
    write_dataset(build_regression_dataset(GRAPHS, labels, config), directory)
    return directory


CLASSES = {
    "target": "is_metal",
    "classes": ("no", "yes"),
    "element_reference": False,
    "ensemble_size": 1,
    "epochs": 30,
}


def test_two_classes_are_learned_as_probabilities(labels_dir, tmp_path):
    result = train(labels_dir, tmp_path, **CLASSES)
    for part in ("val", "test"):
        rows = result.predictions[part]
        found = np.array([row["mean"] for row in rows])
        truth = np.array([row["target"] for row in rows])
        assert ((found > 0) & (found < 1)).all()
        metrics = result.metrics[part]
        assert metrics["accuracy"] == np.mean((found > 0.5) == (truth > 0.5))
        likely = np.where(truth > 0.5, found, 1 - found)
        assert metrics["nll"] == pytest.approx(-np.log(likely).mean())
    assert result.metrics["val"]["accuracy"] > 0.8
    curve = result.curves[0]
    assert curve.val_loss[curve.best_epoch - 1] == min(curve.val_loss)
    model = CGCNNModel("m", "is_metal").load_from_checkpoint(result.checkpoint)
    row = result.predictions["val"][0]
    said = model.predict(GRAPHS[row["structure_id"]], coverage=0.5)
    assert said["interval"] is row["half_width"] is None
    assert "within_interval" not in result.metrics["val"]
    assert said["prediction"] == pytest.approx(row["mean"], abs=1e-5)


def test_targets_that_are_no_classes_are_refused(dataset_dir, tmp_path):
    changes = {**CLASSES, "target": TARGET}
    with pytest.raises(InputError, match="neither 0 nor 1"):
        train(dataset_dir, tmp_path, **changes)


def test_area_under_the_curve_counts_pairs():
    rng = np.random.default_rng(0)
    truth = (rng.random(40) > 0.6).astype(float)
    said = np.round(rng.random(40), 1)  # with ties
    pairs = [
        (a > b) + 0.5 * (a == b) for a in said[truth == 1] for b in said[truth == 0]
    ]
    found = classification_metrics(truth, said)["roc_auc"]
    assert found == pytest.approx(np.mean(pairs))
    assert classification_metrics(truth[:0], said[:0])["roc_auc"] is None


def test_fine_tuning_keeps_what_is_frozen(dataset_dir, tmp_path):
    first = train(dataset_dir, tmp_path / "first", epochs=3, ensemble_size=1)
    config = with_parent(
        TrainingConfig(
            target=TARGET,
            epochs=2,
            batch_size=8,
            ensemble_size=2,
            freeze=("embedding", "convolutions.0"),
            normalizer="keep",
            forest_baseline=False,
        ),
        Path(first.checkpoint),
    )
    assert config.parent_sha256 == first.checkpoint_sha256
    assert config.hidden_dim == SMALL["hidden_dim"]
    work_dir = tmp_path / "second"
    work_dir.mkdir()
    values = {
        "config": config.model_dump(mode="json"),
        "dataset_dir": str(dataset_dir),
        "threads": 1,
        "parent": first.checkpoint,
    }
    result = TrainingResult(**main(values, work_dir, Communicator(), StopRequest()))
    before, after = load_file(first.checkpoint), load_file(result.checkpoint)
    for name, value in before.items():
        if not name.startswith("members.0."):
            continue
        for member in range(2):
            new = after[name.replace("members.0.", f"members.{member}.")]
            frozen = "embedding" in name or "convolutions.0." in name
            assert np.array_equal(new, value) == frozen, name
    assert np.array_equal(after["element_reference"], before["element_reference"])
    assert result.parent == {
        "sha256": first.checkpoint_sha256,
        "frozen": ["embedding", "convolutions.0"],
        "normalizer": "keep",
    }


def test_a_parent_of_other_sizes_is_refused(dataset_dir, tmp_path):
    first = train(dataset_dir, tmp_path, epochs=1, ensemble_size=1)
    with pytest.raises(InputError, match="hidden_dim is 12"):
        with_parent(
            TrainingConfig(target=TARGET, hidden_dim=12), Path(first.checkpoint)
        )
    with pytest.raises(InputError, match="bandgap"):
        with_parent(TrainingConfig(target="bandgap"), Path(first.checkpoint))
    with pytest.raises(InputError, match="need a parent"):
        train_cgcnn_model(
            TARGET,
            TrainingConfig(target=TARGET, freeze=("dense",)),
            dataset_dir=dataset_dir,
            work_dir=tmp_path,
        )


def test_frozen_parts_keep_every_digit_of_their_parent(dataset_dir, tmp_path):
    options = {"epochs": 1, "ensemble_size": 1, "precision": "float64"}
    first = train(dataset_dir, tmp_path / "first", **options)
    second = train(
        dataset_dir, tmp_path / "second", parent=first.checkpoint,
        parent_sha256=first.checkpoint_sha256, freeze=("dense",), **options,
    )  # fmt: skip
    before, after = load_file(first.checkpoint), load_file(second.checkpoint)
    name = "members.0.dense.weight"
    assert not np.array_equal(before[name], before[name].astype(np.float32))
    assert np.array_equal(after[name], before[name])


def test_a_parent_that_the_key_does_not_name_is_refused(dataset_dir, tmp_path):
    first = train(dataset_dir, tmp_path / "first", epochs=1, ensemble_size=1)
    with pytest.raises(InputError, match="not the parent that the config names"):
        train(dataset_dir, tmp_path / "second", parent=first.checkpoint)
    with pytest.raises(InputError, match="no file was given"):
        train(dataset_dir, tmp_path / "third", parent_sha256=first.checkpoint_sha256)


def test_the_scale_of_a_parent_in_another_unit_is_not_kept(dataset_dir, tmp_path):
    first = train(dataset_dir, tmp_path / "first", epochs=1, ensemble_size=1)
    config = DatasetConfig(
        target_property=TARGET, unit="meV/atom", train_fraction=0.7, val_fraction=0.2,
        test_fraction=0.1,
    )  # fmt: skip
    targets = {name: 1000.0 * value for name, value in TARGETS.items()}
    write_dataset(build_regression_dataset(GRAPHS, targets, config), tmp_path / "meV")
    options = {
        "epochs": 1, "ensemble_size": 1, "parent": first.checkpoint,
        "parent_sha256": first.checkpoint_sha256,
    }  # fmt: skip
    with pytest.raises(InputError, match="in meV/atom, the parent in eV/atom"):
        train(tmp_path / "meV", tmp_path / "kept", normalizer="keep", **options)
    refitted = train(tmp_path / "meV", tmp_path / "refitted", **options)
    assert refitted.unit == "meV/atom"


def test_elements_that_a_parent_is_told_nothing_of_are_refused(dataset_dir, tmp_path):
    first = train(dataset_dir, tmp_path / "first", epochs=1, ensemble_size=1)
    card, arrays = read_checkpoint(Path(first.checkpoint).read_bytes())
    table = arrays[ATOM_TABLE].copy()
    table[13] = 0.0
    digest = save_checkpoint(
        tmp_path / "parent", card, [state_of(arrays, 0)], table, arrays[REFERENCE]
    )
    with pytest.raises(InputError, match="no description of Al"):
        train(
            dataset_dir, tmp_path / "second", parent=tmp_path / "parent",
            parent_sha256=digest, ensemble_size=1,
        )  # fmt: skip


def test_gaussians_that_tell_no_distances_apart_are_refused(dataset_dir, tmp_path):
    with pytest.raises(InputError, match="no Gaussians"):
        train(dataset_dir, tmp_path, gaussian_step=8.0)


def test_every_epoch_has_its_metrics_and_the_forest_stands_beside(
    dataset_dir, tmp_path
):
    result = train(
        dataset_dir, tmp_path, epochs=2, ensemble_size=1, forest_baseline=True
    )
    curve = result.curves[0]
    for name in ("train_loss", "train_mse", "train_mae", "train_r2"):
        assert len(getattr(curve, name)) == 2
    for name in ("val_loss", "val_mse", "val_mae", "val_r2"):
        assert len(getattr(curve, name)) == 2
    assert curve.val_mae[1] ** 2 <= curve.val_mse[1]
    truth = np.array([row["target"] for row in result.predictions["val"]])
    # The reference is part of target and prediction: R² of the residual differs.
    assert set(result.baselines) == {"mean", "composition", "forest"}
    assert result.baselines["forest"]["val"]["n"] == len(truth)
    errors = result.per_element["val"]
    rows = [
        r for r in result.predictions["val"] if 13 in GRAPHS[r["structure_id"]].numbers
    ]
    assert errors["Al"]["n"] == len(rows)
    mae = np.mean([abs(r["mean"] - r["target"]) for r in rows])
    assert errors["Al"]["mae"] == pytest.approx(mae)
    assert all(len(row["members"]) == 1 for row in result.predictions["test"])


def test_clipping_bounds_the_step(dataset_dir, tmp_path):
    # Plain SGD moves by rate times gradient: one step, one bound.
    options = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "averaging_epochs": 0.0,
        "epochs": 1,
        "batch_size": 60,
        "ensemble_size": 1,
        "learning_rate": 1.0,
        "precision": "float64",
    }
    whole = train(dataset_dir, tmp_path / "whole", **options, clip_norm=1e9)
    still = train(dataset_dir, tmp_path / "still", **options, clip_norm=1e-12)
    short = train(dataset_dir, tmp_path / "short", **options, clip_norm=1e-3)
    origin = load_file(still.last_checkpoint)

    def moved(result):
        now = load_file(result.last_checkpoint)
        names = [n for n in now if n.endswith(("weight", "bias"))]
        return np.sqrt(sum(((now[n] - origin[n]) ** 2).sum() for n in names))

    assert moved(short) == pytest.approx(1e-3, rel=1e-6)
    assert moved(whole) > 1e-2


def test_later_fields_leave_the_keys_of_older_trainings_alone():
    dumped = TrainingConfig(target=TARGET).model_dump(mode="json")
    assert set(dumped) == {
        "target", "epochs", "batch_size", "learning_rate", "hidden_dim", "num_layers",
        "readout_dim", "gaussian_step", "ensemble_size", "optimizer", "weight_decay",
        "schedule", "warmup_fraction", "loss", "averaging_epochs", "patience",
        "element_reference", "checkpoint_every", "seed", "precision", "schema_version",
    }  # fmt: skip
    changed = TrainingConfig(target=TARGET, dropout=0.1)
    assert changed.model_dump(mode="json") == {**dumped, "dropout": 0.1}
    assert TrainingConfig(**changed.model_dump(mode="json")) == changed


OTHERWISE = {
    "target": "bandgap", "epochs": 7, "batch_size": 9, "learning_rate": 0.5,
    "hidden_dim": 9, "num_layers": 4, "readout_dim": 9, "dense_layers": 2,
    "gaussian_step": 0.3, "ensemble_size": 2, "optimizer": "sgd", "momentum": 0.5,
    "weight_decay": 0.3, "schedule": "step", "warmup_fraction": 0.3,
    "milestones": (3,), "gamma": 0.5, "clip_norm": 1.0, "loss": "mae",
    "classes": ("a", "b"), "dropout": 0.1, "averaging_epochs": 1.0, "patience": 3,
    "element_reference": False, "element_vectors": "published", "checkpoint_every": 3,
    "checkpoint_minutes": 1.0, "keep_checkpoints": 3, "seed": 1,
    "precision": "float64", "parent_sha256": "a" * 64, "freeze": ("dense",),
    "normalizer": "keep", "forest_baseline": False, "model_type": "line_graph",
    "angle_layers": 1, "angle_cutoff": 3.0, "angle_gaussians": 9,
}  # fmt: skip


def test_every_setting_is_part_of_the_key_of_a_training():
    assert {*OTHERWISE, "schema_version"} == set(TrainingConfig.model_fields)
    keys = set()
    for name, value in OTHERWISE.items():
        base = {"target": TARGET}
        if name == "classes":
            base["element_reference"] = False
        if name.startswith("angle_"):
            base["model_type"] = "line_graph"
        before, after = (
            training_key(TrainingConfig(**{**base, **change}), "hash")
            for change in ({}, {name: value})
        )
        assert before != after, name
        keys.add(after)
    assert len(keys) == len(OTHERWISE)
    plain = TrainingConfig(target=TARGET)
    others = {training_key(plain, "hash", "m"), training_key(plain, "other hash")}
    assert len({training_key(plain, "hash"), *others} | keys) == len(keys) + 3


def test_what_keys_leave_out_means_the_same_for_ever():
    config = TrainingConfig(target=TARGET)
    written = config.model_dump(mode="json")
    left_out = {n: v for n, v in config if n not in written}
    assert left_out == {
        "dense_layers": 1, "momentum": 0.9, "milestones": (), "gamma": 0.1,
        "clip_norm": None, "classes": (), "dropout": 0.0, "element_vectors": "own",
        "checkpoint_minutes": 10.0, "keep_checkpoints": 2, "parent_sha256": None,
        "freeze": (), "normalizer": "refit", "forest_baseline": True,
        "model_type": "cgcnn", "angle_layers": 2, "angle_cutoff": 3.5,
        "angle_gaussians": 20,
    }  # fmt: skip


def test_the_command_line_trains_and_tells(dataset_dir, tmp_path, capsys):
    from nanoos_fw.cli import main as nanoos

    settings = tmp_path / "settings.yaml"
    settings.write_text("epochs: 1\nensemble_size: 1\nforest_baseline: false\n")
    words = ["train", "run", str(dataset_dir), "--target", TARGET, "--json"]
    words += ["-o", str(tmp_path / "out"), "--config"]
    assert nanoos([*words, str(settings)]) == 0
    result = TrainingResult(**json.loads(capsys.readouterr().out))
    assert result.config.epochs == result.curves[0].epochs == 1
    assert CGCNNModel("m", TARGET).load_from_checkpoint(result.checkpoint).n_members
    settings.write_text("epoch: 1\n")
    assert nanoos([*words, str(settings)]) == 1
    assert "epoch" in capsys.readouterr().err
