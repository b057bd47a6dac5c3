"""A real SLURM cluster: the script that starts one, and ranks on two nodes of it."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import HANGING_S, wait_for
from slurm_jobs import slurm, submit_job, wait_until_ended

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "local-slurm"

RunJob = Callable[..., str]


@pytest.fixture
def run_job(tmp_path: Path) -> RunJob:
    """Submit a batch script, wait for its end, and return its output."""

    def run(script: str, *options: str) -> str:
        output = tmp_path / "job.out"
        text = "#!/bin/bash\n" + textwrap.dedent(script)
        words = [f"--output={output}", f"--chdir={tmp_path}", *options]
        job = submit_job(text, *words)
        wait_until_ended(job, lambda: slurm("scontrol", "show", "job", job))
        return output.read_text()

    return run


def test_ranks_of_a_firetask_run_on_both_nodes(run_job: RunJob, tmp_path: Path) -> None:
    (tmp_path / "who.py").write_text(
        textwrap.dedent(
            """
            import os
            from nanoos_fw.parallel import run_rank_program

            def program(config, work_dir, comm, stop):
                nodes = comm.gather(os.environ["SLURMD_NODENAME"])
                return {"nodes": nodes, "size": comm.size}

            run_rank_program(program)
            """
        )
    )
    (tmp_path / "parent.py").write_text(
        textwrap.dedent(
            """
            import json
            from pathlib import Path
            from nanoos_fw.parallel import Resources, launch_ranks

            Path("ranks").mkdir()
            config = Path("ranks/config.json").resolve()
            config.write_text("{}")
            print(json.dumps(launch_ranks("who", config, resources=Resources(ranks=2))))
            """
        )
    )

    output = run_job(
        f"PYTHONPATH={tmp_path} {sys.executable} parent.py",
        "--nodes=2",
        "--ntasks-per-node=1",
    )

    result = json.loads(output.splitlines()[-1])
    assert result == {"nodes": ["n1", "n2"], "size": 2}, output


def test_the_death_of_a_rank_ends_the_others(run_job: RunJob, tmp_path: Path) -> None:
    """They would wait for it until the end of the allocation."""
    (tmp_path / "dies.py").write_text(
        textwrap.dedent(
            """
            import os, signal
            from nanoos_fw.parallel import run_rank_program

            def program(config, work_dir, comm, stop):
                if comm.rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                comm.barrier()

            run_rank_program(program)
            """
        )
    )
    (tmp_path / "parent.py").write_text(
        textwrap.dedent(
            """
            from pathlib import Path
            from nanoos_fw.errors import LaunchError
            from nanoos_fw.parallel import Resources, launch_ranks

            Path("ranks").mkdir()
            config = Path("ranks/config.json").resolve()
            config.write_text("{}")
            try:
                launch_ranks("dies", config, resources=Resources(ranks=2))
            except LaunchError as error:
                print("exit code", error.evidence["exit_code"])
            """
        )
    )

    output = run_job(
        f"PYTHONPATH={tmp_path}:$PYTHONPATH {sys.executable} parent.py",
        "--nodes=1",
        "--ntasks=2",
    )

    assert output.splitlines()[-1] == "exit code 137", output


@pytest.mark.lammps
@pytest.mark.mpi
def test_simulation_under_srun_is_that_of_mpiexec(
    run_job: RunJob, tmp_path: Path
) -> None:
    from pymatgen.core import Lattice, Structure

    from nanoos_fw.md.engine import LAMMPSEngine
    from nanoos_fw.parallel import Resources

    cell = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.61), ["Cu"], [[0] * 3])
    parameters = {"num_steps": 100, "equilibration_steps": 20, "thermo_every": 10}
    engine = LAMMPSEngine()
    inputs = engine.prepare_input(cell * [3, 3, 3], parameters, tmp_path)
    here, there = tmp_path / "here", tmp_path / "there"
    engine.execute(inputs, here, resources=Resources(2, launcher="mpiexec"))
    (tmp_path / "parent.py").write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            from nanoos_fw.md.engine import LAMMPSEngine
            from nanoos_fw.parallel import Resources

            inputs, output = map(Path, sys.argv[1:])
            done = LAMMPSEngine().execute(inputs, output, resources=Resources(2))
            print(done["ranks"])
            """
        )
    )

    output = run_job(
        f"{sys.executable} parent.py {inputs} {there}",
        "--nodes=2",
        "--ntasks-per-node=1",
    )

    assert output.splitlines()[-1] == "2", output
    command = (there / "ranks.log").read_text().splitlines()[0]
    assert "srun --mpi=pmi2" in command
    ours, theirs = (engine.parse_output(folder) for folder in (there, here))
    for result in (ours, theirs):
        del result["thermo"]["wall_time_s"]
    assert ours["thermo"] == theirs["thermo"]
    assert ours["final_velocities_a_fs"] == theirs["final_velocities_a_fs"]


# ------------------------------------------------------------------ the local cluster


def local_slurm(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "SLURM_CONF"}
    return subprocess.run(
        [str(SCRIPT), command, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        env={**env, "LOCAL_SLURM_ACCOUNTING": "no"},
    )


def processes_of(folder: Path) -> list[int]:
    """Return the living processes that hold a file of the folder open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            targets = [str(fd.readlink()) for fd in (process / "fd").iterdir()]
        except OSError:  # ended meanwhile
            continue
        if any(target.startswith(f"{folder}/") for target in targets):
            found.append(int(process.name))
    return found


@pytest.fixture
def second_cluster(tmp_path: Path) -> Iterator[Path]:
    """Folder of a cluster of its own, since the test kills its daemons."""
    if os.geteuid() != 0:
        pytest.skip("the daemons of SLURM need root")
    folder = tmp_path / "slurm"
    yield folder
    local_slurm("stop", folder)


def test_local_cluster_survives_its_daemons_and_leaves_nothing(
    second_cluster: Path,
) -> None:
    started = local_slurm("start", second_cluster)
    assert started.returncode == 0, started.stderr
    assert started.stdout == f"export SLURM_CONF={second_cluster}/slurm.conf\n"
    env = {**os.environ, "SLURM_CONF": f"{second_cluster}/slurm.conf"}
    subprocess.run(
        ["sbatch", "--job-name=survivor", "--output=/dev/null", "--wrap=sleep 300"],
        capture_output=True,
        check=True,
        env=env,
    )
    job_state = second_cluster / "state" / "job_state"  # written with a delay
    wait_for(
        lambda: job_state.exists() and b"survivor" in job_state.read_bytes(),
        "the state of the job was not saved",
    )

    run = second_cluster / "run"
    for name in ("slurmctld", "slurmd-n1"):
        os.kill(int((run / f"{name}.pid").read_text()), signal.SIGKILL)
    wait_for(
        lambda: local_slurm("status", second_cluster).returncode == 1,
        "its daemons live",
        every_s=0.2,
    )
    munged = (run / "munged.pid").read_text()

    assert local_slurm("start", second_cluster).returncode == 0
    assert local_slurm("start", second_cluster).returncode == 0  # nothing to do
    status = local_slurm("status", second_cluster)
    assert status.returncode == 0, status.stdout + status.stderr
    assert (run / "munged.pid").read_text() == munged  # what lived was left alone
    # Known again, whether it has begun or not.
    jobs = subprocess.run(
        ["squeue", "--noheader", "--format=%j"],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    ).stdout
    assert jobs == "survivor\n"

    stopped = local_slurm("stop", second_cluster)
    assert stopped.returncode == 0, stopped.stderr
    assert not second_cluster.exists()
    assert processes_of(second_cluster) == []


def test_local_cluster_refuses_a_folder_of_somebody_else(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the daemons of SLURM need root")
    (tmp_path / "thesis.tex").write_text("years of work")
    for command in ("start", "stop"):
        answer = local_slurm(command, tmp_path)
        assert answer.returncode == 1, command
        assert str(tmp_path) in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_job_knows_when_its_allocation_ends(run_job: RunJob, tmp_path: Path) -> None:
    (tmp_path / "when.py").write_text(
        "import time\n"
        "from nanoos_fw.slurm import allocation_times\n"
        "start, end = allocation_times()\n"
        "assert start <= time.time() <= end, (start, end)\n"
        "print('length', round(end - start))\n"
    )

    output = run_job(f"{sys.executable} when.py", "--time=7")

    assert output.splitlines()[-1] == "length 420"


# What SLURM is to refuse, or never to begin, and what it is to run; as root, whom lists
# of groups do not concern.
DOORS = {
    "two": ("MinNodes=2", ["--nodes=1"], {"nodes": 1}, False),
    "spread": ("MinNodes=2", [], {}, True),
    "down": ("State=DOWN", [], {}, False),
    "drain": ("State=DRAIN", [], {}, False),
    "off": ("State=INACTIVE", [], {}, False),
    "reserved": ("ReqResv=YES", [], {}, False),
    "staff": ("RootOnly=YES AllowGroups=daemon", [], {}, True),
    "chem": ("AllowAccounts=chem", [], {}, False),
    "nochem": ("DenyAccounts=chem", [], {}, True),
    "noroot": ("DenyAccounts=root", [], {}, False),
    "high": ("AllowQos=high", [], {}, False),
    "low": ("DenyQos=normal", [], {}, False),
    "tiny": ("QoS=tiny", ["--ntasks=2", "--time=5"], {"ntasks": 2}, False),
    "fits": ("QoS=tiny", ["--ntasks=1", "--time=5"], {"walltime": 5}, True),
    "long": ("QoS=tiny", ["--time=11"], {"walltime": 11}, False),
    # Only as a flag of the job's own QOS it has an effect.
    "longer": ("QoS=longer MaxTime=2", ["--time=5"], {"walltime": 5}, False),
}
OF_ACCOUNTING = {"chem", "nochem", "noroot", "high", "low"}
OF_LIMITS = {"tiny", "fits", "long", "longer"}
LIMITS = {
    "tiny": ["MaxTRES=cpu=1", "MaxWall=00:10:00"],
    "longer": ["Flags=PartitionTimeLimit"],
}


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, check=False).returncode == 0


def _knows_qos(name: str) -> bool:
    return f"QOS={name}(" in slurm("scontrol", "show", "assoc_mgr", "flags=qos")


def test_slurm_agrees_on_who_may_use_a_partition() -> None:
    from nanoos_fw.slurm import (
        queued_jobs,
        read_cluster,
        request_problems,
        run_slurm,
        slurm_request,
    )

    doors = dict(DOORS)
    if not read_cluster().accounting:
        doors = {
            name: door
            for name, door in doors.items()
            if name not in OF_ACCOUNTING | OF_LIMITS
        }
    elif not read_cluster().enforces_limits:
        doors = {name: door for name, door in doors.items() if name not in OF_LIMITS}
    jobs: dict[str, str] = {}
    try:
        for name, limits in LIMITS.items() if OF_LIMITS & doors.keys() else ():
            run_slurm(["sacctmgr", "--immediate", "add", "qos", name, *limits])
            wait_for(functools.partial(_knows_qos, name), f"QOS {name}", every_s=0.2)
        for name, (fields, *_) in doors.items():
            up = [] if "State=" in fields else ["State=UP"]
            run_slurm(
                ["scontrol", "create", f"PartitionName=door-{name}", "Nodes=n[1-2]",
                 *up, *fields.split()]
            )  # fmt: skip
        cluster = read_cluster()
        problems, fits = {}, {}
        for name, (_, options, fields, _) in doors.items():
            request = slurm_request({"queue": f"door-{name}", **fields})
            problems[name] = request_problems(request, cluster)
            fits[name] = not problems[name]
            done = subprocess.run(
                ["sbatch", "--parsable", f"--partition=door-{name}", "--mem=10M",
                 "--output=/dev/null", *options, "--wrap=true"],
                check=False, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode == 0:
                jobs[name] = done.stdout.strip()
        runs = {name for name, door in doors.items() if door[-1]}
        wait_for(
            lambda: not any(jobs[name] in queued_jobs() for name in runs),
            lambda: slurm("squeue"),
            every_s=0.5,
        )
        there = queued_jobs()
        ran = {name: name in jobs and jobs[name] not in there for name in doors}
        reasons = {
            name: there[job].reason for name, job in jobs.items() if job in there
        }
    finally:
        subprocess.run(["scancel", *jobs.values()], check=False)
        for name in doors:
            words = ["scontrol", "delete", f"PartitionName=door-{name}"]
            wait_for(  # until its job has ended
                functools.partial(_succeeds, words), f"{name} to go", every_s=0.5
            )
        if OF_LIMITS & doors.keys():
            run_slurm(["sacctmgr", "--immediate", "delete", "qos", ",".join(LIMITS)])

    assert ran == {name: door[-1] for name, door in doors.items()}, reasons
    assert fits == ran, (problems, reasons)
