from __future__ import annotations

import itertools
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from nanoos_fw.crystals import element_symbol, encode_structure, structure_key
from nanoos_fw.demo import demo_plan
from nanoos_fw.errors import CorruptArtifactError, InputError, NanoOSError
from nanoos_fw.firetasks import RankStreamTask, ScreenStreamTask
from nanoos_fw.firetasks.base import TaskContext
from nanoos_fw.firetasks.campaign_plan import CampaignPlan
from nanoos_fw.firetasks.screening import choose_window, run_window
from nanoos_fw.ml.candidate_filters import CandidateFilter, is_charge_balanced
from nanoos_fw.ml.candidate_packs import open_pack, read_files, write_pack
from nanoos_fw.ml.candidates import open_candidates
from nanoos_fw.ml.cgcnn import Architecture, ModelCard, atom_features, save_checkpoint
from nanoos_fw.ml.graphs import build_graph, read_arrays
from nanoos_fw.ml.network import CrystalGraphNetwork
from nanoos_fw.ml.permutations import permute
from nanoos_fw.ml.predictors import open_model
from nanoos_fw.ml.ranking import (
    Ranked,
    Ranking,
    distinct_structures,
    expected_improvement,
    normal_of,
    pareto_front,
    rank_top,
)
from nanoos_fw.ml.screening_engine import (
    ChunkResult,
    ModelColumns,
    ScreenSpec,
    chunk_starts,
    decode_chunk,
    encode_chunk,
    screen_chunk,
)
from nanoos_fw.ml.screening_worker import (
    ScreenJob,
    end_kept_workers,
    screen_chunks,
)
from nanoos_fw.operations.row_files import read_rows
from nanoos_fw.operations.screen_exports import export_screen, ranked_rows, rows_of
from nanoos_fw.reports.collect import collect_report
from nanoos_fw.settings import Settings
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.stores.screens import ScreenStore, register_screen
from nanoos_fw.stores.structures import NewStructure, StructureStore
from nanoos_fw.workflows import screening_workflow, window_workflow

ALLOYS = {
    "kind": "supercells",
    "prototype": "A1",
    "repeat": [2, 2, 1],
    "elements": [["Cu", "Au", "Ni"]],
}


def model_file(path, target="energy_per_atom", seed=0):
    sizes = Architecture(hidden_dim=8, num_layers=1, readout_dim=4)
    card = ModelCard(
        target_property=target,
        unit="eV/atom",
        target_mean=0.0,
        target_std=1.0,
        n_members=2,
        architecture=sizes,
        cutoff_radius=6.0,
        max_neighbors=8,
        elements=(28, 29, 79),
        dataset_hash="0",
        n_train=4,
    )
    torch.manual_seed(seed)
    states = [
        CrystalGraphNetwork(sizes, atom_features()).state_dict() for _ in range(2)
    ]
    return save_checkpoint(path, card, states, atom_features(), np.zeros(119))


@pytest.fixture
def database(embedded_database, tmp_path):
    for seed, name in enumerate(("energy", "gap")):
        target = {"energy": "energy_per_atom", "gap": "bandgap"}[name]
        model_file(tmp_path / name, target, seed)
        ModelRegistry(embedded_database).register(
            name=name, target=target, unit="eV/atom", model_type="CGCNN",
            weights=tmp_path / name, training_key=name, training_config={},
            metrics={}, dataset_info={}, environment={},
        )  # fmt: skip
    return embedded_database


def spec(**changes):
    given = {"candidates": ALLOYS, "models": ["energy@1", "gap@1"], "chunk": 16}
    return ScreenSpec.model_validate({**given, **changes})


# -------------------------------------------------------------------- sequences


@pytest.mark.parametrize("size", [2, 3, 17, 1000])
def test_permutation_is_one_to_one_and_the_same_in_any_window(size):
    whole = permute(np.arange(size), size, 5)
    assert sorted(whole.tolist()) == list(range(size))
    assert permute(np.arange(size // 2, size), size, 5).tolist() == (
        whole[size // 2 :].tolist()
    )
    if size == 1000:
        assert np.abs(np.corrcoef(whole, np.arange(size))[0, 1]) < 0.1


def test_supercells_are_all_decorations_and_unique_ones_all_classes():
    plain = open_candidates({**ALLOYS, "seed": None})
    flat = plain.window(0, len(plain))
    assert len(plain) == 3**4
    found = {tuple(row) for row in flat.numbers.reshape(-1, 4).tolist()}
    assert found == set(itertools.product((29, 79, 28), repeat=4))
    # Zen's rule, with a³/4 of the elements
    volumes = {28: 3.52**3 / 4, 29: 3.61**3 / 4, 79: 4.08**3 / 4}
    expected = [sum(volumes[z] for z in row) for row in flat.numbers.reshape(-1, 4)]
    np.testing.assert_allclose(np.linalg.det(flat.lattices), expected)

    unique = open_candidates({**ALLOYS, "unique": True, "seed": 3})
    kept = unique.window(0, 81).positions.tolist()
    crystals = [unique.structure(index) for index in kept]
    every = [plain.structure(index) for index in range(81)]
    matcher = StructureMatcher(primitive_cell=False, scale=False)
    assert len(matcher.group_structures(crystals)) == len(crystals)
    assert len(matcher.group_structures(every)) == len(crystals)


def test_windows_are_pieces_of_the_whole_sequence():
    nested = {
        "kind": "strain",
        "source": {
            "kind": "substitution",
            "source": {**ALLOYS, "unique": True},
            "replace": {"Cu": ["Cu", "Ag"], "Ni": ["Pd", "Pt"]},
            "volume_per_atom": {},
        },
        "strains": [[0.01, 0, 0, 0, 0, 0], [0, 0, 0, 0.02, 0, 0]],
    }
    source = open_candidates(nested)
    assert len(source) == 81 * 4 * 2
    whole = source.window(0, len(source))
    parts = [source.window(a, min(a + 37, len(source))) for a in range(0, 648, 37)]
    for name in ("numbers", "lattices", "frac_coords"):
        pieces = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(pieces, getattr(whole, name))
    placed = [p.positions + a for p, a in zip(parts, range(0, 648, 37), strict=True)]
    np.testing.assert_array_equal(np.concatenate(placed), whole.positions)
    # No element that is replaced for good is left, and no crystal comes twice.
    assert 28 not in whole.numbers
    assert source.elements() == {element_symbol(z) for z in {*whole.numbers.tolist()}}
    assert source.elements() == {"Cu", "Ag", "Au", "Pd", "Pt"}
    pairs = zip(whole.positions.tolist(), whole.atom_start[:-1].tolist(), strict=True)
    rows = [(p // 8, p % 2, whole.numbers[a : a + 4].tobytes()) for p, a in pairs]
    assert len(set(rows)) == len(rows)
    sheared = source.structure(int(whole.positions[1]))
    plain = open_candidates(nested["source"]).structure(int(whole.positions[1]) // 2)
    shear = [[0, 0, 0], [0, 0, 0.02], [0, 0.02, 0]]
    moved = plain.lattice.matrix @ (np.eye(3) + shear)
    np.testing.assert_allclose(sheared.lattice.matrix, moved, atol=1e-12)


def test_key_follows_the_candidates_only():
    key = open_candidates(ALLOYS).key()
    given = {**ALLOYS, "volume_per_atom": {"Cu": 3.61**3 / 4}}
    assert open_candidates(given).key() == key
    assert open_candidates({**ALLOYS, "seed": 1}).key() != key
    with pytest.raises(InputError, match="volume_per_atom has no value for O"):
        open_candidates({**ALLOYS, "elements": [["Cu", "O"]]})
    with pytest.raises(InputError, match="decorations, more than"):
        open_candidates({**ALLOYS, "repeat": [4, 4, 4]})
    with pytest.raises(InputError, match="cells of 1000000000 sites, more than"):
        open_candidates({**ALLOYS, "repeat": [1000, 1000, 1000], "together": True})


def test_every_setting_of_a_screening_is_part_of_its_key():
    otherwise = {
        "known_set": "mine", "coverage": 0.5, "chunk": 8, "cutoff_radius": 5.0,
        "max_neighbors": None,
    }  # fmt: skip
    filters = {
        "elements": ["Cu"], "require": ["Cu"], "exclude": ["Cu"], "n_elements": [1, 2],
        "n_sites": [1, 2], "fraction": {"Cu": [0.1, 0.2]}, "volume_per_atom": [9, 30],
        "min_distance": 1.0, "charge_balance": True,
    }  # fmt: skip
    apart = {"candidates", "models", "filters"}
    assert {*otherwise, *apart} == set(ScreenSpec.model_fields)
    assert set(filters) == set(CandidateFilter.model_fields)
    changes = [{}, *({name: value} for name, value in otherwise.items())]
    changes += [{"filters": {name: value}} for name, value in filters.items()]
    source, other = (open_candidates({**ALLOYS, "seed": seed}) for seed in (0, 1))
    base = {"candidates": ALLOYS, "models": ["m"]}
    plain = ScreenSpec.model_validate(base)
    keys = {
        ScreenSpec.model_validate({**base, **change}).key(source, ["w"], "k")
        for change in changes
    }
    keys |= {
        plain.key(other, ["w"], "k"), plain.key(source, ["w", "v"], "k"),
        plain.key(source, ["w"], "other"),
    }  # fmt: skip
    assert len(keys) == len(changes) + 3


def test_pack_gives_files_back_and_refuses_another_one(tmp_path, rock_salt, copper):
    (tmp_path / "cifs").mkdir()
    rock_salt.to(filename=str(tmp_path / "cifs" / "a.cif"), fmt="cif")
    copper.to(filename=str(tmp_path / "cifs" / "b.cif"), fmt="cif")
    (tmp_path / "cifs" / "c.cif").write_text("data_broken\n")
    report = write_pack(read_files([tmp_path / "cifs"]), tmp_path / "pack")
    assert (report.count, report.n_failures) == (3, 1)
    source = open_candidates(report.spec)
    assert [source.label(i) for i in range(2)] == ["a", "b"]
    assert source.unreadable(0, 3).tolist() == [False, False, True]
    assert "c.cif" in source.label(2) or source.failure(2)
    assert StructureMatcher().fit(source.structure(0), rock_salt)
    assert [len(source.structure(i)) for i in range(2)] == [8, 4]
    assert source.elements() == {e.symbol for e in rock_salt.composition} | {"Cu"}
    other = write_pack([("x", encode_structure(copper))], tmp_path / "other")
    with pytest.raises(CorruptArtifactError, match="another one"):
        open_pack(tmp_path / "pack", other.spec.key)
    with (tmp_path / "pack" / "numbers.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorruptArtifactError, match="damaged"):
        open_pack(tmp_path / "pack")


def test_a_row_with_broken_atomic_numbers_is_no_crystal(tmp_path, copper):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    row = {
        "numbers": [29.0] * 4,
        "lattice": copper.lattice.matrix.ravel().tolist(),
        "frac_coords": copper.frac_coords.ravel().tolist(),
    }
    rows = [row, {**row, "numbers": [29.0, 28.6, 29.0, 29.0]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    report = write_pack(read_files([tmp_path / "t.parquet"]), tmp_path / "pack")
    assert (report.count, report.n_failures) == (2, 1)
    assert "28.6" in report.failures[0]["error"]


# ---------------------------------------------------------------------- filters


def test_filters_judge_what_they_say(rock_salt, copper):
    vacancy = rock_salt.copy()
    vacancy.remove_sites([0])
    crystals = [rock_salt, copper, vacancy]
    flat, _ = read_arrays(crystals)

    def verdict(**given):
        return CandidateFilter(**given).status(flat).tolist()

    assert verdict(n_sites=(5, 8)) == [0, 2, 0]
    assert verdict(elements=("Na", "Cl", "K")) == [0, 3, 0]
    assert verdict(require=("Cl",), fraction={"Na": (0.5, 1)}) == [0, 3, 3]
    assert verdict(exclude=("Cu",), n_elements=(2, 2)) == [0, 3, 0]
    assert verdict(charge_balance=True) == [0, 4, 4]
    assert verdict(volume_per_atom=(5, 15)) == [5, 0, 5]
    assert verdict(n_sites=(4, 4), exclude=("Cu",)) == [2, 3, 2]
    with pytest.raises(InputError, match="least and a largest"):
        verdict(fraction={"Na": (0.8, 0.2)})
    assert is_charge_balanced(((26, 2), (8, 3)))  # Fe2O3
    assert not is_charge_balanced(((11, 1), (17, 2)))


# ----------------------------------------------------------------------- engine


def test_chunk_equals_predictions_one_by_one(tmp_path):
    model_file(tmp_path / "m")
    model = open_model(tmp_path / "m")
    described = spec(
        filters={"require": ["Cu"], "min_distance": 2.4},
        candidates={
            "kind": "strain",
            "source": {**ALLOYS, "unique": True},
            "strains": [[0] * 6, [-0.1] * 3 + [0] * 3],
        },
    )
    source = open_candidates(described.candidates)
    chunk = screen_chunk(source, [model], 10, 90, described)
    left_out = set(range(10, 90)) - set((10 + source.window(10, 90).positions).tolist())
    for index, status in zip(range(10, 90), chunk.status.tolist(), strict=True):
        if index in left_out:
            assert status == 1
            continue
        crystal = source.structure(index)
        distances = crystal.distance_matrix[~np.eye(4, dtype=bool)]
        images = crystal.lattice.get_lll_reduced_lattice().abc
        if "Cu" not in crystal.symbol_set:
            assert status == 3
        elif min(distances.min(), *images) < 2.4:
            assert status == 7
        else:
            assert status == 0
    assert {0, 1, 3, 7} == set(chunk.status.tolist())
    graphs = [
        build_graph(source.structure(i), cutoff_radius=6.0, max_neighbors=8)
        for i in chunk.indices.tolist()
    ]
    expected = model.predict_full(graphs)
    np.testing.assert_allclose(chunk.models[0].mean, expected.mean, rtol=1e-5)
    np.testing.assert_allclose(chunk.models[0].std, expected.std, rtol=1e-3, atol=1e-6)

    document = encode_chunk(chunk)
    again = decode_chunk(document)
    np.testing.assert_array_equal(again.models[0].mean, chunk.models[0].mean)
    np.testing.assert_array_equal(again.status, chunk.status)
    document["models"][0]["mean"] = b"\0" + document["models"][0]["mean"][1:]
    with pytest.raises(CorruptArtifactError, match="damaged"):
        decode_chunk(document)
    with pytest.raises(InputError, match="whole chunks"):
        chunk_starts(100, 16, 8, 32)


def test_a_killed_worker_loses_its_chunk_only(tmp_path):
    digest = model_file(tmp_path / "m")
    job = ScreenJob(
        spec(models=["m@1"]).model_dump(mode="json"), [(str(tmp_path / "m"), digest)]
    )
    answers = screen_chunks(job, [0, 16, 32, 48, 64, 80])
    found = {(first := next(answers))["start"]: first["sha256"]}
    children = _children_of(os.getpid())
    assert children
    for child in children:
        os.kill(child, signal.SIGKILL)
    found.update({d["start"]: d["sha256"] for d in answers})
    assert sorted(found) == [0, 16, 32, 48, 64, 80]
    undisturbed = {d["start"]: d["sha256"] for d in screen_chunks(job, sorted(found))}
    assert found == undisturbed


def test_kept_workers_go_on_with_the_next_firework_and_end_before_others(
    tmp_path, launchpad
):
    job, other = (
        ScreenJob(
            spec(models=[f"{name}@1"]).model_dump(mode="json"),
            [(str(tmp_path / name), model_file(tmp_path / name))],
        )
        for name in ("m", "o")
    )

    def answers(job, starts, **options):
        found = screen_chunks(job, starts, workers=2, **options)
        return {d["start"]: d["sha256"] for d in found}

    expected = answers(job, [0, 16, 32])
    assert not _children_of(os.getpid())
    try:
        assert answers(job, [0, 16], keep=True).items() <= expected.items()
        kept = set(_children_of(os.getpid()))
        assert len(kept) == 2
        assert answers(job, [16, 32], keep=True).items() <= expected.items()
        assert set(_children_of(os.getpid())) == kept
        # Of another screening they take the models; one that died is replaced.
        os.kill(kept.pop(), signal.SIGKILL)
        assert answers(other, [0, 16], keep=True) == answers(other, [0, 16])
        stopped = screen_chunks(job, [0, 16, 32], workers=2, keep=True)
        next(stopped)
        stopped.close()  # at the end of an allocation: some are in a chunk
        assert not _children_of(os.getpid())
        answers(job, [0], keep=True)
        assert _children_of(os.getpid())
        task = ScreenStreamTask(campaign="none", start=0, stop=16)
        task.launchpad = launchpad
        with pytest.raises(NanoOSError):
            task.run_task({})
        assert _children_of(os.getpid())  # it screens, too
        task = RankStreamTask(campaign="none", top_k=1)
        task.launchpad = launchpad
        with pytest.raises(NanoOSError):
            task.run_task({})
        assert not _children_of(os.getpid())
    finally:
        end_kept_workers()


def _children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123
        children = [int(word) for word in file.read().split()]
    for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
        with open(f"/proc/{pid}/task/{thread}/children") as file:  # noqa: PTH123
            children += [int(word) for word in file.read().split()]
    chosen = []
    for child in set(children):
        with open(f"/proc/{child}/cmdline") as file:  # noqa: PTH123
            if "screening_worker" in file.read():
                chosen.append(child)
    return chosen


# ---------------------------------------------------------------------- ranking


def made_up_chunks(n=200, chunk=16, seed=0):
    rng = np.random.default_rng(seed)
    values = np.round(rng.normal(size=(2, n)), 1).astype(np.float32)  # many ties
    std = rng.random((2, n)).astype(np.float32)
    status = (rng.random(n) < 0.2).astype(np.uint8)
    outside = rng.random(n) < 0.1
    chunks = []
    for start in range(0, n, chunk):
        places = np.arange(start, min(start + chunk, n))
        good = places[status[places] == 0]
        columns = tuple(
            ModelColumns(values[m][good], std[m][good], None, None, outside[good])
            for m in range(2)
        )
        known = good % 5 == 0
        chunks.append(ChunkResult(start, status[places], known, columns))
    taking_part = np.flatnonzero((status == 0) & ~outside)
    return chunks, values.astype(float), std.astype(float), taking_part


def test_streamed_ranking_equals_sorting_all():
    chunks, values, std, part = made_up_chunks()
    for objective, sign in (("min", 1), ("max", -1)):
        optimistic = values[0] - sign * 2 * std[0]
        for kind, scores in (("mean", values[0]), ("ucb", optimistic)):
            order = part[np.lexsort((part, sign * scores[part]))].tolist()
            ranking = Ranking(objective=objective, acquisition=kind, kappa=2.0)
            found = rank_top(reversed(chunks), 30, ranking)
            assert found.indices.tolist() == order[:30]
            assert found.n_ranked == len(part)
    fresh = rank_top(chunks, 500, Ranking(new_compositions=True)).indices
    assert set(fresh.tolist()) == {i for i in part.tolist() if i % 5}
    with pytest.raises(InputError, match="twice"):
        rank_top([*chunks, chunks[0]], 200, Ranking())
    with pytest.raises(InputError, match="no distance"):
        rank_top(chunks, 5, Ranking(min_novelty=0.1))


def test_acquisitions_are_what_the_formulas_say():
    gain, std = np.array([0.3, -0.5, 0.2, -0.1]), np.array([0.4, 0.7, 0.0, 0.0])
    draws = np.random.default_rng(1).normal(size=(200_000, 4)) * std + gain
    monte_carlo = np.maximum(draws, 0).mean(axis=0)
    np.testing.assert_allclose(expected_improvement(gain, std), monte_carlo, atol=4e-3)
    z = normal_of(np.arange(100_000), 7)
    assert abs(z.mean()) < 0.015
    assert abs(z.std() - 1) < 0.015
    assert abs(np.corrcoef(z[1:], z[:-1])[0, 1]) < 0.015
    np.testing.assert_array_equal(normal_of(np.arange(50, 60), 7), z[50:60])
    assert not np.allclose(normal_of(np.arange(10), 8), z[:10])


@pytest.mark.parametrize("field", ["kappa", "best", "min_novelty"])
def test_a_ranking_takes_no_number_that_is_not_finite(field):
    with pytest.raises(ValidationError):
        Ranking(**{field: math.nan if field == "best" else math.inf})


def test_streamed_pareto_front_equals_comparing_all_pairs():
    chunks, values, _, part = made_up_chunks(seed=2)
    rankings = [Ranking(model=0), Ranking(model=1, objective="max")]
    found = pareto_front(reversed(chunks), rankings)
    cost = np.stack([values[0], -values[1]], axis=1)

    def beats(j, i):
        return (cost[j] <= cost[i]).all() and (cost[j] < cost[i]).any()

    naive = [i for i in part.tolist() if not any(beats(j, i) for j in part)]
    assert sorted(found.indices.tolist()) == naive
    assert len(naive) > 2
    keys = [(*cost[i], i) for i in found.indices.tolist()]
    assert keys == sorted(keys)


def test_distinct_structures_drop_what_relaxed_into_another(copper, rock_salt):
    moved = copper.copy()
    moved.translate_sites(range(4), [0.1, 0.2, 0.3])
    larger = Structure(Lattice.cubic(4.2), copper.species, copper.frac_coords)
    assert distinct_structures([copper, rock_salt, moved, larger]) == [0, 1, 3]


# ------------------------------------------------------------- store and exports


def test_screening_is_stored_exactly_once_and_comes_back(database, tmp_path, copper):
    entry = NewStructure(structure=copper, label="Cu")
    StructureStore(database).add([entry], in_set="old")
    screen = register_screen(database, "alloys", spec(known_set="old"))
    assert register_screen(database, "alloys", spec(known_set="old")) == screen
    with pytest.raises(InputError, match="another screening"):
        register_screen(database, "alloys", spec(chunk=32))
    with pytest.raises(InputError, match="needs a name"):
        register_screen(database, " ", spec())
    store = ScreenStore(database)

    class Stop(Exception):  # noqa: N818
        pass

    def stop_after(done, _wall_s):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        run_window(database, screen, tmp_path / "w", on_chunk=stop_after)
    assert store.progress(screen).chunks == 2
    assert store.proof(screen)["missing"] == 81 - 32
    answer = run_window(database, screen, tmp_path / "w", workers=2)
    assert (answer["hit"], answer["written"], answer["chunks"]) == (2, 4, 6)
    assert run_window(database, screen, tmp_path / "w")["written"] == 0
    proof = store.proof(screen)
    assert (proof["outcomes"], proof["missing"], proof["repeated"]) == (81, 0, 0)
    chunks = list(store.chunks(screen.key))
    assert store.put_chunks(screen.key, [encode_chunk(chunks[0])]) == 0
    known = np.concatenate([chunk.known for chunk in chunks])
    (pure,) = np.flatnonzero(known)
    assert open_candidates(ALLOYS).structure(int(pure)).formula == "Cu4"
    assert store.chunk_of(screen, 37).start == 32
    size = sum(len(json.dumps(encode_chunk(c), default=len)) for c in chunks)
    assert size / 81 < 150

    window = choose_window(database, screen, tmp_path / "w", minutes=1e-4)
    assert window % 16 == 0
    for minutes in (0.0, 1e308, math.nan):
        with pytest.raises(InputError, match="minutes: take more than 0"):
            choose_window(database, screen, tmp_path / "w", minutes=minutes)
    workflow = window_workflow(screen, 32, str(tmp_path))
    tasks = [(t["start"], t["stop"]) for fw in workflow.fws for t in fw.tasks]
    assert tasks == [(0, 32), (32, 64), (64, 81)]

    ranked = rank_top(chunks, 7, Ranking())
    best = ranked_rows(store, screen, ranked)
    crystal = open_candidates(ALLOYS).structure(best[0]["candidate"])
    assert (
        crystal.composition.reduced_composition
        == (
            Structure(Lattice.cubic(9), *_atoms(best[0]["formula"])).composition
        ).reduced_composition
    )
    source = open_candidates(ALLOYS)
    everything = [row for chunk in chunks for row in rows_of(chunk, screen, source)]
    for suffix in ("csv", "jsonl", "parquet", "extxyz"):
        if suffix == "parquet":
            pytest.importorskip("pyarrow")
        path = tmp_path / f"all.{suffix}"
        assert export_screen(store, screen, path) == 81
        head, rows = read_rows(path)
        assert list(rows) == everything
        assert head["units"]["energy_per_atom.mean"] == "eV/atom"
        assert head["models"][1]["reference"] == "gap@1"
        export_screen(store, screen, path, ranked)
        rows = list(read_rows(path)[1])
        assert [r["candidate"] for r in rows] == ranked.indices.tolist()
        assert [r["score"] for r in rows] == ranked.scores.tolist()
    frames = [e.structure for e in _read_xyz(tmp_path / "all.extxyz")]
    assert StructureMatcher(scale=False).fit(frames[0], crystal)
    # Nothing takes part, as where all candidates are out of the model's domain.
    nothing = Ranked(np.zeros(0, dtype=np.int64), np.zeros(0), 0)
    assert ranked_rows(store, screen, nothing) == []
    assert export_screen(store, screen, tmp_path / "none.csv", nothing) == 0
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CorruptArtifactError, match="no export"):
        read_rows(tmp_path / "foreign.csv")


def test_a_campaign_selects_from_a_sequence(database, tmp_path):
    stream = {"candidates": ALLOYS, "chunk": 16, "candidates_per_firework": 40}
    plan = demo_plan("demo", tmp_path, tmp_path / "report.html")
    values = plan.model_dump(mode="json")
    assert "stream" not in values  # campaigns from before are the same ones
    plan = CampaignPlan.model_validate({**values, "stream": stream, "top_k": 5})
    assert CampaignPlan.model_validate(plan.model_dump(mode="json")) == plan
    place = TaskContext.on(
        database,
        settings=Settings(ranks=1),
        work_root=tmp_path,
    )
    place.campaigns.create("demo", plan.model_dump(mode="json"))
    place.campaigns.record("demo", model="energy@1")
    # All of them, one by one: the best has a label already.
    source = open_candidates(ALLOYS)
    crystals = [source.structure(i) for i in range(81)]
    model = place.models.load(place.models.get("energy@1"), threads=1)
    found, places, _ = model.predict_crystals(crystals)
    assert places.tolist() == list(range(81))
    means = found.mean.astype(np.float32)
    order = np.lexsort((np.arange(81), means))
    order = order[~found.out_of_domain[order]]
    first = NewStructure(structure=crystals[order[0]], label="known")
    (known,) = place.structures.add([first], in_set="demo/labelled").keys
    place.structures.add_to_set([known], "demo/candidates")
    keys = [structure_key(crystals[i]) for i in order]
    expected = [key for key in dict.fromkeys(keys) if key != known][:5]

    workflow = screening_workflow(plan, [known], [known])
    tasks = [task for fw in workflow.fws for task in fw.tasks]
    windows = [
        (t["start"], t["stop"]) for t in tasks if isinstance(t, ScreenStreamTask)
    ]
    assert windows == [(0, 32), (32, 64), (64, 81)]
    rank = RankStreamTask(campaign="demo", top_k=5)
    with pytest.raises(InputError, match="0 of 81 candidates"):
        rank.run(place)
    assert collect_report(database, "demo").funnel.screened.finished == 0
    for start, stop in windows:
        task = ScreenStreamTask(campaign="demo", start=start, stop=stop)
        assert task.run(place)["candidates"] == stop - start
    for _ in range(2):  # the second time nothing changes
        assert rank.run(place)["best"] == expected
        assert place.campaigns.output("demo", "ranking") == expected
        assert sorted(place.structures.keys("demo/selected")) == sorted(expected)
    rows = place.models.predictions("energy@1", expected)
    wanted = [float(means[order[keys.index(key)]]) for key in expected]
    np.testing.assert_allclose([row.prediction for row in rows], wanted, atol=1e-6)
    report = collect_report(database, "demo")
    assert report.funnel.screened.planned == report.funnel.screened.finished == 81
    assert report.funnel.candidates == 82
    assert [row.candidate_id for row in report.ranking.candidates] == expected
    assert report.ranking.n_ranked == len(order)
    with pytest.raises(InputError, match="fewer than top_k = 500"):
        RankStreamTask(campaign="demo", top_k=500).run(place)


def test_what_a_filter_leaves_out_is_no_failure_of_a_campaign(database, tmp_path):
    values = demo_plan("demo", tmp_path, tmp_path / "report.html").model_dump()
    stream = {"candidates": ALLOYS, "filters": {"n_elements": [2, 2]}}
    plan = CampaignPlan.model_validate({**values, "stream": stream})
    place = TaskContext.on(database, settings=Settings(ranks=1), work_root=tmp_path)
    place.campaigns.create("demo", plan.model_dump(mode="json"))
    place.campaigns.record("demo", model="energy@1")
    source = open_candidates(ALLOYS)
    labelled = NewStructure(structure=source.structure(0), label="labelled")
    for name in ("demo/labelled", "demo/candidates"):
        place.structures.add([labelled], in_set=name)
    ScreenStreamTask(campaign="demo", start=0, stop=81).run(place)
    fitting = sum(len(source.structure(i).composition) == 2 for i in range(81))
    screened = collect_report(database, "demo").funnel.screened
    assert 0 < fitting < 81
    assert screened.planned == screened.finished == fitting
    assert screened.failed == 0


def _atoms(formula):
    from pymatgen.core import Composition

    species = [str(e) for e, n in Composition(formula).items() for _ in range(int(n))]
    return species, [[0.1 * i, 0, 0] for i in range(len(species))]


def _read_xyz(path):
    from nanoos_fw.structure_files import read_structures

    return read_structures(path)
