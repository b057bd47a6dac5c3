from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fireworks.core.fworker import FWorker
from fireworks.utilities.fw_serializers import load_object_from_file
from small_campaign import small_plan

from nanoos_fw import queue_adapter
from nanoos_fw.errors import InputError, LaunchError
from nanoos_fw.operations.cluster_files import (
    CATEGORIES,
    ClusterChoices,
    default_request,
    launchpad_text,
    write_cluster_files,
)
from nanoos_fw.queue_adapter import SlurmAdapter
from nanoos_fw.slurm import (
    Cluster,
    check_request,
    parse_cluster,
    slurm_request,
    walltime_seconds,
)
from nanoos_fw.slurm.policy import parse_policy
from nanoos_fw.workflows import screening_workflow

CLUSTER = parse_cluster(
    partitions=(
        "PartitionName=cpu Default=YES MaxNodes=2 MaxTime=12:00:00 State=UP\n"
        "PartitionName=gpu Default=NO MaxNodes=UNLIMITED MaxTime=04:00:00 State=UP\n"
    ),
    nodes="cpu|n1|16|64000|(null)|idle\ngpu|g1|8|32000|gpu:a100:4|idle\n",
    config="ClusterName = mat\n",
)
SERVER = "mongodb://user:secret@db.example.org:27017/?authSource=admin"


def load_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    return dict(YAML(typ="safe", pure=True).load(path.read_text()))


def write(folder: Path, cluster: Cluster = CLUSTER, **choices: Any) -> Any:
    return write_cluster_files(
        folder, cluster, launchpad_text(SERVER), ClusterChoices(**choices)
    )


@pytest.mark.parametrize(
    ("limits", "nodes", "expected", "worker"),
    [
        # One that is down, and tiny, is not what jobs have to fit.
        ("", "a|n1|16|64000|(null)|idle\na|n2|1|1|(null)|down*\n", (4, "4000M"), 16),
        ("", "a|n1|16|64000|(null)|drained\n", (4, "4000M"), 16),
        ("MaxCPUsPerNode=2 MaxMemPerNode=6000",
         "a|n1|16|64000|(null)|mixed\n", (2, "3000M"), 2),
        # Sites that do not share memory out leave it at SLURM's default of 1.
        ("", "a|n1|16|1|(null)|idle\n", (4, None), 16),
        ("MaxCPUsPerNode=UNLIMITED MaxMemPerNode=UNLIMITED",
         "a|n1|64|64000|(null)|idle\na|n2|8|512000|(null)|mixed\n", (4, "1000M"), 8),
    ],
)  # fmt: skip
def test_files_for_odd_clusters(
    tmp_path: Path, limits: str, nodes: str, expected: Any, worker: int
) -> None:
    partition = f"PartitionName=a Default=YES MaxTime=1-00:00:00 State=UP {limits}\n"
    write(tmp_path, parse_cluster(partition, nodes, "ClusterName = odd\n"))
    fields = load_yaml(tmp_path / "md" / "my_qadapter.yaml")
    assert (fields["ntasks"], fields.get("mem_per_cpu")) == expected
    script = (tmp_path / "work.sh").read_text()
    assert f"#SBATCH --ntasks={worker}\n" in script


def test_fireworks_loads_the_files_it_is_given(tmp_path: Path) -> None:
    write(
        tmp_path,
        account="mat-42",
        modules=("mpi/4 (new)",),
        gpu=("train",),
        max_jobs=40,
    )

    for category in CATEGORIES:
        fworker = FWorker.from_file(str(tmp_path / category / "my_fworker.yaml"))
        assert fworker.category == category
        adapter = load_object_from_file(str(tmp_path / category / "my_qadapter.yaml"))
        assert type(adapter) is SlurmAdapter
        assert adapter["account"] == "mat-42"
        assert adapter["max_jobs"] == 40
        assert "singleshot" in adapter["rocket_launch"]
        check_request(adapter.request, CLUSTER, category)
        script = adapter.get_script_str(str(tmp_path / "launcher_1"))
        assert "module load 'mpi/4 (new)'\n" in script
        assert "max_jobs" not in script
        config = load_yaml(tmp_path / category / "FW_config.yaml")
        for key in ("LAUNCHPAD_LOC", "FWORKER_LOC", "QUEUEADAPTER_LOC"):
            assert Path(config[key]).is_file()
        link = tmp_path / category / "my_launchpad.yaml"
        assert link.resolve() == tmp_path / "my_launchpad.yaml"
    launchpad = load_yaml(tmp_path / "my_launchpad.yaml")
    assert launchpad["host"] == (
        "mongodb://user:secret@db.example.org:27017/nanoos?authSource=admin"
    )


def test_only_the_owner_reads_the_password(tmp_path: Path) -> None:
    (tmp_path / "my_launchpad.yaml").write_text(launchpad_text(SERVER))
    (tmp_path / "my_launchpad.yaml").chmod(0o644)
    report = write(tmp_path)
    assert stat.S_IMODE((tmp_path / "my_launchpad.yaml").stat().st_mode) == 0o600
    assert tmp_path / "my_launchpad.yaml" in report.unchanged


def test_edited_files_are_not_replaced(tmp_path: Path) -> None:
    assert len(write(tmp_path).written) == 14
    assert write(tmp_path).written == []
    edited = tmp_path / "md" / "my_qadapter.yaml"
    edited.write_text(edited.read_text().replace('"0-12:00:00"', '"0-02:00:00"'))

    with pytest.raises(InputError, match=r"md/my_qadapter\.yaml exists"):
        write(tmp_path)
    with pytest.raises(InputError, match="exists"):
        write(tmp_path, account="mat-42")

    assert "mat-42" not in (tmp_path / "prep" / "my_qadapter.yaml").read_text()
    assert "0-02:00:00" in edited.read_text()


def test_requests_stay_within_the_partition() -> None:
    md = default_request("md", CLUSTER, ClusterChoices())
    assert (md["queue"], md["walltime"], md["ntasks"]) == ("cpu", "0-12:00:00", 4)
    assert md["mem_per_cpu"] == "4000M"
    train = default_request("train", CLUSTER, ClusterChoices(gpu=("train",)))
    assert (train["queue"], train["walltime"]) == ("gpu", "0-04:00:00")
    assert train["gpus_per_node"] == 1
    with pytest.raises(InputError, match="no partition 'huge'"):
        default_request("md", CLUSTER, ClusterChoices(partition="huge"))


def test_every_category_of_the_workflows_has_its_files(tmp_path: Path) -> None:
    keys = [f"{number:040d}" for number in range(40)]
    workflow = screening_workflow(small_plan(tmp_path), keys, keys[:4])
    assert {fw.spec["_category"] for fw in workflow.fws} == set(CATEGORIES)


def test_packed_workers_have_a_script_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, gpu=("train",), account="mat-42")
    for name, categories, slots, line in (
        ("work.sh", ("prep", "infer", "md"), 4, "--ntasks=16"),
        ("work-gpu.sh", ("train",), 4, "--gpus-per-node=4"),
    ):
        text = (tmp_path / name).read_text()
        options = [li for li in text.splitlines() if li.startswith("#SBATCH")]
        assert f"#SBATCH {line}" in options
        assert "#SBATCH --array=0-0" in options
        assert "#SBATCH --account=mat-42" in options
        assert f"cd -- {tmp_path / 'work'}" in text
        chosen = " ".join(f"--category {c}" for c in categories)
        assert f'{chosen} --slots {slots} "$@" &' in text


@pytest.mark.parametrize(
    ("uri", "host", "port", "name"),
    [
        ("localhost", "localhost", 27017, "nanoos"),
        ("db:27018", "db", 27018, "nanoos"),
        ("mongodb://db:1/mine", "mongodb://db:1/mine", 27017, "mine"),
        ("mongodb+srv://u:p@x.net", "mongodb+srv://u:p@x.net/nanoos", 27017, "nanoos"),
    ],
)
def test_a_launchpad_file_of_any_address(
    tmp_path: Path, uri: str, host: str, port: int, name: str
) -> None:
    path = tmp_path / "my_launchpad.yaml"
    path.write_text(launchpad_text(uri))
    found = load_yaml(path)
    assert (found["host"], found["port"], found["name"]) == (host, port, name)
    assert found["uri_mode"] is ("://" in uri)


@pytest.mark.parametrize("uri", ["http://db", "db:port"])
def test_an_address_that_is_none_is_refused(uri: str) -> None:
    with pytest.raises(InputError):
        launchpad_text(uri)
    with pytest.raises(InputError, match="authSource"):
        launchpad_text("mongodb://u:p@db/admin", "nanoos")


# ------------------------------------------------------------------------ the adapter


def test_the_adapter_survives_the_copy_that_qlaunch_makes() -> None:
    from fireworks.utilities.fw_serializers import load_object

    adapter = SlurmAdapter({"queue": "cpu", "walltime": "1:00:00"})
    copy = load_object(adapter.to_dict())
    copy.update({"walltime": "2:00:00", "job_name": "small_md"})
    assert copy.request == slurm_request(
        {"queue": "cpu", "walltime": "2:00:00", "job_name": "small_md"}
    )
    assert "walltime" in adapter
    assert adapter.get("nodes") is None
    with pytest.raises(KeyError):
        adapter["nodes"]


def test_the_memory_of_a_firework_replaces_that_of_the_file() -> None:
    for first, second in (("mem", "mem_per_cpu"), ("mem_per_cpu", "mem")):
        adapter = SlurmAdapter({first: "1G", "nodes": 1})
        adapter.update({second: "2G"})
        request = adapter.request.model_dump(exclude_none=True)
        assert request[second] == "2G"
        assert first not in request


def test_a_misspelt_override_is_refused_before_anything_is_submitted(
    tmp_path: Path,
) -> None:
    adapter = SlurmAdapter({"queue": "cpu", "memory": "4G"})
    with pytest.raises(InputError, match="memory"):
        adapter.get_script_str(str(tmp_path))


def test_what_limits_of_accounting_never_let_run_is_not_submitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SLURM takes such a job, and leaves it pending."""
    qualities = "tiny||01:00:00|cpu=2||\n"
    limited = replace(
        CLUSTER,
        partitions=tuple(replace(p, qos="tiny") for p in CLUSTER.partitions),
        policy=parse_policy(qualities, ""),
    )
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sinfo")
    monkeypatch.setattr(queue_adapter, "_cluster", lambda _period: limited)
    large = {"ntasks": 4, "walltime": "2:00:00"}
    with pytest.raises(InputError, match="4 processors exceed the 2 of QOS 'tiny'"):
        SlurmAdapter(large).get_script_str(str(tmp_path))
    small = {**large, "ntasks": 2, "walltime": "1:00:00"}
    assert "--time=1:00:00" in SlurmAdapter(small).get_script_str(str(tmp_path))
    # Of a reserved firework it is told when the job is to be submitted, which parks it.
    parked: list[Any] = []
    monkeypatch.setattr(
        SlurmAdapter, "_park", lambda _self, error: parked.append(error)
    )
    monkeypatch.setattr(SlurmAdapter, "_sized", lambda _self, request: request)
    command = "rlaunch singleshot --fw_id 7"
    adapter = SlurmAdapter({**large, "rocket_launch": command})
    assert "not submitted" in adapter.get_script_str(str(tmp_path))
    adapter.submit_to_queue("script")
    assert "MaxWall" in str(parked[0])
    asked = default_request("prep", limited, ClusterChoices())["walltime"]
    assert walltime_seconds(asked) == 3600


def test_what_passes_is_waited_for_and_what_does_not_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [
        LaunchError("sbatch failed: Socket timed out on send/recv operation"),
        "4711;mat\n",
        LaunchError("sbatch failed: invalid partition specified: gpuu"),
    ]

    def run_slurm(command: list[str], **_options: Any) -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    waits: list[float] = []
    monkeypatch.setattr(queue_adapter, "run_slurm", run_slurm)
    monkeypatch.setattr(queue_adapter, "submit_limits", lambda *_: [])
    monkeypatch.setattr(queue_adapter.time, "sleep", waits.append)
    adapter = SlurmAdapter({})
    assert adapter.submit_to_queue("FW_submit.script") == 4711
    assert len(waits) == 1
    with pytest.raises(LaunchError, match="gpuu"):
        adapter.submit_to_queue("FW_submit.script")


def test_a_reserved_firework_is_given_back_while_slurm_takes_no_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A limit of the user's jobs may last for hours; the loop of qlaunch goes on."""
    cancelled: list[int] = []

    class Fireworks:
        def find_one(self, query: Any, _fields: Any) -> Any:
            return {"launches": [3, 9]} if query == {"fw_id": 7} else None

    class Launchpad:
        fireworks = Fireworks()

    def run_slurm(_command: list[str], **_options: Any) -> str:
        raise LaunchError("sbatch failed: QOSMaxSubmitJobPerUserLimit")

    waits: list[float] = []
    monkeypatch.setattr(queue_adapter, "run_slurm", run_slurm)
    monkeypatch.setattr(queue_adapter, "submit_limits", lambda *_: [])
    monkeypatch.setattr(
        queue_adapter,
        "cancel_reservation",
        lambda _launchpad, launch: cancelled.append(launch),
    )
    monkeypatch.setattr(queue_adapter.time, "sleep", waits.append)
    monkeypatch.setattr(SlurmAdapter, "_launchpad", lambda _self: Launchpad())
    adapter = SlurmAdapter({"rocket_launch": "rlaunch singleshot --fw_id 7"})
    assert adapter.submit_to_queue("FW_submit.script") == "given back"
    assert cancelled == [9]
    assert waits == sorted(waits)
    assert 60 < sum(waits) < 600  # less than reconcile waits for a job's number
    # Nothing is reserved: nothing to give back.
    with pytest.raises(LaunchError, match="MaxSubmitJob"):
        SlurmAdapter({}).submit_to_queue("FW_submit.script")
