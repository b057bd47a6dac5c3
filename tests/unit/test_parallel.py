from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import signal
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoos_fw.errors import (
    DiskFullError,
    InputError,
    LaunchError,
    MissingDependencyError,
    OutOfMemoryError,
    OutOfTimeError,
)
from nanoos_fw.parallel import (
    ERROR,
    LOCK,
    RESULT,
    RESUMABLE_EXIT,
    STOPPED,
    Communicator,
    Resources,
    StopRequest,
    child_environment,
    communicator,
    launch_command,
    launch_ranks,
    locked,
    report_progress,
    run_rank_program,
)
from nanoos_fw.parallel.files import LOG, hold_as_rank, wait_for_no_rank
from nanoos_fw.parallel.ranks import _start_time


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_program(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def bare_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only folder on PATH; the one of Python holds no launcher either."""
    folder = tmp_path / "bin dir"
    folder.mkdir()
    python_folder = tmp_path / "python"
    python_folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(python_folder / "python3"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return folder


# ----------------------------------------------------------------- the command


def test_one_rank_needs_no_launcher(bare_path: Path) -> None:
    assert launch_command(Resources(ranks=1)) == []


def test_no_launcher_is_an_error_with_the_next_step(bare_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="2 MPI rank") as caught:
        launch_command(Resources(ranks=2))
    assert "mpiexec" in caught.value.message
    assert "nanoos_fw[mpich]" in (caught.value.advice or "")
    assert caught.value.evidence["PATH"] == str(bare_path)


def test_mpiexec_is_the_launcher_outside_slurm(bare_path: Path) -> None:
    mpiexec = make_program(bare_path, "mpiexec")
    make_program(bare_path, "srun")
    assert launch_command(Resources(ranks=4)) == [str(mpiexec), "-n", "4"]


def test_the_launcher_beside_python_comes_first(bare_path: Path) -> None:
    make_program(bare_path, "mpiexec")
    own = make_program(Path(sys.executable).parent, "mpiexec")
    assert launch_command(Resources(ranks=2))[0] == str(own)


@pytest.fixture
def in_slurm(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the srun of an allocation, beside an mpiexec."""
    make_program(bare_path, "mpiexec")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    return make_program(bare_path, "srun")


def test_srun_is_the_launcher_inside_slurm(
    in_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIR_CVAR_CH4_NETMOD", "ucx")  # the user's choice stays
    command = launch_command(Resources(ranks=2))
    assert command == [
        str(in_slurm),
        "--mpi=pmi2",
        "--exact",
        "--kill-on-bad-exit=1",
        "-n",
        "2",
    ]


@pytest.mark.parametrize("installed", [True, False])
def test_ranks_of_the_mpich_package_tell_short_addresses(
    installed: bool, in_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if not installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "5.0.2"

    monkeypatch.delenv("MPIR_CVAR_CH4_NETMOD", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", version)
    told = "--export=ALL,MPIR_CVAR_CH4_NETMOD=ofi"
    assert (told in launch_command(Resources(ranks=2))) == installed


def test_the_options_of_a_given_launcher_are_kept(bare_path: Path) -> None:
    srun = make_program(bare_path, "srun")
    command = launch_command(Resources(ranks=3, launcher="srun --mpi=pmix -c '2'"))
    assert command == [str(srun), "--mpi=pmix", "-c", "2", "-n", "3"]


def test_a_given_launcher_may_lie_anywhere(bare_path: Path, tmp_path: Path) -> None:
    program = make_program(tmp_path, "my mpirun")
    command = launch_command(Resources(ranks=2, launcher=f"'{program}' --bind-to core"))
    assert command == [str(program), "--bind-to", "core", "-n", "2"]


@pytest.mark.parametrize("launcher", ["", "  ", "mpiexec 'open quote"])
def test_a_launcher_that_is_no_command_is_refused(launcher: str) -> None:
    with pytest.raises(InputError, match="launcher"):
        launch_command(Resources(ranks=2, launcher=launcher))


@pytest.mark.parametrize("values", [{"ranks": 0}, {"threads": 0}, {"ranks": -1}])
def test_resources_are_positive(values: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        Resources(**values)


def test_a_child_gets_its_threads_and_no_ranks_nor_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("MONGODB_PASSWORD", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("KEPT", "yes")
    env = child_environment(4)
    assert env["OMP_NUM_THREADS"] == env["SRUN_CPUS_PER_TASK"] == "4"
    assert env["KEPT"] == "yes"
    assert not {"PMI_RANK", "OMPI_COMM_WORLD_RANK", "MONGODB_PASSWORD"} & env.keys()
    assert env["NANO_OS_PARENT"].endswith(f":{os.getpid()}")


# ------------------------------------------------------------- one rank, no MPI


def write_program(work_dir: Path, body: str, **config: Any) -> Path:
    """Write a rank program of one rank, without an import of nanoos_fw."""
    (work_dir / "single_rank.py").write_text(body)
    path = work_dir / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_a_program_without_a_result_is_an_error_with_its_log(tmp_path: Path) -> None:
    config = write_program(tmp_path, "import sys; sys.exit('no more memory cells')")
    with pytest.raises(LaunchError, match="died with exit code 1") as caught:
        launch_ranks("single_rank", config, resources=Resources())
    assert "no more memory cells" in caught.value.evidence["log_tail"]
    assert str(tmp_path / "ranks.log") in (caught.value.advice or "")


def test_a_success_without_a_result_is_no_success(tmp_path: Path) -> None:
    config = write_program(tmp_path, "pass")
    with pytest.raises(LaunchError, match="left no result"):
        launch_ranks("single_rank", config, resources=Resources())


@pytest.mark.parametrize(
    ("body", "how", "code"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL", -9),
        # What shells and srun, and what MPICH's mpiexec say of a rank that was killed.
        ("raise SystemExit(137)", "was killed by SIGKILL", 137),
        ("print('(signal 9)'); raise SystemExit(9)", "was killed by SIGKILL", 137),
        ("print('(signal 9)'); raise SystemExit(3)", "died with exit code 3", 3),
        ("raise SystemExit(9)", "died with exit code 9", 9),
    ],
)
def test_a_signal_is_named(tmp_path: Path, body: str, how: str, code: int) -> None:
    (tmp_path / LOG).write_text("$ an earlier launch\nKilled (signal 9)\n")
    config = write_program(tmp_path, body)
    with pytest.raises(LaunchError, match=f"single_rank {how}") as died:
        launch_ranks("single_rank", config, resources=Resources())
    assert died.value.evidence["exit_code"] == code


@pytest.mark.parametrize("body", ["raise SystemExit(1)", "import os; os.abort()"])
def test_ranks_on_a_full_disk_need_not_say_so(tmp_path: Path, body: str) -> None:
    config = write_program(tmp_path, body)
    (tmp_path / f".room.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=str(tmp_path)) as caught:
        launch_ranks("single_rank", config, resources=Resources())
    assert "--class disk" in (caught.value.advice or "")
    assert not list(tmp_path.glob(".room*"))


def test_files_of_an_earlier_run_do_not_count(tmp_path: Path) -> None:
    for name in (RESULT, ERROR, STOPPED):
        (tmp_path / name).write_text('{"energy": 1}')
    config = write_program(tmp_path, "pass")
    with pytest.raises(LaunchError, match="left no result"):
        launch_ranks("single_rank", config, resources=Resources())


def test_a_result_is_read_and_progress_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "progress = {'done': 3, 'total': 9, 'text': 'epochs'}\n"
        "Path('progress.json').write_text(json.dumps(progress))\n"
        "Path('result.json').write_text(Path(sys.argv[1]).read_text())\n"
    )
    config = write_program(tmp_path, body, energy=-3.5)
    with caplog.at_level(logging.INFO, "nanoos_fw"):
        result = launch_ranks("single_rank", config, resources=Resources())
    assert result == {"energy": -3.5}
    assert "epochs: 3 of 9" in caplog.text


def test_a_work_directory_may_be_named_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "import shutil, sys; shutil.copy(sys.argv[1], 'result.json')"
    (tmp_path / "here").mkdir()
    write_program(tmp_path / "here", body, energy=1.5)
    monkeypatch.chdir(tmp_path)
    config = Path("here/config.json")
    result = launch_ranks("single_rank", config, resources=Resources())
    assert result == {"energy": 1.5}


def test_a_python_that_cannot_start_is_a_launch_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_program(tmp_path, "pass")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    with pytest.raises(LaunchError, match="cannot start"):
        launch_ranks("single_rank", config, resources=Resources())


def test_signal_handlers_are_as_before_after_a_launch(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    config = write_program(tmp_path, "pass")
    with pytest.raises(LaunchError):
        launch_ranks("single_rank", config, resources=Resources())
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before


# ------------------------------------------------------- the body of a program


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Run a rank program inside this process: no exit, no handlers, no watch."""
    for name in list(os.environ):
        if name.startswith(("PMI_", "PMIX_", "OMPI_", "NANO_OS_PARENT")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(StopRequest, "listen", lambda _self: None)

    def abort(_self: Communicator, code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(Communicator, "abort", abort)
    return monkeypatch


def run(program: Any, work_dir: Path, **config: Any) -> None:
    path = work_dir / "config.json"
    path.write_text(json.dumps(config))
    run_rank_program(program, [str(path)])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.usefixtures("serial")
def test_the_result_of_a_program_is_written(tmp_path: Path) -> None:
    def program(
        config: dict[str, Any], work_dir: Path, comm: Communicator, stop: StopRequest
    ) -> dict[str, Any]:
        assert (comm.rank, comm.size, stop.requested) == (0, 1, False)
        return {"doubled": 2 * config["x"], "dir": str(work_dir)}

    run(program, tmp_path, x=4)
    assert read(tmp_path / RESULT) == {"doubled": 8, "dir": str(tmp_path)}


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (InputError("no atoms", evidence={"site": 3}), "input", "no atoms"),
        (MemoryError("2 TiB"), "out_of_memory", "2 TiB"),
        (OutOfMemoryError("cuda"), "out_of_memory", "cuda"),
        (ZeroDivisionError("x"), "launch", "ZeroDivisionError: x"),
        (KeyboardInterrupt(), "launch", "KeyboardInterrupt"),
    ],
)
def test_the_error_of_a_program_is_written(
    tmp_path: Path, raised: BaseException, kind: str, message: str
) -> None:
    def program(*_: Any) -> dict[str, Any]:
        raise raised

    with pytest.raises(SystemExit, match="1"):
        run(program, tmp_path)
    body = read(tmp_path / ERROR)
    assert body["kind"] == kind
    assert message in body["message"]
    assert not (tmp_path / RESULT).exists()


@pytest.mark.usefixtures("serial")
def test_the_first_error_is_the_cause(tmp_path: Path) -> None:
    (tmp_path / ERROR).write_text('{"message": "the cause"}')

    def program(*_: Any) -> dict[str, Any]:
        raise ValueError("a consequence")

    with pytest.raises(SystemExit):
        run(program, tmp_path)
    assert read(tmp_path / ERROR) == {"message": "the cause"}


@pytest.mark.usefixtures("serial")
def test_a_stop_in_time_is_written_and_exits_with_try_again(tmp_path: Path) -> None:
    def program(
        _config: dict[str, Any], _dir: Path, _comm: Communicator, stop: StopRequest
    ) -> dict[str, Any]:
        assert stop.requested
        raise OutOfTimeError(f"epoch 7: {stop.reason}", evidence={"epoch": 7})

    with pytest.raises(SystemExit, match=str(RESUMABLE_EXIT)):
        run(program, tmp_path, deadline=time.time() - 1.0)
    body = read(tmp_path / STOPPED)
    assert body["resumable"] is True
    assert body["evidence"] == {"epoch": 7}
    assert body["message"] == "epoch 7: end of the allocation"


@pytest.mark.usefixtures("serial")
def test_a_damaged_config_is_reported_by_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="1"):
        run_rank_program(lambda *_: {}, [str(tmp_path / "config.json")])
    assert read(tmp_path / ERROR)["kind"] == "corrupt_artifact"


def test_a_rank_program_without_a_config_says_how_it_is_started() -> None:
    with pytest.raises(SystemExit, match="usage: python -m"):
        run_rank_program(lambda *_: {}, [])


def test_without_a_launcher_there_is_one_rank(
    serial: pytest.MonkeyPatch,
) -> None:
    comm = communicator()
    assert (comm.rank, comm.size, comm.mpi) == (0, 1, None)


def test_under_a_launcher_a_missing_mpi_is_an_error(
    serial: pytest.MonkeyPatch,
) -> None:
    # A launcher with a missing MPI must not give N serial runs.
    serial.setenv("PMI_RANK", "0")
    serial.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(MissingDependencyError, match="mpi4py"):
        communicator()


def test_a_serial_communicator_is_an_identity() -> None:
    comm = Communicator()
    array = np.array([1.0, 2.0])
    comm.sum_in_place(array)
    comm.barrier()
    assert array.tolist() == [1.0, 2.0]
    assert comm.any(True) is True
    assert comm.any(False) is False
    assert comm.gather("x") == ["x"]
    assert comm.broadcast("y") == "y"


# -------------------------------------------------------- stop, progress, lock


def test_the_clock_asks_for_the_stop() -> None:
    assert not StopRequest().requested
    assert not StopRequest(time.time() + 3600.0).requested
    stop = StopRequest(time.time() - 1.0)
    assert stop.requested
    assert stop.reason == "end of the allocation"


def test_the_parent_asks_for_the_stop_through_a_file(tmp_path: Path) -> None:
    stop = StopRequest(None, tmp_path / "stop")
    assert not stop.requested
    (tmp_path / "stop").write_text("SIGTERM")
    assert stop.requested
    assert stop.reason == "signal SIGTERM"
    (tmp_path / "stop").unlink()
    assert stop.requested  # a request is not taken back


def test_a_signal_asks_for_the_stop() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            stop = StopRequest()
            stop.listen()
            assert not stop.requested
            signal.raise_signal(number)
            assert stop.requested
            assert stop.reason == f"signal {number.name}"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_progress_is_replaced_whole(tmp_path: Path) -> None:
    report_progress(tmp_path, 1, 10, "epochs")
    report_progress(tmp_path, 2, 10, "epochs")
    assert read(tmp_path / "progress.json") == {
        "done": 2,
        "total": 10,
        "text": "epochs",
    }
    assert names(tmp_path) == ["progress.json"]


def test_a_work_directory_is_held_by_one_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # flock belongs to the open file: a second opening is another holder.
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    holder = f"process {os.getpid()} on {socket.gethostname()}, SLURM job 77"
    with locked(tmp_path / "work"):
        for _ in range(2):  # the one that is refused leaves the name there
            with (
                pytest.raises(LaunchError, match="another launch") as refused,
                locked(tmp_path / "work"),
            ):
                pass
            assert holder in refused.value.message
    monkeypatch.delenv("SLURM_JOB_ID")
    with locked(tmp_path / "work"):
        assert (tmp_path / "work" / LOCK).read_text() == holder.partition(",")[0]


def test_a_work_directory_is_free_after_its_launch(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "work"):
            assert names(tmp_path / "work") == [LOCK]


def test_a_work_directory_that_cannot_be_made_is_an_input_error(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="cannot write in"),
        locked(tmp_path / "file" / "work"),
    ):
        pass


def test_a_launch_waits_for_the_ranks_of_an_earlier_one(tmp_path: Path) -> None:
    with hold_as_rank(tmp_path), hold_as_rank(tmp_path):
        assert not wait_for_no_rank(tmp_path, 0.0)
    assert wait_for_no_rank(tmp_path, 0.0)


def test_ranks_that_still_live_refuse_a_new_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoos_fw.parallel.launch._LAST_RANKS_S", 0.0)
    config = write_program(tmp_path, "pass")
    with (
        hold_as_rank(tmp_path),
        pytest.raises(LaunchError, match="earlier launch still work"),
    ):
        launch_ranks("single_rank", config, resources=Resources())


def test_a_gone_process_and_a_zombie_are_not_alive() -> None:
    assert _start_time(str(os.getpid())) is not None
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, not yet buried
    assert _start_time(str(child)) is None
    os.waitpid(child, 0)
    assert _start_time(str(child)) is None
