"""The number of ranks must not change a training; stopping must not either."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import HANGING_S, wait_for
from small_training import TARGET, config, write_small_dataset

from nanoos_fw.errors import (
    CorruptArtifactError,
    LaunchError,
    OutOfTimeError,
)
from nanoos_fw.ml.training import (
    CHECKPOINT,
    RANK_CONFIG,
    train_cgcnn_model,
)
from nanoos_fw.operations.rules import failure_class
from nanoos_fw.parallel import Resources, launch_ranks
from nanoos_fw.parallel.files import PROGRESS

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return write_small_dataset(tmp_path_factory.mktemp("dataset"))


def train(dataset_dir, work_dir, ranks, **changes):
    return train_cgcnn_model(
        TARGET,
        config(**changes),
        dataset_dir=dataset_dir,
        work_dir=work_dir,
        resources=Resources(ranks=ranks),
    )


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)]
)
def test_ranks_do_not_change_the_loss_curve(
    dataset_dir, tmp_path, precision, tolerance
):
    # With three graphs per batch the fourth rank never has a sample; 20 rows do not
    # divide by three.
    changes = {"precision": precision, "batch_size": 3}
    one = train(dataset_dir, tmp_path / "1", 1, **changes).curves[0]
    for ranks in (2, 4):
        many = train(dataset_dir, tmp_path / str(ranks), ranks, **changes)
        assert many.ranks == ranks
        curve = many.curves[0]
        np.testing.assert_allclose(curve.train_loss, one.train_loss, rtol=tolerance)
        np.testing.assert_allclose(curve.val_mae, one.val_mae, rtol=10 * tolerance)
    assert one.train_loss[-1] != one.train_loss[0]


def test_ranks_do_not_change_the_training_on_angles(tmp_path):
    directory = write_small_dataset(tmp_path / "dataset", vectors=True)
    sizes = {"model_type": "line_graph", "readout_dim": 128, "angle_cutoff": 3.4}
    changes = {**sizes, "precision": "float64", "batch_size": 3, "dropout": 0.2}
    changes["epochs"] = 3
    # With three graphs per batch the fourth rank never has a sample.
    one = train(directory, tmp_path / "1", 1, **changes)
    many = train(directory, tmp_path / "4", 4, **changes)
    assert many.ranks == 4
    for name in ("train_loss", "val_mae"):
        found, expected = (getattr(r.curves[0], name) for r in (many, one))
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert one.curves[0].train_loss[-1] != one.curves[0].train_loss[0]


STOPPER = """
import sys
from nanoos_fw.ml.training import main
from nanoos_fw.parallel import run_rank_program

def program(config, work_dir, comm, stop):
    class OnRank1(type(stop)):
        left = 11  # in the third or fourth epoch
        @property
        def requested(self):
            self.left -= 1
            return comm.rank == 1 and self.left < 0
    return main(config, work_dir, comm, OnRank1())

run_rank_program(program)
"""


# One member: both ranks share its batches. Two: each rank fits one.
@pytest.mark.parametrize("members", [1, 2])
def test_stopping_on_one_rank_and_resuming_changes_nothing(
    dataset_dir, tmp_path, members
):
    changes = {"ensemble_size": members}
    whole = train(dataset_dir, tmp_path / "whole", 2, **changes)
    work_dir = tmp_path / "parts"
    work_dir.mkdir()
    (work_dir / "stopper.py").write_text(STOPPER)
    (work_dir / RANK_CONFIG).write_text(
        json.dumps(
            {
                "config": config(**changes).model_dump(mode="json"),
                "dataset_dir": str(dataset_dir),
                "threads": 1,
                "deadline": None,
            }
        )
    )
    with pytest.raises(OutOfTimeError) as stopped:
        launch_ranks("stopper", work_dir / RANK_CONFIG, resources=Resources(ranks=2))
    assert stopped.value.resumable
    # The member of rank 1: its team stops, other teams finish theirs.
    newest = max(path.name for path in work_dir.glob(f"member{members - 1}-*"))
    assert "epoch00002" in newest or "epoch00003" in newest
    resumed = train(dataset_dir, work_dir, 2, **changes)
    assert resumed.checkpoint_sha256 == whole.checkpoint_sha256
    assert resumed.curves == whole.curves


def test_teams_of_one_rank_give_the_model_of_one_rank(dataset_dir, tmp_path):
    one = train(dataset_dir, tmp_path / "1", 1, ensemble_size=3, epochs=2)
    three = train(dataset_dir, tmp_path / "3", 3, ensemble_size=3, epochs=2)
    assert three.checkpoint_sha256 == one.checkpoint_sha256
    assert three.predictions == one.predictions


def test_a_deadline_that_has_passed_leaves_a_checkpoint(dataset_dir, tmp_path):
    with pytest.raises(OutOfTimeError, match="end of the allocation"):
        train_cgcnn_model(
            TARGET,
            config(),
            dataset_dir=dataset_dir,
            work_dir=tmp_path,
            resources=Resources(ranks=2),
            deadline=time.time(),
        )
    assert list(tmp_path.glob("member0-epoch00000-step000000-*.safetensors"))


SIGNALLED = """
import json, sys
from nanoos_fw.errors import OutOfTimeError
from nanoos_fw.ml.training import TrainingConfig, train_cgcnn_model
from nanoos_fw.parallel import Resources

fields, dataset_dir, *work_dirs = sys.argv[1:]
config = TrainingConfig(**json.loads(fields))
for work_dir in work_dirs:
    try:
        train_cgcnn_model(
            config.target, config, dataset_dir=dataset_dir, work_dir=work_dir,
            resources=Resources(ranks=2),
        )
    except OutOfTimeError as error:
        print(error.resumable, error, flush=True)
"""


def wait_for_epoch(work_dir, parent):
    def done():
        assert parent.poll() is None
        return (work_dir / PROGRESS).exists()

    wait_for(done, f"no epoch in {work_dir}")


def test_each_signal_to_the_parent_stops_a_training_with_a_checkpoint(
    dataset_dir, tmp_path
):
    # Far more epochs than a test has time for: only a signal ends them.
    fields = config(epochs=1_000_000, checkpoint_every=1_000_000).model_dump_json()
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    work_dirs = [tmp_path / number.name for number in numbers]
    words = [sys.executable, "-c", SIGNALLED, fields, dataset_dir, *work_dirs]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        try:
            for number, work_dir in zip(numbers, work_dirs, strict=True):
                wait_for_epoch(work_dir, parent)
                parent.send_signal(number)
                told = parent.stdout.readline()
                assert told.startswith("True "), told
                assert number.name in told
                assert list(work_dir.glob("member0-epoch*")), number.name
                assert not (work_dir / CHECKPOINT).exists()
            assert parent.wait(timeout=HANGING_S) == 0
        finally:
            parent.kill()


def test_an_error_of_the_ranks_reaches_the_caller(dataset_dir, tmp_path):
    broken = tmp_path / "dataset"
    shutil.copytree(dataset_dir, broken)
    (broken / "distances.npy").write_bytes(b"nonsense")
    with pytest.raises(CorruptArtifactError, match=r"distances\.npy"):
        train(broken, tmp_path / "work", 2)


KILLED = """
import os, signal
from nanoos_fw.ml import fitting
from nanoos_fw.ml.training import main
from nanoos_fw.parallel import run_rank_program

def program(config, work_dir, comm, stop):
    step = fitting.Fit._step
    def dies(self, rows, number, rate):
        if number == 8 and comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, rows, number, rate)
    fitting.Fit._step = dies
    return main(config, work_dir, comm, stop)

run_rank_program(program)
"""


def test_a_killed_rank_ends_all_and_another_number_of_ranks_goes_on(
    dataset_dir, tmp_path
):
    changes = {"checkpoint_minutes": 0.0, "precision": "float64", "dropout": 0.2}
    whole = train(dataset_dir, tmp_path / "whole", 1, **changes)
    work_dir = tmp_path / "parts"
    work_dir.mkdir()
    (work_dir / "killed.py").write_text(KILLED)
    values = {
        "config": config(**changes).model_dump(mode="json"),
        "dataset_dir": str(dataset_dir),
        "threads": 1,
        "deadline": None,
    }
    (work_dir / RANK_CONFIG).write_text(json.dumps(values))
    with pytest.raises(LaunchError, match="killed by SIGKILL") as died:
        launch_ranks("killed", work_dir / RANK_CONFIG, resources=Resources(ranks=2))
    assert failure_class(died.value) == "killed"  # and is rerun as such
    assert list(work_dir.glob("member0-epoch00002-step000002-*"))
    resumed = train(dataset_dir, work_dir, 1, **changes)
    for found, expected in zip(resumed.curves, whole.curves, strict=True):
        np.testing.assert_allclose(found.train_loss, expected.train_loss, rtol=1e-10)


GROUPED = """
from nanoos_fw.ml.process_groups import GroupCommunicator
from nanoos_fw.ml.training import main
from nanoos_fw.parallel import run_rank_program

def program(config, work_dir, comm, stop):
    sums, sum_tensor = [], GroupCommunicator.sum_tensor
    def counted(self, tensor):
        sums.append(self.backend)
        sum_tensor(self, tensor)
    GroupCommunicator.sum_tensor = counted
    result = main(config, work_dir, comm, stop)
    (work_dir / f"sums-{comm.rank}").write_text(" ".join(sums))
    return result

run_rank_program(program)
"""


def test_tensors_summed_by_torch_give_the_training_of_one_rank(dataset_dir, tmp_path):
    """As between GPUs, where the backend is nccl: found by way of MPI."""
    changes = {"precision": "float64", "epochs": 2, "batch_size": 3}
    one = train(dataset_dir, tmp_path / "1", 1, **changes).curves[0]
    work_dir = tmp_path / "2"
    work_dir.mkdir()
    (work_dir / "grouped.py").write_text(GROUPED)
    values = {
        "config": config(**changes).model_dump(mode="json"),
        "dataset_dir": str(dataset_dir),
        "threads": 1,
        "deadline": None,
        "backend": "gloo",
    }
    (work_dir / RANK_CONFIG).write_text(json.dumps(values))
    two = launch_ranks("grouped", work_dir / RANK_CONFIG, resources=Resources(ranks=2))
    assert two["ranks"] == 2
    curve = two["curves"][0]
    np.testing.assert_allclose(curve["train_loss"], one.train_loss, rtol=1e-10)
    np.testing.assert_allclose(curve["val_mae"], one.val_mae, rtol=1e-9)
    # Of each step: gradients, and the moments of each normalization, both ways.
    for rank in range(2):
        sums = (work_dir / f"sums-{rank}").read_text().split()
        assert set(sums) == {"gloo"}
        assert len(sums) > 2 * 7
