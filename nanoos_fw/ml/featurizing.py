"""Featurization in a child process that may die of a structure, which is quarantined.

Most structures take a millisecond, and a few take for ever or all memory (a cell of
a hundred thousand sites, a cutoff far too large). No Python code can stop a compiled
neighbour search, so the guard is the kernel's:

* time: the child sets an interval timer before each structure and leaves SIGALRM to
  its default action, which ends the process even inside compiled code, and even when
  its parent is gone;
* memory: ``RLIMIT_DATA`` makes an allocation beyond the limit fail, and before that
  the expected number of neighbours, from cutoff and density, is compared with it.

The parent sees the pipe close, knows which structure the child was at, and starts
another child for the rest. A structure is quarantined only if a limit was exceeded, or
if the child crashed on it twice, alone (a segmentation fault, an abort). A child that
was killed from outside, by the OOM killer for example, says nothing of its structure: a
second such death is an error of the machine, and nothing is stored.

Small structures are featurized many in one call, which takes a tenth of the time.
All of them together may use what one may; where that is not enough, or the process
dies, they are featurized one by one, so that nobody is quarantined for another.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.errors import (
    InputError,
    LaunchError,
    MissingDependencyError,
    NanoOSError,
    OutOfMemoryError,
    OutOfTimeError,
    error_from_dict,
)
from nanoos_fw.faults import crashed, disk_full, how_it_ended, is_environment
from nanoos_fw.ml.piped_child import GONE, PipedChild, pipe_to_parent

if TYPE_CHECKING:
    from pymatgen.core import Structure

# Peak of building a graph of a large cell, per expected neighbour: arrays of the
# search, and their sorted copies.
_BYTES_PER_EDGE = 400
# Crashes on a structure that is alone, and kills from outside, that are put up with.
_CRASHES, _KILLS = 2, 2
# Mark of an error that says nothing of the structure: it ends the batch.
_OF_THE_MACHINE = "of_the_machine"
# Structures that share a call: no larger than this, and each expected to use at most
# this part of the memory that one may use, all of them four times as much.
_TOGETHER_SITES = 1000
_TOGETHER_SHARE = 1 / 16
_MIB = 1024 * 1024


# Packed graph, scalars, and the error of one that has none.
_Result = tuple[bytes, dict[str, float], dict[str, Any] | None]
_Answer = tuple[str, _Result]


class FeatureGuard(BaseModel):
    """What one structure may use before it is quarantined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout_s: float = Field(default=120.0, gt=0, le=1e9)
    memory_mb: int = Field(default=2048, ge=64, le=2**30, description="MiB")


@dataclass(frozen=True)
class Featurized:
    """The outcome of one structure: packed graph and scalars, or an error."""

    key: str
    graph: bytes
    scalars: dict[str, float]
    error: NanoOSError | None = None


def expected_edges(
    n_sites: int, volume_a3: float, cutoff_radius: float, max_neighbors: int | None
) -> float:
    """Return how many neighbours a search meets if atoms fill the cell evenly.

    With ``max_neighbors`` the search begins with a sphere of 2k + 1 neighbours.
    """
    per_atom = 4 / 3 * math.pi * cutoff_radius**3 * n_sites / volume_a3
    if max_neighbors is not None:
        per_atom = min(per_atom, 2 * max_neighbors + 1)
    return n_sites * per_atom


class FeaturizingChild:
    """A child process that featurizes structures one after the other.

    Starts with the first batch and again after a death; a context manager.

    Parameters
    ----------
    parameters
        Arguments of :func:`nanoos_fw.ml.features.extract_structure_features`, and
        ``vectors``: whether the graphs keep those of their edges.
    guard
        Limits of one structure.
    """

    def __init__(self, parameters: Mapping[str, Any], guard: FeatureGuard) -> None:
        self._parameters = dict(parameters)
        self._guard = guard
        self._child = PipedChild(__name__, "the featurizing process")

    def __enter__(self) -> FeaturizingChild:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def featurize(
        self, structures: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Featurized]:
        """Featurize encoded structures, whatever happens to some: small ones first.

        Parameters
        ----------
        structures
            ``crystals.encode_structure`` by key.

        Raises
        ------
        LaunchError
            If the child cannot start, or was ended from outside again and again.
        NanoOSError
            Another error of the machine: a package that is missing, a full disk.
        """
        left = dict(structures)
        crashes: dict[str, int] = {}
        kills = 0
        together = True
        while left and not self._child.closed:
            self._start()
            with contextlib.suppress(*GONE):
                self._child.send((left, together))
            while left:
                try:
                    answers = self._child.receive()
                except GONE:
                    # After the first answer, which is about those that share a call,
                    # the child goes through the rest in their order.
                    key = next(iter(left))
                    died = self._died(key)
                    if died is None:  # closed by another thread
                        return
                    if is_environment(died):
                        kills += 1
                        if kills >= _KILLS:
                            raise died from None
                    elif not together:
                        crashes[key] = crashes.get(key, 0) + 1
                        late = isinstance(died, OutOfTimeError)
                        if late or crashes[key] >= _CRASHES:
                            del left[key]
                            yield Featurized(key, b"", {}, died)
                    together = False
                    break
                together = False
                for key, answer in answers:
                    del left[key]
                    yield _outcome(key, answer)

    @property
    def pid(self) -> int | None:
        """Process id of the child, or None while there is none."""
        return self._child.pid

    def close(self) -> None:
        """End the child, for good: a batch that runs in another thread ends too."""
        self._child.close()

    def _start(self) -> None:
        if not self._child.start():
            return
        try:
            self._child.send((self._parameters, self._guard.model_dump()))
            self._child.receive()
        except GONE as error:
            raise LaunchError(
                "the featurizing process did not start",
                evidence={"exit_code": self._child.let_go()},
                advice="see what it printed above; memory_mb may be too low",
            ) from error

    def _died(self, key: str) -> NanoOSError | None:
        """Return what ended the child while it was at a structure; None: closing it."""
        code, guard = self._child.let_go(), self._guard
        if code is None or self._child.closed:
            return None
        evidence: dict[str, Any] = {"structure": key, "exit_code": code}
        if code == -signal.SIGALRM:
            return OutOfTimeError(
                f"featurizing took over {guard.timeout_s:g} s",
                evidence=evidence,
                advice="lower cutoff_radius, or retry with a longer timeout_s",
            )
        if crashed(code):
            return LaunchError(
                f"the featurizing process {how_it_ended(code)}",
                evidence={**evidence, "class": "crash"},
                advice="featurize this structure alone; report it if it crashes again",
            )
        return LaunchError(
            f"the featurizing process {how_it_ended(code)}, which the structure it was "
            "at is not held responsible for",
            evidence=evidence,
            advice="give the job more memory if the OOM killer did it, then rerun it: "
            "what was stored is kept",
        )


def _outcome(key: str, answer: tuple[bytes, dict[str, float], Any]) -> Featurized:
    graph, scalars, error = answer
    if error is not None and error.get(_OF_THE_MACHINE):
        raise error_from_dict(error)
    return Featurized(
        key, graph, scalars, None if error is None else error_from_dict(error)
    )


# ------------------------------------------------------------------ in the child


def _main() -> None:
    receive, answer = pipe_to_parent()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    parameters, limits = receive()
    guard = FeatureGuard(**limits)
    _warm_up(parameters)
    limit = _MemoryLimit(guard.memory_mb * _MIB)
    try:
        answer("ready")
        while True:
            left, together = receive()
            done: list[_Answer] = []
            if together:
                done = _guarded_together(left, parameters, guard, limit)
                answer(done)
            known = {key for key, _ in done}
            for key in (key for key in left if key not in known):
                answer([(key, _guarded(left[key], parameters, guard, limit))])
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is done, or gone


def _guarded(
    encoded: Mapping[str, Any],
    parameters: Mapping[str, Any],
    guard: FeatureGuard,
    limit: _MemoryLimit,
) -> _Result:
    """Featurize one structure within its time and memory."""
    signal.setitimer(signal.ITIMER_REAL, guard.timeout_s)
    try:
        with limit:
            result = _featurize(encoded, parameters, guard)
    except MemoryError:
        error = _too_large(guard, {}) if limit.ours else _no_memory(limit)
        result = (b"", {}, {**error.to_dict(), _OF_THE_MACHINE: not limit.ours})
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    return result


def _guarded_together(
    structures: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Any],
    guard: FeatureGuard,
    limit: _MemoryLimit,
) -> list[_Answer]:
    """Featurize the small structures in one call, or none if that does not work."""
    signal.setitimer(signal.ITIMER_REAL, guard.timeout_s)
    try:
        with limit:
            found = _featurize_together(structures, parameters, guard)
    except Exception:  # of memory, or of one structure: told when it is alone
        found = []
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    return found


def _featurize_together(
    structures: Mapping[str, Mapping[str, Any]],
    parameters: Mapping[str, Any],
    guard: FeatureGuard,
) -> list[_Answer]:
    from nanoos_fw.crystals import decode_arrays
    from nanoos_fw.ml.features import featurize_arrays
    from nanoos_fw.ml.graphs import read_arrays

    room = guard.memory_mb * _MIB * _TOGETHER_SHARE
    cutoff, kept = float(parameters["cutoff_radius"]), parameters.get("max_neighbors")
    small: dict[str, Mapping[str, Any]] = {}
    total = 0.0
    for key, encoded in structures.items():
        try:
            numbers, lattice, _ = decode_arrays(encoded)
        except NanoOSError:
            continue  # damaged
        volume = abs(float(np.linalg.det(lattice)))
        if len(numbers) > _TOGETHER_SITES or not volume > 0:
            continue
        needed = _BYTES_PER_EDGE * expected_edges(len(numbers), volume, cutoff, kept)
        if needed <= room and total + needed <= 4 * room:
            small[key] = encoded
            total += needed
    if not small:
        return []
    flat, _ = read_arrays(small.values())
    vectors = bool(parameters.get("vectors", False))
    found = featurize_arrays(flat, cutoff, kept, vectors=vectors)
    return [
        (
            key,
            (b"", {}, entry.to_dict())
            if isinstance(entry, InputError)
            else (*entry, None),
        )
        for key, entry in zip(small, found, strict=True)
    ]


def _featurize(
    encoded: Mapping[str, Any], parameters: Mapping[str, Any], guard: FeatureGuard
) -> tuple[bytes, dict[str, float], dict[str, Any] | None]:
    """Return packed graph, scalars and error of one structure."""
    from nanoos_fw.crystals import decode_structure

    try:
        structure = decode_structure(encoded)
        return (*_packed(structure, parameters, guard), None)
    except MissingDependencyError as error:
        return b"", {}, {**error.to_dict(), _OF_THE_MACHINE: True}
    except NanoOSError as error:
        return b"", {}, error.to_dict()
    except MemoryError:
        raise
    except Exception as error:  # of the science libraries: this structure's alone
        if is_environment(error):
            known = disk_full(error) or LaunchError(
                f"featurizing failed: {type(error).__name__}: {str(error)[:300]}",
                advice="mend that, then rerun this firework; nothing was stored",
            )
            return b"", {}, {**known.to_dict(), _OF_THE_MACHINE: True}
        unexpected = InputError(
            f"featurizing failed: {type(error).__name__}: {str(error)[:300]}",
            advice="featurize this structure alone to see the traceback",
        )
        return b"", {}, unexpected.to_dict()


def _packed(
    structure: Structure, parameters: Mapping[str, Any], guard: FeatureGuard
) -> tuple[bytes, dict[str, float]]:
    from nanoos_fw.ml.features import extract_structure_features, graph_from_repr
    from nanoos_fw.ml.graphs import pack_graph

    volume = float(structure.volume)
    if volume > 0 and math.isfinite(volume):
        edges = expected_edges(
            len(structure),
            volume,
            float(parameters["cutoff_radius"]),
            parameters.get("max_neighbors"),
        )
        if edges * _BYTES_PER_EDGE > guard.memory_mb * _MIB:
            raise _too_large(
                guard, {"n_sites": len(structure), "expected_neighbors": round(edges)}
            )
    arguments, vectors = _divided(parameters)
    graph_repr, scalars = extract_structure_features(structure, **arguments)
    graph = graph_from_repr(graph_repr)
    if vectors:
        kept = np.asarray(graph_repr["vectors"], dtype=np.float32)
        graph = replace(graph, vectors=kept)
    return pack_graph(graph, vectors=vectors), scalars


def _divided(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the arguments of the extraction, and whether vectors are kept."""
    arguments = dict(parameters)
    return arguments, bool(arguments.pop("vectors", False))


def _too_large(guard: FeatureGuard, evidence: dict[str, Any]) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"featurizing needs more than {guard.memory_mb} MiB",
        evidence={**evidence, "memory_mb": guard.memory_mb},
        advice="lower cutoff_radius, or retry with more memory_mb",
    )


def _no_memory(limit: _MemoryLimit) -> OutOfMemoryError:
    return OutOfMemoryError(
        "featurizing was refused memory within its own limit",
        evidence={"hard_limit_bytes": limit.hard},
        advice="raise the job's limit (ulimit -d), or lower memory_mb below it",
    )


def _warm_up(parameters: Mapping[str, Any]) -> None:
    """Import, read tables and compile before any structure's time runs."""
    from pymatgen.core import Lattice, Structure

    from nanoos_fw.ml.features import extract_structure_features

    copper = Structure(Lattice.cubic(3.6), ["Cu"], [[0, 0, 0]])
    with contextlib.suppress(NanoOSError):  # a cutoff that is too short, say
        extract_structure_features(copper, **_divided(parameters)[0])


class _MemoryLimit:
    """Let the process take so much beyond what it has now, inside of the block.

    Outside there is no limit, so that what went wrong can be told.
    """

    def __init__(self, n_bytes: int) -> None:
        # Not Linux: the estimate alone guards.
        self._bounds: tuple[int, int] | None = None
        self.hard = resource.RLIM_INFINITY
        self.ours = True  # whether it is our limit that is met first
        status = Path("/proc/self/status")
        if status.exists():
            lines = status.read_text().splitlines()
            line = next(line for line in lines if line.startswith("VmData:"))
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            limit = int(line.split()[1]) * 1024 + n_bytes
            self.hard = hard
            if hard != resource.RLIM_INFINITY:
                self.ours = limit <= hard
                limit = min(limit, hard)
            self._bounds = (limit, hard)

    def __enter__(self) -> None:
        if self._bounds is not None:
            resource.setrlimit(resource.RLIMIT_DATA, self._bounds)

    def __exit__(self, *_: object) -> None:
        if self._bounds is not None:
            hard = self._bounds[1]
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


if __name__ == "__main__":
    _main()
