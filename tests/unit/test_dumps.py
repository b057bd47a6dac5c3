"""Dump files: every format gives the same frames, wherever the file is cut."""

from __future__ import annotations

import gzip
import io

import numpy as np
import pytest
from dump_writer import binary_frame, bounding_box

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.md.binary_dumps import BLOCK_BYTES
from nanoos_fw.md.trajectory import Trajectory, open_dump, read_frames

MATRIX = np.array([[5.0, 0, 0], [-1.2, 4.0, 0], [0.7, -0.9, 6.0]])
ORIGIN = np.array([1.0, -2.0, 0.5])
COLUMNS = "id type xu yu zu vx vy vz"


def atoms(step, n=5, order=None):
    """Rows of atoms; every number tells of its step and atom."""
    rng = np.random.default_rng(step)
    rows = np.column_stack(
        [
            np.arange(1, n + 1),
            1 + np.arange(n) % 2,
            rng.normal(size=(n, 3)) * 9.0 + step,
            rng.normal(size=(n, 3)),
        ]
    )
    return rows if order is None else rows[order]


def binary(step, rows, matrix=MATRIX, columns=COLUMNS, **options):
    return binary_frame(step, rows, matrix, columns, origin=ORIGIN, **options)


def text(step, rows, matrix=MATRIX, columns=COLUMNS, time=None):
    low, high, tilts = bounding_box(matrix, ORIGIN)
    out = io.StringIO()
    if time is not None:
        out.write(f"ITEM: TIME\n{time}\n")
    out.write(f"ITEM: TIMESTEP\n{step}\nITEM: NUMBER OF ATOMS\n{len(rows)}\n")
    out.write(f"ITEM: BOX BOUNDS {'xy xz yz ' if any(tilts) else ''}pp pp pp\n")
    for a, b, tilt in zip(low, high, tilts, strict=True):
        out.write(f"{a:.17g} {b:.17g}" + (f" {tilt:.17g}\n" if any(tilts) else "\n"))
    out.write(f"ITEM: ATOMS {columns}\n")
    for row in rows:
        out.write(" ".join(f"{x:.17g}" for x in row) + " \n")
    return out.getvalue().encode()


def packed(data):
    return gzip.compress(data, mtime=0)


def same_frames(path, steps, n=5):
    trajectory = Trajectory(path)
    assert trajectory.step.tolist() == list(steps)
    for frame, matrix in zip(trajectory, trajectory.matrix, strict=True):
        rows = atoms(frame.step, n)
        np.testing.assert_allclose(frame.matrix, MATRIX, atol=1e-13)
        np.testing.assert_array_equal(frame.matrix, matrix)
        assert frame.types.tolist() == rows[:, 1].tolist()
        np.testing.assert_allclose(frame.positions, rows[:, 2:5] - ORIGIN, atol=1e-12)
        np.testing.assert_array_equal(frame.velocities, rows[:, 5:])
        assert frame.unwrapped
    return trajectory


STEPS = (0, 5, 10, 15)
SHUFFLED = [3, 0, 4, 2, 1]


@pytest.mark.parametrize(
    "data",
    {
        "sorted": [binary(s, atoms(s)) for s in STEPS],
        "by rank": [binary(s, atoms(s, order=SHUFFLED), chunks=3) for s in STEPS],
        "unsorted": [binary(s, atoms(s, order=SHUFFLED)) for s in STEPS],
        "an idle rank": [binary(s, atoms(s), chunks=7) for s in STEPS],
        "big endian": [binary(s, atoms(s), order=">") for s in STEPS],
        "big endian by rank": [binary(s, atoms(s), order=">", chunks=2) for s in STEPS],
        "units once": [
            binary(s, atoms(s), units=b"" if s else b"metal", time=s / 7) for s in STEPS
        ],
        "text": [text(s, atoms(s, order=SHUFFLED)) for s in STEPS],
        "text with time": [text(s, atoms(s), time=s / 7) for s in STEPS],
        "gzip": [packed(b"".join(text(s, atoms(s)) for s in STEPS))],
        "gzip members": [packed(text(s, atoms(s))) for s in STEPS],
        "binary, then other ranks": [
            binary(s, atoms(s), chunks=1 if s < 10 else 2) for s in STEPS
        ],
    }.items(),
    ids=lambda item: item[0],
)
def test_every_format_gives_the_same_frames(tmp_path, data):
    path = tmp_path / "dump"
    path.write_bytes(b"".join(data[1]))
    assert not same_frames(path, STEPS).is_cut


@pytest.mark.parametrize("kind", ["binary", "by rank", "big endian", "text", "gzip"])
def test_a_dump_cut_at_any_byte_gives_its_whole_frames_and_a_flag(tmp_path, kind):
    frame = {
        "binary": lambda s: binary(s, atoms(s)),
        "by rank": lambda s: binary(s, atoms(s, order=SHUFFLED), chunks=3),
        "big endian": lambda s: binary(s, atoms(s), order=">"),
    }.get(kind, lambda s: text(s, atoms(s)))
    frames = [frame(s) for s in STEPS[:2]]
    data = packed(b"".join(frames)) if kind == "gzip" else b"".join(frames)
    ends = np.cumsum([len(f) for f in frames])
    path = tmp_path / "dump"
    found = []
    for end in range(len(data)):
        path.write_bytes(data[:end])
        n_whole = int((ends <= end).sum())
        if kind == "gzip":
            # How much of the text comes out of a cut stream is zlib's matter.
            trajectory = Trajectory(path)
            found.append(len(trajectory))
            assert trajectory.is_cut == (end > 0)
            assert [f.step for f in trajectory] == list(STEPS[: found[-1]])
            continue
        trajectory = Trajectory(path)
        assert trajectory.step.tolist() == list(STEPS[:n_whole])
        assert trajectory.is_cut == (end not in (0, *ends))
        for f in trajectory:
            np.testing.assert_allclose(
                f.positions, atoms(f.step)[:, 2:5] - ORIGIN, atol=1e-12
            )
    if kind == "gzip":
        assert found == sorted(found)
        assert set(found) == {0, 1, 2}


def test_a_rerun_appended_to_a_cut_file_replaces_what_it_computes_again(tmp_path):
    path = tmp_path / "dump"
    stale = [text(s, atoms(s) + 1.0 * (np.arange(8) > 1)) for s in (10, 15)]
    cut = text(20, atoms(20))[:-30]
    fresh = [text(s, atoms(s)) for s in (10, 15, 20)]
    path.write_bytes(
        b"".join([text(0, atoms(0)), text(5, atoms(5)), *stale, cut, *fresh])
    )
    assert same_frames(path, (0, 5, 10, 15, 20)).is_cut


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_part_of_the_atoms_is_that_part_of_all(tmp_path, chunks):
    path = tmp_path / "dump.bin"
    n = 40
    path.write_bytes(b"".join(binary(s, atoms(s, n), chunks=chunks) for s in STEPS))
    trajectory = Trajectory(path)
    whole = np.concatenate([b.positions for b in trajectory.blocks()])
    for part in (slice(0, 7), slice(7, 40), slice(39, 40)):
        blocks = list(trajectory.blocks(part))
        np.testing.assert_array_equal(
            np.concatenate([b.positions for b in blocks]), whole[:, part]
        )
        assert blocks[0].ids.tolist() == list(range(1, n + 1))[part]


def test_ids_with_gaps_are_kept_and_a_change_of_atoms_is_refused(tmp_path):
    path = tmp_path / "dump.bin"

    def group(step, ids):
        rows = atoms(step, 9)[np.array(ids) - 1]
        return binary(step, rows)

    path.write_bytes(group(0, [2, 5, 9]) + group(5, [9, 2, 5]))
    blocks = list(Trajectory(path).blocks(slice(1, 3)))
    assert [b.ids.tolist() for b in blocks] == [[5, 9]]
    np.testing.assert_allclose(
        blocks[0].positions[1], atoms(5, 9)[[4, 8], 2:5] - ORIGIN, atol=1e-12
    )
    path.write_bytes(group(0, [2, 5, 9]) + group(5, [2, 6, 9]))
    with pytest.raises(InputError, match="atoms change between steps 0 and 5"):
        list(read_frames(path))
    path.write_bytes(group(0, [2, 5, 5]))
    with pytest.raises(CorruptArtifactError, match="an atom twice"):
        list(read_frames(path))


def test_a_number_of_atoms_that_changes_gives_frames_of_both_sizes(tmp_path):
    path = tmp_path / "dump.bin"
    sizes = {0: 5, 5: 5, 10: 3, 15: 5}
    path.write_bytes(b"".join(binary(s, atoms(s, n)) for s, n in sizes.items()))
    trajectory = Trajectory(path)
    assert trajectory.n_atoms.tolist() == list(sizes.values())
    assert [len(f.types) for f in trajectory] == list(sizes.values())


@pytest.mark.parametrize("kind", ["binary", "text"])
@pytest.mark.parametrize(
    ("columns", "unwrapped"),
    [
        ("id type x y z ix iy iz", True),
        ("id type xs ys zs ix iy iz", True),
        ("id type xsu ysu zsu", True),
        ("zu id yu type xu", True),
        ("id type x y z", False),
        ("id type xs ys zs", False),
    ],
)
def test_positions_of_every_kind_of_column(tmp_path, kind, columns, unwrapped):
    rng = np.random.default_rng(1)
    scaled, images = rng.uniform(size=(6, 3)), rng.integers(-3, 4, size=(6, 3))
    values = {"id": np.arange(1, 7), "type": np.full(6, 2)}
    for k, axis in enumerate("xyz"):
        whole = (scaled + images) @ MATRIX
        values |= {
            axis: (scaled @ MATRIX + ORIGIN)[:, k],
            f"i{axis}": images[:, k],
            f"{axis}s": scaled[:, k],
            f"{axis}su": (scaled + images)[:, k],
            f"{axis}u": (whole + ORIGIN)[:, k],
        }
    rows = np.column_stack([values[name] for name in columns.split()])
    path = tmp_path / "dump"
    path.write_bytes({"binary": binary, "text": text}[kind](0, rows, columns=columns))
    (frame,) = read_frames(path)
    expected = (scaled + (images if unwrapped else 0)) @ MATRIX
    np.testing.assert_allclose(frame.positions, expected, atol=1e-12)
    assert frame.unwrapped is unwrapped
    assert frame.velocities is None


def test_words_in_text_columns_are_passed_over(tmp_path):
    path = tmp_path / "dump"
    head, _, body = text(0, atoms(0)).partition(b"ITEM: ATOMS ")
    lines = body.decode().splitlines()
    named = ["element " + lines[0], *(f"Cu {line}" for line in lines[1:])]
    path.write_bytes(head + b"ITEM: ATOMS " + "\n".join(named).encode() + b"\n")
    same_frames(path, [0])


def test_frames_by_step_and_parts(tmp_path):
    path = tmp_path / "dump.bin"
    path.write_bytes(b"".join(binary(s, atoms(s)) for s in STEPS))
    trajectory = Trajectory(path)
    np.testing.assert_array_equal(
        trajectory.at(10).positions, list(trajectory)[2].positions
    )
    assert trajectory.interval() == 5
    assert trajectory[1::2].step.tolist() == [5, 15]
    assert [f.step for f in trajectory[1::2]] == [5, 15]
    assert trajectory.after(5).step.tolist() == [10, 15]
    for step in (-5, 7, 20):
        with pytest.raises(InputError, match=f"no frame of step {step}"):
            trajectory.at(step)
    with pytest.raises(InputError, match="not equally spaced"):
        _uneven(tmp_path).interval()
    with pytest.raises(InputError, match="no interval"):
        trajectory[:1].interval()


def _uneven(folder):
    path = folder / "uneven"
    path.write_bytes(b"".join(binary(s, atoms(s)) for s in (0, 5, 15)))
    return Trajectory(path)


def test_blocks_are_bounded_whatever_the_length(tmp_path):
    path = tmp_path / "dump.bin"
    n, frames = 500, 300
    rows = atoms(0, n)
    path.write_bytes(b"".join(binary(s, rows) for s in range(frames)))
    blocks = list(Trajectory(path).blocks())
    assert sum(len(b.step) for b in blocks) == frames
    assert max(len(b.step) for b in blocks) <= BLOCK_BYTES // (8 * 8 * n)
    assert len(blocks) > 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello, world, this is no dump", "not a LAMMPS binary dump"),
        (b"ITEM; TIMESTEP\n", "not a LAMMPS"),
        (
            b"ITEM: TIMESTEP\n0\nITEM: NUMBER OF ATOMS\n1\nwords\nITEM: ATOMS id\n",
            "line",
        ),
        (b"ITEM: TIMESTEP\n0\nITEM: ATOMS id type x y z\n", "without step"),
        (text(0, atoms(0)).replace(b"type", b"mass"), "without type"),
        (text(0, atoms(0)).replace(b" xu", b" fx"), "without positions"),
        (binary(0, atoms(0)).replace(b" type", b" mass"), "without type"),
        (text(0, atoms(0)).replace(b"\n2 2 ", b"\n2 x "), "not 8 numbers"),
        (packed(b"no dump at all, but packed"), "not a LAMMPS dump"),
        (binary(0, atoms(0))[:-8] + binary(5, atoms(5)), "not a LAMMPS binary dump"),
    ],
)
def test_what_is_no_dump_is_refused(tmp_path, data, message):
    path = tmp_path / "dump"
    path.write_bytes(data)
    with pytest.raises((CorruptArtifactError, InputError), match=message):
        list(read_frames(path))


def test_a_packed_file_with_a_wrong_checksum_is_refused(tmp_path):
    data = bytearray(packed(text(0, atoms(0))))
    data[-6] ^= 1
    path = tmp_path / "dump.gz"
    path.write_bytes(data)
    with pytest.raises(CorruptArtifactError, match="cannot be unpacked"):
        open_dump(path)
