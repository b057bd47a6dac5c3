"""Cached features: status, sizes, races, and the guard of single structures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from pymatgen.core import Lattice, Structure

from nanoos_fw.crystals import decode_structure, encode_structure
from nanoos_fw.errors import (
    CorruptArtifactError,
    DiskFullError,
    InputError,
    LaunchError,
    NanoOSError,
    OutOfMemoryError,
)
from nanoos_fw.firetasks import featurization
from nanoos_fw.firetasks.featurization import FeatureParameters, compute_features
from nanoos_fw.ml.features import (
    FEATURE_VERSION,
    extract_structure_features,
    graph_from_repr,
)
from nanoos_fw.ml.featurizing import FeatureGuard, FeaturizingChild, expected_edges
from nanoos_fw.ml.graphs import build_graph, pack_graph, unpack_graph
from nanoos_fw.operations.rules import failure_class
from nanoos_fw.stores.database import ensure_indexes
from nanoos_fw.stores.features import (
    HIT,
    MISSING,
    QUARANTINED,
    STALE,
    Features,
    FeatureStore,
)
from nanoos_fw.stores.structures import NewStructure, StructureStore

NARROW, WIDE = {"cutoff_radius": 5.0}, {"cutoff_radius": 8.0}
PARAMETERS = FeatureParameters()
DESCRIBED = PARAMETERS.model_dump(mode="json")


@pytest.fixture(
    params=[
        "embedded_database",
        pytest.param("mongodb_database", marks=pytest.mark.mongodb),
    ]
)
def database(request: pytest.FixtureRequest) -> Any:
    found = request.getfixturevalue(request.param)
    ensure_indexes(found)
    return found


def crystal(a: float = 3.6) -> Structure:
    return Structure(Lattice.cubic(a), ["Cu", "Au"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def isolated() -> Structure:
    return Structure(Lattice.cubic(30.0), ["Ar"], [[0, 0, 0]])


def stored(database: Any, *structures: Structure) -> list[str]:
    entries = [NewStructure(s, f"s{i}") for i, s in enumerate(structures)]
    return StructureStore(database).add(entries, in_set="all").keys


# ------------------------------------------------------------------------- store


def test_features_are_kept_by_parameters_and_version(database: Any) -> None:
    store = FeatureStore(database)
    entry = Features("key", b"graph", {"density": 8.9})
    store.put([entry], {"bad": InputError("atoms overlap")}, NARROW, 1)
    store.put([entry], {}, NARROW, 1)
    assert database["structure_features"].count_documents({}) == 2
    assert store.state(["key", "bad", "new"], NARROW, 1) == {
        "key": "ok",
        "bad": "quarantined",
    }
    assert store.state(["key"], WIDE, 1) == {}
    assert store.state(["key"], NARROW, 2) == {}
    assert store.get(["bad", "key"], NARROW, 1) == {"key": entry}
    assert store.graphs(["bad", "key"], NARROW, 1) == {"key": b"graph"}
    assert store.quarantined(["bad"], NARROW, 1)["bad"]["kind"] == "input"
    database["structure_features"].update_one(
        {"structure": "key"}, {"$set": {"graph": b"grapf"}}
    )
    with pytest.raises(CorruptArtifactError):
        store.get(["key"], NARROW, 1)


def test_the_status_tells_hit_stale_quarantined_and_missing(database: Any) -> None:
    store = FeatureStore(database)
    store.put([Features("hit", b"g", {})], {}, NARROW, 2)
    store.put([Features("hit", b"g", {}), Features("old", b"g", {})], {}, NARROW, 1)
    store.put([Features("wide", b"g", {})], {}, WIDE, 2)
    store.put([], {"bad": InputError("atoms overlap")}, NARROW, 2)
    status = store.status(["hit", "old", "wide", "bad", "new"], NARROW, 2)
    assert {key: entry.state for key, entry in status.items()} == {
        "hit": HIT,
        "old": STALE,
        "wide": STALE,
        "bad": QUARANTINED,
        "new": MISSING,
    }
    assert (status["old"].versions, status["wide"].versions) == ((1,), (2,))
    assert status["bad"].reason == "atoms overlap"
    assert status["hit"].reason == ""
    assert [e["version"] for e in store.entries("hit")] == [2, 1]


def test_features_replace_a_quarantine_and_not_the_other_way(database: Any) -> None:
    store = FeatureStore(database)
    entry, error = Features("key", b"graph", {}), InputError("too slow")
    store.put([], {"key": error}, NARROW, 1)
    store.put([entry], {}, NARROW, 1)
    store.put([], {"key": error, "other": error}, NARROW, 1)
    assert store.state(["key", "other"], NARROW, 1) == {
        "key": "ok",
        "other": "quarantined",
    }
    store.put([], {"key": error}, NARROW, 1, replace=True)
    assert store.state(["key"], NARROW, 1) == {"key": "quarantined"}
    assert database["structure_features"].count_documents({}) == 2


def test_a_large_graph_goes_to_the_artifacts(database: Any) -> None:
    store = FeatureStore(database, max_inline_bytes=1000)
    large, small = Features("large", os.urandom(5000), {}), Features("small", b"g", {})
    store.put([large, small], {}, NARROW, 1)
    documents = {d["structure"]: d for d in database["structure_features"].find()}
    assert documents["large"]["graph"] is None
    assert (documents["large"]["artifact"], documents["small"]["artifact"]) == (
        True,
        False,
    )
    assert database["artifacts.files"].count_documents({}) == 1
    assert FeatureStore(database).get(["small", "large"], NARROW, 1) == {
        "small": small,
        "large": large,
    }
    chunk = database["artifacts.chunks"].find_one({"n": 0})
    broken = bytes([bytes(chunk["data"])[0] ^ 1]) + bytes(chunk["data"])[1:]
    database["artifacts.chunks"].update_one(
        {"_id": chunk["_id"]}, {"$set": {"data": broken}}
    )
    with pytest.raises(CorruptArtifactError):
        store.get(["large"], NARROW, 1)


# ------------------------------------------------------------------------- guard


def test_the_expected_neighbors_are_those_of_a_dense_crystal() -> None:
    copper = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.615), ["Cu"], [[0] * 3])
    found = build_graph(copper, cutoff_radius=8.0, max_neighbors=None).n_edges
    assert expected_edges(4, copper.volume, 8.0, None) == pytest.approx(found, rel=0.1)
    assert expected_edges(4, copper.volume, 8.0, 12) == 4 * 25


def test_the_child_gives_what_the_library_gives_and_its_errors() -> None:
    structures = {"a": crystal(), "bad": isolated(), "b": crystal(4.0)}
    encoded = {key: encode_structure(s) for key, s in structures.items()}
    with FeaturizingChild(DESCRIBED, FeatureGuard()) as child:
        found = {result.key: result for result in child.featurize(encoded)}
        assert sorted(found) == ["a", "b", "bad"]
        for key in ("a", "b"):
            # To the rounding of a distance, which the compiler may choose.
            graph, own = unpack_graph(found[key].graph), build_graph(structures[key])
            np.testing.assert_array_equal(graph.edge_index, own.edge_index)
            assert len(found[key].graph) == len(pack_graph(own))
            assert found[key].scalars["n_sites"] == 2.0
        assert "isolated" in str(found["bad"].error)
        assert [r.key for r in child.featurize({"again": encoded["a"]})] == ["again"]


def test_what_exceeds_time_or_memory_is_named_and_the_rest_goes_on() -> None:
    # 36,000 sites, all neighbours within 6 Å.
    large = encode_structure(crystal(3.0) * (30, 30, 20))
    small = encode_structure(crystal())
    parameters = {"cutoff_radius": 6.0, "max_neighbors": None}
    batch = {"first": small, "large": large, "last": small}
    slow = FeatureGuard(timeout_s=0.3, memory_mb=60_000)
    with FeaturizingChild(parameters, slow) as child:
        results = list(child.featurize(batch))
    assert {r.key: r.error and r.error.kind for r in results} == {
        "first": None, "large": "out_of_time", "last": None,
    }  # fmt: skip
    with FeaturizingChild(parameters, FeatureGuard(memory_mb=64)) as child:
        results = list(child.featurize(batch))
    assert {r.key: r.error and r.error.kind for r in results} == {
        "first": None, "large": "out_of_memory", "last": None,
    }  # fmt: skip
    assert "64 MiB" in str(next(r.error for r in results if r.error))


def test_memory_beyond_the_estimate_is_refused_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    # A library that takes two gigabytes for one structure, whatever its size.
    spoil(monkeypatch, tmp_path, "numpy.ones(250_000_000)")
    with FeaturizingChild(DESCRIBED, FeatureGuard(memory_mb=500)) as child:
        results = list(child.featurize(THREE_AND_TWO))
    assert {r.key: r.error and r.error.kind for r in results} == {
        "three": "out_of_memory", "two": None,
    }  # fmt: skip


THREE_AND_TWO = {
    "three": encode_structure(
        Structure(Lattice.cubic(4), ["Cu"] * 3, [[0, 0, 0], [0.5] * 3, [0.5, 0, 0]])
    ),
    "two": encode_structure(crystal()),
}


def spoil(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, deed: str) -> None:
    """Let the child's library do something wherever a structure has three sites."""
    (tmp_path / "sitecustomize.py").write_text(
        "import nanoos_fw.ml.features as features\n"
        "import numpy, os, signal\n"
        "one, many = features.extract_structure_features, features.featurize_arrays\n"
        "def spoiled_one(structure, **parameters):\n"
        "    if len(structure) == 3:\n"
        f"        {deed}\n"
        "    return one(structure, **parameters)\n"
        "def spoiled_many(flat, *parameters):\n"
        "    if 3 in numpy.diff(flat.atom_start):\n"
        f"        {deed}\n"
        "    return many(flat, *parameters)\n"
        "features.extract_structure_features = spoiled_one\n"
        "features.featurize_arrays = spoiled_many\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("deed", "kind"),
    [
        ("while True: pass", "out_of_time"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "launch"),
        ("raise ZeroDivisionError('of the library')", "input"),
    ],
)
def test_one_structure_does_not_spoil_those_that_share_its_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, deed: str, kind: str
) -> None:
    spoil(monkeypatch, tmp_path, deed)
    with FeaturizingChild(DESCRIBED, FeatureGuard(timeout_s=1.0)) as child:
        results = {r.key: r for r in child.featurize(THREE_AND_TWO)}
    assert sorted(results) == ["three", "two"]
    assert results["three"].error is not None
    assert results["three"].error.kind == kind
    assert results["two"].graph == pack_graph(build_graph(crystal()))


@pytest.mark.parametrize("kept", [12, None])
def test_many_in_one_call_are_each_alone(
    monkeypatch: pytest.MonkeyPatch, kept: int | None
) -> None:
    rng = np.random.default_rng(0)
    batch: dict[str, Any] = {}
    for number in range(60):
        n = int(rng.integers(1, 9))
        lattice = Lattice(np.eye(3) * rng.uniform(3, 7) + rng.normal(size=(3, 3)) * 0.4)
        species = rng.choice(["Fe", "O", "Ar", "U", "Og", "H"], size=n)
        cell = Structure(lattice, list(species), rng.uniform(-1, 2, size=(n, 3)))
        batch[f"s{number}"] = encode_structure(cell)
    batch["alone"] = encode_structure(isolated())
    batch["damaged"] = {**batch["s0"], "lattice": b"\0" * 71}
    batch["flat"] = {**batch["s0"], "lattice": b"\0" * 72}
    parameters = {"cutoff_radius": 6.0, "max_neighbors": kept}

    def outcomes() -> dict[str, Any]:
        with FeaturizingChild(parameters, FeatureGuard()) as child:
            return {
                r.key: (r.graph, r.scalars, r.error and r.error.to_dict())
                for r in child.featurize(batch)
            }

    found = outcomes()
    assert set(found) == set(batch)
    for key, encoded in batch.items():
        try:
            structure = decode_structure(encoded)
            graph_repr, scalars = extract_structure_features(structure, **parameters)
        except NanoOSError as error:
            expected = (b"", {}, error.to_dict())
            assert found[key] == expected
        else:
            graph, ours, none = found[key]
            assert none is None
            assert graph == pack_graph(graph_from_repr(graph_repr))
            assert ours == scalars
    assert sum(error is None for _, _, error in found.values()) > 30
    assert sum(error is not None for _, _, error in found.values()) > 3


def test_a_child_that_is_killed_once_quarantines_nothing() -> None:
    encoded = {f"s{i}": encode_structure(crystal(3 + 0.01 * i)) for i in range(20)}
    with FeaturizingChild(DESCRIBED, FeatureGuard()) as child:
        results = []
        for result in child.featurize(encoded):
            results.append(result)
            if len(results) == 1 and child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)
    assert [r.key for r in results] == list(encoded)
    assert all(r.error is None for r in results)


@pytest.mark.parametrize(
    ("deed", "error", "failure"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", LaunchError, "killed"),
        ("os.kill(os.getpid(), signal.SIGTERM)", LaunchError, "killed"),
        ("os._exit(1)", LaunchError, "launch"),
        ("raise OSError(28, 'No space left on device', '/x')", DiskFullError, "disk"),
        ("raise ImportError('no numba here')", LaunchError, "launch"),
    ],
)
def test_what_the_machine_does_to_a_child_is_no_fault_of_its_structure(
    embedded_database: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    deed: str,
    error: type[NanoOSError],
    failure: str,
) -> None:
    ensure_indexes(embedded_database)
    three = decode_structure(THREE_AND_TWO["three"])
    keys = stored(embedded_database, three, crystal())
    with monkeypatch.context() as spoiled:
        spoil(spoiled, tmp_path, deed)
        with pytest.raises(error) as caught:
            compute_features(embedded_database, keys)
    assert failure_class(caught.value) == failure
    state = FeatureStore(embedded_database).state(keys, DESCRIBED, FEATURE_VERSION)
    assert QUARANTINED not in state.values()
    assert keys[0] not in state
    # On a machine that is well, by a plain rerun.
    report = compute_features(embedded_database, keys)
    assert len(report.hit) + len(report.computed) == 2


def test_memory_that_the_machine_refuses_is_no_fault_of_a_structure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    spoil(monkeypatch, tmp_path, "numpy.ones(500_000_000)")
    site = tmp_path / "sitecustomize.py"
    hard = 3 * 1024**3
    limit = f"resource.setrlimit(resource.RLIMIT_DATA, ({hard}, {hard}))"
    site.write_text(f"import resource\n{limit}\n{site.read_text()}")
    guard = FeatureGuard(memory_mb=60_000)
    with (
        FeaturizingChild(DESCRIBED, guard) as child,
        pytest.raises(OutOfMemoryError) as caught,
    ):
        list(child.featurize(THREE_AND_TWO))
    assert caught.value.evidence["hard_limit_bytes"] == hard
    assert failure_class(caught.value) == "oom"


def test_a_crash_is_told_with_its_evidence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    spoil(monkeypatch, tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
    with FeaturizingChild(DESCRIBED, FeatureGuard()) as child:
        (error,) = (r.error for r in child.featurize(THREE_AND_TWO) if r.error)
    assert "SIGSEGV" in error.message
    assert error.evidence == {
        "structure": "three", "exit_code": -signal.SIGSEGV, "class": "crash",
    }  # fmt: skip


# ----------------------------------------------------------------------- computing


def test_what_is_there_is_not_computed_again(database: Any) -> None:
    keys = stored(database, crystal(), crystal(4.0), isolated())
    seen: list[int] = []
    report = compute_features(
        database, keys, workers=2, on_progress=lambda r: seen.append(r.done)
    )
    assert report.counts() == {"hit": 0, "computed": 2, "quarantined": 1}
    assert "isolated" in report.status()[keys[2]].reason
    assert (seen[0], seen[-1]) == (0, 3)
    again = compute_features(database, [*keys, keys[0]])
    assert again.counts() == {"hit": 2, "computed": 0, "quarantined": 1}
    assert again.quarantined == report.quarantined
    retried = compute_features(database, keys, retry_quarantined=True)
    assert retried.counts() == {"hit": 2, "computed": 0, "quarantined": 1}
    forced = compute_features(database, keys, force_recompute=True)
    assert forced.counts() == {"hit": 0, "computed": 2, "quarantined": 1}
    other = compute_features(
        database, keys[:1], FeatureParameters(cutoff_radius=6.0, max_neighbors=None)
    )
    assert other.counts() == {"hit": 0, "computed": 1, "quarantined": 0}
    assert database["structure_features"].count_documents({}) == 4


def test_what_would_compute_nothing_is_refused(embedded_database: Any) -> None:
    with pytest.raises(InputError, match="workers must be at least 1"):
        compute_features(embedded_database, [], workers=0)
    # No clock and no limit of the kernel can be set to it.
    for beyond in ({"timeout_s": float("inf")}, {"memory_mb": 2**60}):
        with pytest.raises(ValidationError):
            FeatureGuard(**beyond)
    # Every structure would be quarantined for it.
    for wrong in ({"cutoff_radius": float("inf")}, {"max_neighbors": 70_000}):
        with pytest.raises(ValidationError):
            FeatureParameters(**wrong)


def test_an_interrupted_run_keeps_its_micro_batches(
    database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(featurization, "_JOB_STRUCTURES", 2)
    keys = stored(database, *(crystal(3 + 0.05 * i) for i in range(8)))

    class Killed(BaseException):
        pass

    def kill(report: Any) -> None:
        if report.done >= 4:
            raise Killed

    with pytest.raises(Killed):
        compute_features(database, keys, on_progress=kill)
    assert len(FeatureStore(database).state(keys, DESCRIBED, FEATURE_VERSION)) == 4
    report = compute_features(database, keys)
    assert report.counts() == {"hit": 4, "computed": 4, "quarantined": 0}


KILLED_WORKER = """
import os, signal, sys
import pymongo
from nanoos_fw.firetasks import featurization
from nanoos_fw.stores.structures import StructureStore

uri, name, job_size = sys.argv[1:]
featurization._JOB_STRUCTURES = int(job_size)
database = pymongo.MongoClient(uri)[name]
plain, computed = featurization.FeaturizingChild.featurize, []

def featurize(child, job):
    for result in plain(child, job):
        yield result
        computed.append(result.key)
    if len(computed) >= 3 * int(job_size):  # the last are not yet written
        print(*computed, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

featurization.FeaturizingChild.featurize = featurize
featurization.compute_features(database, StructureStore(database).keys("all"))
"""


@pytest.mark.mongodb
def test_a_killed_worker_loses_one_micro_batch(
    mongodb_database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_size, total = 4, 20
    ensure_indexes(mongodb_database)
    keys = stored(mongodb_database, *(crystal(3 + 0.02 * i) for i in range(total)))
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    words = [sys.executable, "-c", KILLED_WORKER, uri, mongodb_database.name]
    done = subprocess.run(
        [*words, str(job_size)], check=False, timeout=600, stdout=subprocess.PIPE
    )
    assert done.returncode == -signal.SIGKILL
    computed = set(done.stdout.decode().split())
    assert len(computed) == 3 * job_size
    collection = mongodb_database["structure_features"]
    kept = {d["structure"] for d in collection.find({}, {"structure": 1})}
    assert len(kept) == collection.count_documents({})
    # A micro-batch is two jobs: one is written while the next is computed. The third
    # is not begun before the first is in the store.
    assert kept < computed
    assert job_size <= len(kept) <= 2 * job_size
    monkeypatch.setattr(featurization, "_JOB_STRUCTURES", job_size)
    report = compute_features(mongodb_database, keys)
    assert set(report.hit) == kept
    assert set(report.computed) == set(keys) - kept
    assert collection.count_documents({}) == total
    state = FeatureStore(mongodb_database).state(keys, DESCRIBED, FEATURE_VERSION)
    assert state == dict.fromkeys(keys, "ok")


@pytest.mark.mongodb
def test_eight_workers_on_the_same_chunk_leave_one_entry_each(
    mongodb_database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(featurization, "_JOB_STRUCTURES", 5)
    ensure_indexes(mongodb_database)
    keys = stored(mongodb_database, *(crystal(3 + 0.02 * i) for i in range(40)))
    reports: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda: reports.append(compute_features(mongodb_database, keys))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.done for report in reports] == [40] * 8
    assert mongodb_database["structure_features"].count_documents({}) == 40
    state = FeatureStore(mongodb_database).state(keys, DESCRIBED, FEATURE_VERSION)
    assert state == dict.fromkeys(keys, "ok")
