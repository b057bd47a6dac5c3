from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from nanoos_fw.errors import InputError
from nanoos_fw.slurm import (
    Partition,
    batch_script,
    check_request,
    memory_mib,
    over_policy,
    parse_cluster,
    parse_sacct,
    parse_scontrol_jobs,
    request_problems,
    slurm_request,
    walltime_seconds,
)
from nanoos_fw.slurm.access import Submitter, parse_submitter
from nanoos_fw.slurm.policy import parse_policy

REFERENCE = Path(__file__).parents[1] / "reference" / "slurm"
CASES = sorted(path.stem for path in REFERENCE.glob("*.json"))
LAUNCH_DIR = "/scratch/it's here/launcher_1"


@pytest.mark.parametrize("case", CASES)
def test_batch_scripts_are_those_of_the_reference(case: str) -> None:
    # Renewed on purpose by scripts/renew_slurm_references.py.
    request = slurm_request(json.loads((REFERENCE / f"{case}.json").read_text()))
    expected = (REFERENCE / f"{case}.sh").read_text()
    assert batch_script(request, LAUNCH_DIR) == expected


@pytest.mark.parametrize("case", CASES)
def test_batch_scripts_are_valid_shell(case: str) -> None:
    checked = subprocess.run(
        ["bash", "-n", str(REFERENCE / f"{case}.sh")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr


def test_the_full_reference_uses_every_option() -> None:
    """All fields but those that exclude others of the case."""
    given = json.loads((REFERENCE / "full.json").read_text())
    from nanoos_fw.slurm.request import _OPTIONS, SlurmRequest

    assert set(SlurmRequest.model_fields) - set(given) == {"mem", "array"}
    script = (REFERENCE / "full.sh").read_text()
    for name in set(given) & set(_OPTIONS):
        option = _OPTIONS[name]
        assert f"#SBATCH --{'no-' if given[name] is False else ''}{option}" in script


def run_script(tmp_path: Path, rocket: str) -> subprocess.Popen[str]:
    request = slurm_request({"rocket_launch": rocket, "post_rocket": "echo after"})
    script = tmp_path / "job.sh"
    script.write_text(batch_script(request, str(tmp_path)))
    return subprocess.Popen(
        ["bash", "--noprofile", str(script)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("status", [0, 3])
def test_the_script_ends_with_the_status_of_the_rocket(
    tmp_path: Path, status: int
) -> None:
    job = run_script(tmp_path, f"sh -c 'exit {status}'")
    assert job.communicate(timeout=600)[0] == "after\n"
    assert job.returncode == status


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_the_script_hands_signals_on_and_waits(tmp_path: Path, number: str) -> None:
    program = tmp_path / "rocket.py"
    program.write_text(
        "import signal, sys, time\n"
        "def stop(*_):\n"
        "    print('checkpoint', flush=True)\n"
        "    time.sleep(0.3)\n"
        "    sys.exit(4)\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    job = run_script(tmp_path, f"python3 {program}")
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    subprocess.run(["kill", f"-{number}", str(job.pid)], check=True)
    assert job.communicate(timeout=600)[0] == "checkpoint\nafter\n"
    assert job.returncode == 4


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"wall_time": "1:00:00"}, "wall_time"),
        ({"gpu-bind": "closest"}, "gpu-bind"),
        ({"walltime": "one hour"}, "no time limit"),
        ({"walltime": "0"}, "longer than nothing"),
        ({"mem": "4GB"}, "mem"),
        ({"mem": "4G", "mem_per_cpu": "1G"}, "not both"),
        ({"nodes": 0}, "nodes"),
        ({"job_name": "a b"}, "job_name"),
        ({"comment": 'say "x"'}, "without quotes"),
        ({"constraint": "a\n#SBATCH --exclusive"}, "one line"),
        ({"signal": "USR1;reboot"}, "signal"),
        ({"array": "1-x"}, "array"),
        ({"rocket_launch": "rlaunch singleshot\nrm -r x"}, "one command"),
        ({"rocket_launch": " "}, "one command"),
    ],
)
def test_bad_requests_are_refused(values: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        slurm_request(values)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        (90, 5400),
        ("1:30", 90),
        ("01:30:00", 5400),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("1-00:00:10", 86410),
        ("UNLIMITED", float("inf")),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(
    text: str | int, seconds: float
) -> None:
    assert walltime_seconds(text) == seconds


def test_memory_is_in_mebibytes() -> None:
    assert [memory_mib(v) for v in (512, "512", "2G", "1T", "1024K")] == [
        512,
        512,
        2048,
        1048576,
        1,
    ]


def test_one_kind_of_memory_replaces_the_other() -> None:
    base = slurm_request({"mem_per_cpu": "1G", "walltime": "1:00:00"})
    changed = base.with_overrides({"mem": "8G"})
    assert (changed.mem, changed.mem_per_cpu) == ("8G", None)
    assert changed.walltime == "1:00:00"
    with pytest.raises(InputError, match="memory"):
        base.with_overrides({"memory": "8G"})


# ------------------------------------------------------------------------- the cluster

CLUSTER = parse_cluster(
    partitions=(
        "PartitionName=cpu Default=YES MaxNodes=2 MaxTime=1-00:00:00 State=UP\n"
        "PartitionName=gpu Default=NO MaxNodes=UNLIMITED MaxTime=04:00:00 State=UP\n"
        "PartitionName=old Default=NO MaxNodes=1 MaxTime=UNLIMITED State=DOWN\n"
    ),
    nodes=(
        "cpu|n1|16|64000|(null)|idle\ncpu|n2|16|64000|(null)|mixed*\n"
        "cpu|n3|32|128000|(null)|down*\n"
        "gpu|g1|8|32000|gpu:a100:4(S:0-1),nvme:1|idle\nold|o1|4|4000|(null)|idle\n"
    ),
    config="ClusterName = mat\nMaxArraySize = 1001\nSLURM_VERSION = 23.11.4\n"
    "AccountingStorageType   = accounting_storage/slurmdbd\n",
)


def test_a_cluster_is_read_from_what_slurm_prints() -> None:
    assert (CLUSTER.name, CLUSTER.version) == ("mat", "23.11.4")
    assert CLUSTER.accounting
    assert CLUSTER.max_array_size == 1001
    cpu, gpu = CLUSTER.partition(None), CLUSTER.partition("gpu")
    assert (cpu.name, cpu.cpus, cpu.memory_mib, cpu.gpus) == ("cpu", 32, 128000, 0)
    assert [node.state for node in cpu.nodes] == ["idle", "mixed", "down"]
    assert (gpu.gpus, gpu.max_time_s) == (4, 14400)
    with pytest.raises(InputError, match="no partition 'gpuu'"):
        CLUSTER.partition("gpuu")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"walltime": "1-00:00:01"}, "walltime"),
        ({"nodes": 3}, "3 nodes exceed the 2"),
        ({"ntasks": 1, "cpus_per_task": 33}, "33 processors on a node"),
        ({"ntasks": 49}, "49 tasks"),
        ({"nodes": 2, "ntasks_per_node": 33}, "33 x 1 processors"),
        ({"mem": "200G"}, "204800 MiB"),
        ({"ntasks_per_node": 32, "nodes": 1, "mem_per_cpu": "5G"}, "163840 MiB"),
        ({"gpus_per_node": 1}, "1 GPUs"),
        ({"queue": "gpu", "gres": "gpu:5"}, "5 GPUs"),
        ({"queue": "old"}, "not up"),
        ({"array": "0-1001%5"}, "array index 1001"),
    ],
)
def test_a_request_that_can_never_run_is_found(
    values: dict[str, object], problem: str
) -> None:
    problems = request_problems(slurm_request(values), CLUSTER)
    assert len(problems) == 1
    assert problem in problems[0]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"walltime": "1-00:00:00", "nodes": 2, "ntasks_per_node": 16},
        {"ntasks": 48},
        {"queue": "gpu", "gpus": 4, "walltime": "4:00:00"},
        {"queue": "gpu,cpu", "walltime": "8:00:00"},
        {"array": "0-1000"},
    ],
)
def test_a_request_that_fits_has_no_problem(values: dict[str, object]) -> None:
    assert request_problems(slurm_request(values), CLUSTER) == []


DOORS = parse_cluster(
    partitions=(
        "PartitionName=two MinNodes=2 MaxNodes=2 State=UP\n"
        "PartitionName=chem AllowAccounts=chem,bio State=UP\n"
        "PartitionName=nochem DenyAccounts=chem State=UP\n"
        "PartitionName=staff AllowGroups=staff State=UP\n"
        "PartitionName=root RootOnly=YES State=UP\n"
        "PartitionName=high AllowQos=high State=UP\n"
        "PartitionName=low DenyQos=normal State=UP\n"
        "PartitionName=reserved ReqResv=YES State=UP\n"
        "PartitionName=down State=DOWN\nPartitionName=drain State=DRAIN\n"
        "PartitionName=off State=INACTIVE\nPartitionName=open AllowGroups=ALL "
        "AllowAccounts=ALL AllowQos=ALL MinNodes=0 RootOnly=NO ReqResv=NO State=UP\n"
    ),
    nodes="".join(
        f"{name}|n{n}|32|128000|(null)|idle\n"
        for name in (
            "two", "chem", "nochem", "staff", "root", "high", "low", "reserved",
            "down", "drain", "off", "open",
        )
        for n in (1, 2)
    ),
    config="ClusterName = mat\n",
)  # fmt: skip
ANN = parse_submitter(
    Submitter("ann", frozenset({"users", "lab"})),
    associations="phys|normal|normal\nchem||high\nsub||high,normal\n",
    default="phys\n",
    accounts="root|\nphys|root\nchem|root\nsub|chem\n",
)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"queue": "two", "nodes": 1}, "1 nodes are below the 2 .* \\(MinNodes"),
        ({"queue": "chem"}, "accounts bio, chem .*'phys'; set account: chem"),
        (
            {"queue": "chem", "account": "zoo"},
            "'phys', as ann has no 'zoo'; set account: chem",
        ),
        ({"queue": "nochem", "account": "chem"}, "DenyAccounts.*; set account: phys"),
        ({"queue": "staff"}, "groups staff .*ann is in lab, users"),
        ({"queue": "root"}, "root only"),
        ({"queue": "high"}, "QOS high .*'normal'; set qos"),
        ({"queue": "low"}, "DenyQos"),
        ({"queue": "reserved"}, "ReqResv"),
        ({"queue": "down"}, "not up but DOWN: jobs wait"),
        ({"queue": "drain"}, "not up but DRAIN: SLURM refuses"),
        ({"queue": "off"}, "INACTIVE: SLURM refuses"),
    ],
)
def test_a_partition_that_is_not_for_the_user_is_named(
    values: dict[str, object], problem: str
) -> None:
    cluster = replace(DOORS, submitter=ANN)
    problems = request_problems(slurm_request(values), cluster)
    assert len(problems) == 1
    assert re.search(problem, problems[0]), problems
    assert f"partition {values['queue']!r}" in problems[0]
    with pytest.raises(InputError, match="another partition"):
        check_request(slurm_request(values), cluster, "category 'md'")


@pytest.mark.parametrize(
    "values",
    [
        {"queue": "two"},  # SLURM gives it two
        {"queue": "two", "nodes": 2},
        {"queue": "chem", "account": "chem"},
        {"queue": "chem", "account": "sub"},  # below it
        {"queue": "nochem"},
        {"queue": "high", "qos": "high"},
        {"queue": "high", "account": "chem"},  # whose only one it is
        {"queue": "low", "account": "sub"},  # two, and nobody says which
        {"queue": "reserved", "reservation": "course"},
        {"queue": "root,open"},
        {"queue": "open", "nodes": 1},
    ],
)
def test_a_partition_that_may_be_for_the_user_is_let_pass(
    values: dict[str, object],
) -> None:
    cluster = replace(DOORS, submitter=ANN)
    assert request_problems(slurm_request(values), cluster) == []


def test_what_accounting_does_not_tell_is_no_problem() -> None:
    stranger = replace(DOORS, submitter=Submitter("bob", frozenset({"staff"})))
    for queue in ("chem", "nochem", "high", "low", "staff"):
        assert request_problems(slurm_request({"queue": queue}), stranger) == []
    root = replace(DOORS, submitter=Submitter("root", is_root=True))
    for queue in ("staff", "root"):
        assert request_problems(slurm_request({"queue": queue}), root) == []


# ------------------------------------------------------- limits of accounting

# As sacctmgr of SLURM 22.05 prints them.
POLICY = parse_policy(
    "normal||02:00:00|cpu=3,mem=3G||node=2\n"
    "long|DenyOnLimit,PartitionTimeLimit|2-00:00:00||cpu=2|\n"
    "tiny|||cpu=1,mem=1.50G,gres/gpu=0||mem=1G\n"
    "over|OverPartQOS|||cpu=2|\n",
    "phys||01:00:00|node=1|\nchem||00:30:00|node=1|\nchem|open|||cpu=9\n",
)
LIMITED = replace(
    parse_cluster(
        partitions="PartitionName=main Default=YES MaxTime=1:00:00 QoS=N/A State=UP\n"
        "PartitionName=small MaxTime=UNLIMITED QoS=tiny State=UP\n",
        nodes="main|n1|32|128000|gpu:4|idle\nmain|n2|32|128000|gpu:4|idle\n"
        "small|n1|32|128000|gpu:4|idle\nsmall|n2|32|128000|gpu:4|idle\n",
        config="ClusterName = mat\nAccountingStorageEnforce = associations,limits\n",
    ),
    submitter=ANN,
    policy=POLICY,
)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"ntasks": 4}, "4 processors exceed the 3 of QOS 'normal' (MaxTRES)"),
        ({"mem_per_cpu": "1G", "ntasks": 2, "cpus_per_task": 2}, "4 processors"),
        ({"mem_per_cpu": "2G", "ntasks": 2}, "4096 MiB exceed the 3072"),
        ({"nodes": 2}, "2 nodes exceed the 1 of account 'phys' (MaxTRES)"),
        ({"qos": "long", "ntasks": 3}, "the 2 of QOS 'long' (MaxTRESPU)"),
        ({"qos": "long", "walltime": "3-0"}, "exceeds the 48 h of QOS 'long'"),
        ({"qos": "none", "walltime": 31, "account": "chem"}, "0.5 h of account 'chem'"),
        ({"queue": "small", "ntasks": 2}, "the 1 of QOS 'tiny' (MaxTRES)"),
        ({"queue": "small", "mem": "1100M"}, "the 1024 of QOS 'tiny' (GrpTRES)"),
        ({"queue": "small", "gpus": 1, "mem": 1}, "1 GPUs exceed the 0"),
        ({"walltime": 90}, "exceeds the 1 h of partition 'main'"),
    ],
)
def test_a_request_beyond_the_limits_of_accounting_is_found(
    values: dict[str, object], problem: str
) -> None:
    problems = request_problems(slurm_request(values), LIMITED)
    assert problem in "; ".join(problems)
    if "QOS" in problem:
        assert over_policy(slurm_request(values), LIMITED)


@pytest.mark.parametrize(
    "values",
    [
        {"ntasks": 3, "mem": "3G", "walltime": 60},
        {"qos": "long", "walltime": "1-12"},  # longer than its partition gives
        {"qos": "long", "mem": "8G"},
        {"queue": "small", "qos": "over", "mem": "1G"},
        {"queue": "main,small", "ntasks": 3},
        {"account": "sub", "ntasks": 30},  # two QOS, and nobody says which
    ],
)
def test_a_request_within_the_limits_of_accounting_is_let_pass(
    values: dict[str, object],
) -> None:
    assert request_problems(slurm_request(values), LIMITED) == []
    assert over_policy(slurm_request(values), LIMITED) == []


def test_of_limits_the_first_that_is_set_counts() -> None:
    small, main = LIMITED.partition("small"), LIMITED.partition("main")

    def sources(partition: Partition, **values: object) -> list[str]:
        found = LIMITED.limits(slurm_request(values), partition)
        return [limits.source for limits in found]

    assert sources(small) == ["QOS 'tiny'", "QOS 'normal'", "account 'phys'"]
    assert sources(small, qos="over") == ["QOS 'over'", "QOS 'tiny'", "account 'phys'"]
    assert sources(main, qos="none") == ["account 'phys'"]
    assert sources(main, account="sub") == []  # its QOS may go before the account
    assert LIMITED.enforces_limits
    assert not CLUSTER.enforces_limits
    assert LIMITED.longest_s(slurm_request({}), main) == 3600
    assert LIMITED.longest_s(slurm_request({"qos": "long"}), main) == 48 * 3600


# ------------------------------------------------------------------------------- jobs


def test_ended_jobs_are_read_from_accounting() -> None:
    found = parse_sacct(
        "1|COMPLETED|0:0|2026-03-01T10:00:00|2026-03-01T11:00:00|n1|01:00:00||main\n"
        "1.batch|COMPLETED|0:0|2026-03-01T10:00:00|2026-03-01T11:00:00|n1|||main\n"
        "2|TIMEOUT|0:0|2026-03-01T10:00:00|2026-03-01T11:00:00|n[1-2]|01:00:00|cpu=4,mem=12G,node=2|main\n"
        "3|FAILED|1:0|2026-03-01T10:00:00|2026-03-01T11:00:00|n1|1-00:00:00||main\n"
        "3.0|OUT_OF_MEMORY|0:125|2026-03-01T10:00:00|2026-03-01T11:00:00|n1|||main\n"
        "4|CANCELLED by 1|0:0|Unknown|2026-03-01T11:00:00|(null)|Partition_Limit||p\n"
        "5|NODE_FAIL|1:0|2026-03-01T10:00:00|2026-03-01T11:00:00|n7|01:00:00||main\n"
        "6|RUNNING|0:0|2026-03-01T10:00:00|Unknown|n1|01:00:00||main\n"
        "7|REQUEUED|0:0|2026-03-01T10:00:00|2026-03-01T10:10:00|n1|01:00:00||main\n"
        "7|FAILED|0:9|2026-03-01T10:20:00|2026-03-01T10:30:00|n2|01:00:00||main\n"
    )
    assert {number: job.cause for number, job in found.items()} == {
        "1": "completed",
        "2": "timeout",
        "3": "oom",
        "4": "cancelled",
        "5": "node",
        "7": "code",
    }
    assert found["2"].limit_s == 3600
    assert found["2"].memory_mib == 6144
    assert found["2"].nodes == "n[1-2]"
    assert found["2"].partition == "main"
    assert found["4"].nodes == ""
    assert (found["7"].signal, found["7"].nodes) == (9, "n2")
    assert found["1"].end is not None
    assert found["1"].start is not None
    assert found["1"].end - found["1"].start == 3600


def test_ended_jobs_are_read_from_the_controller() -> None:
    found = parse_scontrol_jobs(
        "JobId=8 JobName=x JobState=OUT_OF_MEMORY Reason=OutOfMemory ExitCode=0:125 "
        "TimeLimit=00:10:00 StartTime=2026-03-01T10:00:00 EndTime=2026-03-01T10:01:00 "
        "NodeList=n1\n"
        "JobId=9 JobName=x JobState=RUNNING Reason=None ExitCode=0:0 NodeList=n1\n"
    )
    assert {number: job.cause for number, job in found.items()} == {"8": "oom"}
    assert found["8"].limit_s == 600
