"""A cell of the fault matrix: one fault in one stage of a campaign that had finished.

The campaign runs once, undisturbed. A cell takes a copy of its database and work
directories, drops the results of one stage, submits that stage's firework alone through
the queue, lets the fault strike at a chosen moment, and then does what a user does:
``nanoos reconcile``, ``nanoos rerun --failed``, ``qlaunch``. At the end each result of
the firework must be there, once, with the value of the undisturbed campaign.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import slurm_faults as cluster
from database_proxy import DatabaseProxy, Trap
from pymongo import MongoClient
from pymongo.uri_parser import parse_uri
from stage_results import difference, drop_results, keys_of, results
from undisturbed import BIN, Reference, environment, launchpad_of

from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.launches import SPEC_KEY

KILLS = ("scancel", "node", "slurmd", "oom", "rlaunch", "slot", "worker", "rank")
OUTAGES = ("database-before", "database-during", "database-after")
FAULTS = (*KILLS, *OUTAGES, "disk")
STAGES = ("featurize", "label", "train", "screen", "md")
WITH_RANKS = frozenset({"label", "train", "md"})
# Where each stage commits its results; every launch writes to ``models`` at its start.
_COMMITS = {
    "featurize": "structure_features",
    "label": "simulations",
    "train": "artifacts.files",
    "screen": "predictions",
    "md": "simulations",
}
_WORK = {"label": "relaxation", "train": "training", "md": "md"}
_COPIED = (
    "structures", "structure_features", "simulations", "models", "model_aliases",
    "predictions", "campaigns", "artifacts.files", "artifacts.chunks", "nanoos_schema",
)  # fmt: skip
# What is killed: words of its command line.
_PROCESSES = {
    "rlaunch": "nanoos_fw.rlaunch",
    "slot": "nanoos_fw.operations.slots",
    "worker": "bin/nanoos work",
}
_SPACE_MIB = 24
# Runs that a user starts after the first one.
_MAX_ROUNDS = 5
# Failures that no rule reruns by itself; whoever has freed the disk, or wants the
# cancelled job after all, names the class.
_NAMED = frozenset({"cancelled", "disk"})


@dataclass
class Result:
    """What became of a cell.

    Parameters
    ----------
    moment
        When the fault struck: ``start``, ``work``, or ``before``, ``during``, ``after``
        the commit of the results.
    expected, found, double, wrong
        Results of the firework: of the undisturbed campaign, that there are, that there
        are twice, and that have another value.
    launches
        Of the firework and its continuations.
    problems
        Why the cell failed; empty if it passed.
    said
        What ``reconcile`` and ``rerun`` said.
    """

    fault: str
    stage: str
    moment: str = ""
    expected: int = 0
    found: int = 0
    double: int = 0
    wrong: int = 0
    launches: int = 0
    wall_s: float = 0.0
    problems: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the results are complete, right and single."""
        return not self.problems


def applies(fault: str, stage: str) -> bool:
    """Tell whether a stage can have a fault: screening has no child process."""
    return fault != "rank" or stage != "screen"


# ------------------------------------------------------------------------------ cell


class Cell:
    """One fault in one stage; ``run`` returns what became of it."""

    def __init__(
        self,
        reference: Reference,
        folder: Path,
        fault: str,
        stage: str,
        *,
        outage_s: float,
        moment: str | None = None,
    ) -> None:
        self._reference, self._folder = reference, folder
        self._fault, self._stage, self._outage_s = fault, stage, outage_s
        self._moment = moment or default_moment(fault, stage)
        self._name = f"nanoos_matrix_{uuid.uuid4().hex[:10]}"
        self._result = Result(fault, stage, self._moment)
        self._held: int | None = None  # a rank that was stopped, to be killed
        self._files = folder / "cluster"
        self._category = ""
        self._packed = fault in {"slot", "worker"}

    def run(self) -> Result:
        """Prepare, disturb, mend, judge."""
        began = time.monotonic()
        uri = self._reference.uri
        ((host, port),) = parse_uri(uri)["nodelist"]
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        with (
            MongoClient[dict[str, Any]](uri) as client,
            DatabaseProxy(host, port) as proxy,
            self._disk(),
        ):
            self._proxy, self._database = proxy, client[self._name]
            try:
                self._prepare(client[self._reference.database])
                self._disturb()
                self._mend()
                self._judge()
            except Exception as error:  # the others have their turn
                self._result.problems.append(f"{type(error).__name__}: {error}"[:1500])
                self._result.problems += self._evidence()
            finally:
                proxy.set_trap(None)
                for job in cluster.jobs():
                    subprocess.run(["scancel", job], check=False)
                if self._fault in {"node", "slurmd"}:
                    cluster.repair_nodes()
                with contextlib.suppress(TimeoutError):
                    cluster.wait_for(lambda: not cluster.jobs(), "end of all jobs", 60)
                client.drop_database(self._name)
        if self._result.passed:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._result.wall_s = round(time.monotonic() - began, 1)
        return self._result

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        if self._fault != "disk":
            yield
            return
        used = sum(p.stat().st_size for p in self._reference.work.rglob("*"))
        with cluster.small_disk(self._folder, used // 2**20 + _SPACE_MIB):
            yield

    # -------------------------------------------------------------------- prepare

    def _prepare(self, before: Any) -> None:
        for name in _COPIED:
            documents = list(before[name].find())
            if documents:
                self._database[name].insert_many(documents)
        query = {f"spec.{SPEC_KEY}.stage": self._stage}
        original = before["fireworks"].find_one(query)
        self._keys = keys_of(before, original, self._stage)
        self._expected = dict(results(before, self._stage, self._keys))
        self._result.expected = len(self._expected)
        drop_results(self._database, self._stage, self._keys)
        self._counts = {name: before[name].count_documents({}) for name in _COPIED[:6]}
        work = self._folder / "work"
        left_out = shutil.ignore_patterns(_WORK.get(self._stage, "nothing"))
        shutil.copytree(self._reference.work, work, ignore=left_out)
        words = ["init", "--slurm", "--dir", self._files, "--database", self._name]
        words += ["--mongodb", f"mongodb://127.0.0.1:{self._proxy.port}"]
        words += ["--pre-rocket", cluster.hog_line(self._folder)]
        cluster.run(BIN / "nanoos", *words, env=environment())
        self._submit_firework(original, work)

    def _submit_firework(self, original: Mapping[str, Any], work: Path) -> None:
        """Submit the firework, and one after it that no queue takes."""
        from fireworks import Firework, PyTask, Workflow
        from fireworks.utilities.fw_serializers import load_object

        from nanoos_fw.operations import prepare_launchpad

        launchpad = launchpad_of(self._folder, self._reference.uri, self._name)
        open_database(launchpad)
        prepare_launchpad(launchpad)
        spec = dict(original["spec"])
        tasks = [load_object(task) for task in spec.pop("_tasks")]
        spec[SPEC_KEY] = {**spec[SPEC_KEY], "work_root": str(work)}
        request: dict[str, Any] = {}
        if self._stage == "train":
            request = {"nodes": 1, "ntasks": 2}
        if self._fault == "oom":
            request["mem"] = "1600M"
        if request:
            spec["_queueadapter"] = request
        self._category = spec["_category"]
        first = Firework(tasks, spec=spec, name=self._stage, fw_id=-1)
        after = Firework(
            [PyTask(func="os.getpid")],
            spec={"_category": "after"},
            name="after",
            parents=[first],
            fw_id=-2,
        )
        launchpad.add_wf(Workflow([first, after]))

    # -------------------------------------------------------------------- disturb

    def _submit(self) -> None:
        """Put what is ready into the queue, as users do."""
        place = self._files / self._category
        if self._packed:
            command = ["sbatch", f"--chdir={self._folder}", self._files / "work.sh"]
            cluster.run(*command, "--slots", "1", "--idle", "3", env=environment())
            return
        # Not rapidfire: it would wait for what follows the firework.
        command = [BIN / "qlaunch", "-r", "singleshot"]
        cluster.run(*command, cwd=place, env=environment())

    def _disturb(self) -> None:
        if self._moment == "start":
            self._disturb_the_start()
            return
        at = "before" if self._moment == "work" else self._moment
        trap = Trap(_COMMITS[self._stage], at)  # type: ignore[arg-type]
        self._proxy.set_trap(trap)
        self._submit()
        cluster.wait_for(lambda: trap.hit.is_set() or self._in_the_work(), "the moment")
        if self._moment == "after":
            # Its answer has arrived: the next thing that the launch writes down.
            trap = Trap("launches", "before")
            self._proxy.set_trap(trap)
            cluster.wait_for(trap.hit.is_set, "what follows the commit")
        elif self._moment == "work" and trap.hit.is_set():
            self._result.moment = "before"
        (job,) = cluster.jobs()
        self._strike(job)

    def _in_the_work(self) -> bool:
        if self._moment != "work":
            return False
        if self._fault != "rank":
            return bool(self._ranks())
        self._held = cluster.hold(self._ranks())
        return self._held is not None

    def _ranks(self) -> list[int]:
        """Return what computes: the ranks, or the child that featurizes."""
        if self._stage in WITH_RANKS:
            return cluster.ranks_below(self._folder)
        return [
            pid
            for job in cluster.jobs()
            for pid in cluster.processes(job, "nanoos_fw.ml.featurizing")
        ]

    def _strike(self, job: str) -> None:
        fault = self._fault
        if fault in OUTAGES:
            self._proxy.cut()
            time.sleep(self._outage_s)
            self._proxy.restore()
        elif fault == "disk":
            ballast = cluster.fill(self._folder)
            self._proxy.set_trap(None)
            cluster.wait_for(lambda: not cluster.jobs(), "end of the job")
            ballast.unlink()
        elif fault == "slurmd":
            # What it had started lives on, and commits when others try again.
            cluster.fail_node(job, with_processes=False)
        else:
            self._kill(job)
            if self._result.moment == "before":
                self._proxy.drop()
            else:
                self._proxy.set_trap(None)

    def _kill(self, job: str) -> None:
        if self._fault in _PROCESSES:
            cluster.kill(*cluster.processes(job, _PROCESSES[self._fault]))
        elif self._fault == "oom":
            cluster.exhaust(self._folder, job)
        elif self._fault == "rank":
            self._kill_ranks(job)
        else:
            if self._fault == "scancel":
                cluster.run("scancel", job)
            else:
                cluster.fail_node(job, with_processes=True)
            cluster.wait_for(lambda: job not in cluster.jobs(), "end of the job", 90)

    def _kill_ranks(self, job: str) -> None:
        """Kill a rank, or the child that featurizes, and once more if it comes back."""
        for _ in range(2):
            if self._held is None:
                raise RuntimeError("there was no rank to kill")
            cluster.kill(self._held)
            cluster.wait_for(lambda: not self._ranks(), "end of all ranks", 60)
            self._held = None
            with contextlib.suppress(TimeoutError):
                cluster.wait_for(
                    lambda: job not in cluster.jobs() or self._in_the_work(), "more", 8
                )
            if self._held is None:
                return

    def _disturb_the_start(self) -> None:
        """Fill the disk after the submission, before the job begins."""
        partition = ["scontrol", "update", "partitionname=main"]
        cluster.run(*partition, "state=down")
        try:
            self._submit()
            ballast = cluster.fill(self._folder)
        finally:
            cluster.run(*partition, "state=up")
        cluster.wait_for(lambda: not cluster.jobs(), "end of the job")
        ballast.unlink()

    # ----------------------------------------------------------------------- mend

    def _mend(self) -> None:
        """Do what a user does, until the firework has completed or nothing helps."""
        cluster.wait_for(lambda: not cluster.jobs(), "end of the job")
        for number in range(_MAX_ROUNDS + 1):
            self._reconcile()
            self._rerun()
            if self._fault == "slurmd" and number == 0:
                self._proxy.set_trap(None)
            if self._states() == {"COMPLETED"}:
                return
            if "READY" not in self._states() or number == _MAX_ROUNDS:
                raise RuntimeError(f"it stays {', '.join(sorted(self._states()))}")
            self._submit()
            cluster.wait_for(lambda: not cluster.jobs(), "end of the job")

    def _states(self) -> set[str]:
        own = {"name": {"$ne": "after"}}
        return {d["state"] for d in self._database["fireworks"].find(own)}

    def _nanoos(self, *words: str) -> Any:
        path = self._files / "my_launchpad.yaml"
        command = [BIN / "nanoos", words[0], "-l", path, *words[1:], "--json"]
        return json.loads(cluster.run(*command, env=environment()))

    def _reconcile(self) -> None:
        for _ in range(8):
            report = self._nanoos("reconcile")
            for what in ("lost", "unreserved", "paused"):
                for row in report[what]:
                    self._result.said.append(f"{what}: {row['cause']}, {row['reason']}")
            if report["refreshed"]:
                self._result.said.append("refreshed")
            if report["locked"]:
                self._result.said.append("locked by a process that is gone")
                since = datetime.now(UTC) - timedelta(minutes=11)  # so long pass
                self._database["stale_locks"].update_many(
                    {}, {"$set": {"since": since}}
                )
            if not self._states() & {"RUNNING", "RESERVED"}:
                return
            time.sleep(2)  # accounting hears of an end a moment later

    def _rerun(self) -> None:
        report = self._nanoos("rerun", "--failed")
        for row in report["rerun"]:
            changes = ", ".join(row["changes"]) or "as it was"
            self._result.said.append(f"rerun: {row['class']}, {changes}")
        for row in report["refused"]:
            why = f"{row['refused']}; {row['error']['message'][:200]}"
            self._result.said.append(f"left: {row['class']}, {why}")
        for name in {row["class"] for row in report["refused"]} & _NAMED:
            self._nanoos("rerun", "--failed", "--class", name)
            self._result.said.append(f"rerun by name: {name}")

    # ---------------------------------------------------------------------- judge

    def _judge(self) -> None:
        result = self._result
        pairs = results(self._database, self._stage, self._keys)
        found = dict(pairs)
        result.found = len(found)
        result.double = len(pairs) - len(found)
        wrong = [
            words
            for key, value in found.items()
            if (words := difference(value, self._expected.get(key), key))
        ]
        result.wrong = len(wrong)
        if missing := self._expected.keys() - found.keys():
            result.problems.append(f"{len(missing)} results are missing")
        if result.double:
            result.problems.append(f"{result.double} results are double")
        if wrong:
            result.problems.append(f"{len(wrong)} results are wrong: {wrong[0][:300]}")
        counts = {
            name: self._database[name].count_documents({}) for name in self._counts
        }
        if counts != self._counts:
            result.problems.append(f"documents {counts} instead of {self._counts}")
        after = [
            (d["state"], len(d["launches"]))
            for d in self._database["fireworks"].find({"name": "after"})
        ]
        if after != [("READY", 0)]:
            result.problems.append(f"what follows the firework is {after}")
        if self._database["workflows"].count_documents({"locked": {"$exists": True}}):
            result.problems.append("the workflow is locked")
        result.launches = self._database["launches"].count_documents({})

    def _evidence(self) -> list[str]:
        said = []
        for launch in self._database["launches"].find().sort("launch_id", 1):
            stored = (launch.get("action") or {}).get("stored_data") or {}
            trace = str((stored.get("_exception") or {}).get("_stacktrace", ""))
            said.append(f"launch {launch['state']}: {trace[-600:]}")
        errors = self._folder.rglob("*.error")
        return said + [f"{path.name}: {path.read_text()[-600:]}" for path in errors]


def default_moment(fault: str, stage: str) -> str:
    """Return when a fault strikes: in the work of ranks, else before the commit."""
    if fault in OUTAGES:
        return fault.partition("-")[2]
    if fault == "rank" or stage in WITH_RANKS:
        return "work"
    # These stages write no files but those of the launch.
    return "start" if fault == "disk" else "before"


def to_dict(result: Result) -> dict[str, Any]:
    """Return a JSON-ready form."""
    return {**asdict(result), "passed": result.passed}
