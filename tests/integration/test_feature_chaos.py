"""Workers that are killed, and lose their server, while they featurize the same."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from database_proxy import DatabaseProxy
from processes import HANGING_S
from pymatgen.core import Lattice, Structure

from nanoos_fw.firetasks.featurization import FeatureParameters
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.stores.database import ensure_indexes
from nanoos_fw.stores.features import FeatureStore
from nanoos_fw.stores.structures import NewStructure, StructureStore

WORKER = Path(__file__).with_name("featurizing_worker.py")
WORKERS, STRUCTURES = 4, 3000
# How much is done when a worker is killed, and when the server goes away. What is
# counted is progress and not seconds: the machine may be slow.
KILL_AT = [STRUCTURES * tenths // 10 for tenths in (1, 4, 6, 8)]
CUT_AT = STRUCTURES // 4
OUTAGE_S = 2.0


def structure(number: int) -> Structure:
    a, metal = 3.0 + 1e-4 * number, ["Ni", "Ti", "Fe", "Co"][number % 4]
    cell = Structure(Lattice.cubic(a), ["Al", metal], [[0, 0, 0], [0.5, 0.5, 0.5]])
    # Every hundredth is quarantined.
    return Structure(Lattice.cubic(30 + a), ["Ar"], [[0] * 3]) if number % 100 == 0 \
        else cell * (2, 2, 2)  # fmt: skip


@pytest.mark.mongodb
@pytest.mark.slow
def test_killed_workers_leave_every_structure_once(
    mongodb_database: Any, proxy: DatabaseProxy, tmp_path: Path
) -> None:
    ensure_indexes(mongodb_database)
    entries = [NewStructure(structure(n), f"s{n}") for n in range(STRUCTURES)]
    keys = StructureStore(mongodb_database).add(entries, in_set="chaos").keys
    assert len(set(keys)) == STRUCTURES
    collection = mongodb_database["structure_features"]

    log = (tmp_path / "workers.log").open("ab")

    def start() -> subprocess.Popen[bytes]:
        uri = f"mongodb://127.0.0.1:{proxy.port}/?directConnection=true"
        return subprocess.Popen(
            [sys.executable, str(WORKER), uri, mongodb_database.name], stderr=log
        )

    def kill() -> int:
        """Kill one that runs, tell which, and note how much was done."""
        running = [n for n, w in enumerate(workers) if w.poll() is None]
        victim = random.choice(running)
        workers[victim].send_signal(signal.SIGKILL)
        workers[victim].wait()
        done_at_kill.append(collection.count_documents({}))
        return victim

    def log_says(words: str) -> bool:
        return words in (tmp_path / "workers.log").read_text()

    workers = [start() for _ in range(WORKERS)]
    begin, kills = time.monotonic(), list(KILL_AT)
    done_at_kill: list[int] = []
    restored = False
    try:
        while any(worker.poll() is None for worker in workers):
            assert time.monotonic() - begin < HANGING_S, (
                "the workers do not come to an end"
            )
            time.sleep(0.02)
            done = collection.count_documents({})
            if not restored and done > CUT_AT:
                proxy.cut()
                cut_at, done_at_cut = time.monotonic(), collection.count_documents({})
                while time.monotonic() < cut_at + OUTAGE_S or not log_says("again in"):
                    assert time.monotonic() - begin < HANGING_S, "nobody waits"
                    time.sleep(0.1)
                # Nothing has come through meanwhile but what was on its way.
                assert collection.count_documents({}) < done_at_cut + 20 * WORKERS + 1
                victim = kill()
                proxy.restore()
                restored = True
                workers[victim] = start()
            elif kills and kills[0] < done < STRUCTURES:
                kills.pop(0)
                workers[kill()] = start()
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0] * WORKERS
    log.close()
    assert restored
    assert proxy.cuts > 0
    told = (tmp_path / "workers.log").read_text()
    assert "again in" in told
    assert "server is back" in told
    # Enough of the kills came in the middle of the work.
    assert sum(0 < done < STRUCTURES for done in done_at_kill) >= 3, done_at_kill
    found = [d["structure"] for d in collection.find({}, {"structure": 1})]
    assert sorted(found) == sorted(keys)
    described = FeatureParameters().model_dump(mode="json")
    store = FeatureStore(mongodb_database)
    assert len(store.get(keys, described, FEATURE_VERSION)) == STRUCTURES * 99 // 100
    reasons = store.quarantined(keys, described, FEATURE_VERSION)
    assert len(reasons) == STRUCTURES // 100
    assert {error["kind"] for error in reasons.values()} == {"input"}
