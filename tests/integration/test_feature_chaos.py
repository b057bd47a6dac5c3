"""Workers that are killed while they featurize the same structures."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.firetasks.featurization import FeatureParameters
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.stores.database import ensure_indexes
from nanoos_fw.stores.features import FeatureStore
from nanoos_fw.stores.structures import NewStructure, StructureStore

WORKER = Path(__file__).with_name("featurizing_worker.py")
WORKERS, KILLS, STRUCTURES = 4, 5, 8000
KILL_EVERY_S, LIMIT_S = 2.5, 150.0


def structure(number: int) -> Structure:
    a, metal = 3.0 + 1e-4 * number, ["Ni", "Ti", "Fe", "Co"][number % 4]
    cell = Structure(Lattice.cubic(a), ["Al", metal], [[0, 0, 0], [0.5, 0.5, 0.5]])
    # Every hundredth is quarantined.
    return Structure(Lattice.cubic(30 + a), ["Ar"], [[0] * 3]) if number % 100 == 0 \
        else cell * (2, 2, 2)  # fmt: skip


@pytest.mark.mongodb
@pytest.mark.slow
def test_killed_workers_leave_every_structure_once(mongodb_database: Any) -> None:
    ensure_indexes(mongodb_database)
    entries = [NewStructure(structure(n), f"s{n}") for n in range(STRUCTURES)]
    keys = StructureStore(mongodb_database).add(entries, in_set="chaos").keys
    assert len(set(keys)) == STRUCTURES
    collection = mongodb_database["structure_features"]

    def start() -> subprocess.Popen[bytes]:
        uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
        return subprocess.Popen(
            [sys.executable, str(WORKER), uri, mongodb_database.name]
        )

    workers = [start() for _ in range(WORKERS)]
    begin, kills, done_at_kill = time.monotonic(), 0, []
    try:
        next_kill = begin + KILL_EVERY_S
        while any(worker.poll() is None for worker in workers):
            assert time.monotonic() - begin < LIMIT_S, (
                "the workers do not come to an end"
            )
            time.sleep(0.1)
            if kills < KILLS and time.monotonic() > next_kill:
                next_kill = time.monotonic() + KILL_EVERY_S
                running = [w for w in workers if w.poll() is None]
                victim = random.choice(running)
                done_at_kill.append(collection.count_documents({}))
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                workers[workers.index(victim)] = start()
                kills += 1
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0] * WORKERS
    # Enough of the kills came in the middle of the work.
    assert sum(0 < done < STRUCTURES for done in done_at_kill) >= 2, done_at_kill
    found = [d["structure"] for d in collection.find({}, {"structure": 1})]
    assert sorted(found) == sorted(keys)
    described = FeatureParameters().model_dump(mode="json")
    store = FeatureStore(mongodb_database)
    assert len(store.get(keys, described, FEATURE_VERSION)) == STRUCTURES * 99 // 100
    reasons = store.quarantined(keys, described, FEATURE_VERSION)
    assert len(reasons) == STRUCTURES // 100
    assert {error["kind"] for error in reasons.values()} == {"input"}
