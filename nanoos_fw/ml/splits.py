"""Splits of the rows of a dataset into parts, and what leaks between parts."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable

if TYPE_CHECKING:
    from nanoos_fw.ml.datasets import DatasetConfig

SplitStrategy = Literal[
    "random", "composition", "kfold", "composition-kfold", "time", "stable"
]

_MAX_LISTED = 20


def reduced_formulas(graphs: GraphTable) -> list[str]:
    """Return the reduced formula of each graph, symbols in alphabetical order."""
    symbols = _symbols()
    # Pairs of graph and element, each with its number of atoms.
    graph = np.repeat(np.arange(len(graphs)), graphs.graph_sizes)
    pairs, counts = np.unique(
        graph * 128 + np.asarray(graphs.numbers), return_counts=True
    )
    amounts: list[list[tuple[str, int]]] = [[] for _ in range(len(graphs))]
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        amounts[pair // 128].append((symbols[pair % 128], count))
    formulas = []
    for content in amounts:
        divisor = math.gcd(*(count for _, count in content))
        formulas.append(
            "".join(
                symbol if count == divisor else f"{symbol}{count // divisor}"
                for symbol, count in sorted(content)
            )
        )
    return formulas


@functools.cache
def _symbols() -> tuple[str, ...]:
    """Return the symbols of the elements by atomic number."""
    from pymatgen.core.periodic_table import Element

    return ("", *(str(Element.from_Z(z).symbol) for z in range(1, 119)))


@dataclass(frozen=True)
class Leakage:
    """What validation and test share with other parts.

    Parameters
    ----------
    structures
        Groups of ids that have the same graph and are in different parts: the same
        structure under two names, or two that the model cannot tell apart.
    formulas
        Reduced formulas with rows in different parts, and how many rows each part
        has. Expected in a random split: polymorphs are then known when others of
        their formula are predicted.
    """

    structures: list[list[str]]
    formulas: dict[str, dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        """Return counts and the first of each kind as JSON-compatible values."""
        return {
            "same_structure": len(self.structures),
            "same_formula": len(self.formulas),
            "structures": self.structures[:_MAX_LISTED],
            "formulas": dict(list(self.formulas.items())[:_MAX_LISTED]),
        }


def find_leakage(
    ids: Sequence[str],
    parts: Sequence[str],
    digests: Sequence[str] | Sequence[bytes],
    formulas: Sequence[str],
) -> Leakage:
    """Return what is in more than one part.

    Parameters
    ----------
    ids, parts, digests, formulas
        Of each row: id, part, hash of the graph, reduced formula. Rows that are in
        none of ``train``, ``val``, ``test`` leak nothing.
    """
    judged = ("train", "val", "test")
    known: set[Any] = set()
    repeated: set[Any] = set()
    for digest, part in zip(digests, parts, strict=True):
        if part in judged:
            (repeated if digest in known else known).add(digest)
    same_graph: dict[Any, dict[str, str]] = {}
    same_formula: dict[str, dict[str, int]] = {}
    for row, part, digest, formula in zip(ids, parts, digests, formulas, strict=True):
        if part not in judged:
            continue
        if digest in repeated:
            same_graph.setdefault(digest, {})[row] = part
        counts = same_formula.setdefault(formula, {})
        counts[part] = counts.get(part, 0) + 1
    return Leakage(
        structures=sorted(
            sorted(rows) for rows in same_graph.values() if len(set(rows.values())) > 1
        ),
        formulas={
            f: dict(sorted(counts.items()))
            for f, counts in sorted(same_formula.items())
            if len(counts) > 1
        },
    )


def split_rows(
    ids: Sequence[str],
    formulas: Sequence[str],
    times: Sequence[str] | None,
    config: DatasetConfig,
) -> list[str]:
    """Return the part of each row: groups dealt out by a hash of seed and name.

    A structure keeps its place in the hash order when others are added, so growing
    a dataset moves few rows from one part to another.
    """
    if config.split == "stable":
        return _by_hash(ids, config)
    if config.split == "time":
        groups = [[row] for row in _newest_first(ids, times)]
    else:
        names = list(ids)
        if config.split.startswith("composition"):
            names = list(formulas)
        members: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            members.setdefault(name, []).append(row)
        order = sorted(members, key=lambda name: _dealing_key(config.seed, name))
        groups = [members[name] for name in order]
    n_rows = len(ids)
    parts = ["train"] * n_rows
    if config.split.endswith("kfold"):
        shares = _even_shares(groups, config.n_folds)
        rest = [group for n, share in enumerate(shares) if n != config.fold
                for group in share]  # fmt: skip
        # In the order of the hash again: the shares must not decide the rest.
        place = {id(group): number for number, group in enumerate(groups)}
        rest.sort(key=lambda group: place[id(group)])
        test = shares[config.fold]
        n_rest = sum(map(len, rest))
        share = config.val_fraction / (config.train_fraction + config.val_fraction)
        n_val = round(share * n_rest)
    else:
        test, rest = _take(groups, round(config.test_fraction * n_rows))
        n_val = round(config.val_fraction * n_rows)
    val, train = _take(rest, n_val)
    if not train:
        raise InputError(
            f"{n_rows} rows in {len(groups)} groups leave none to train on",
            advice="label more structures or raise train_fraction",
        )
    for name, chosen in (("test", test), ("val", val)):
        for group in chosen:
            for row in group:
                parts[row] = name
    return parts


def _dealing_key(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _by_hash(ids: Sequence[str], config: DatasetConfig) -> list[str]:
    """Return the part that the hash of each row alone decides."""
    parts = []
    for name in ids:
        place = int.from_bytes(_dealing_key(config.seed, name)[:8], "big") / 2.0**64
        if place < config.test_fraction:
            parts.append("test")
        elif place < config.test_fraction + config.val_fraction:
            parts.append("val")
        else:
            parts.append("train")
    if "train" not in parts:
        raise InputError(
            f"{len(ids)} rows leave none to train on",
            advice="label more structures or raise train_fraction",
        )
    return parts


def _take(
    groups: list[list[int]], n_rows: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the first groups that hold about so many rows, and the others."""
    taken = number = 0
    for group in groups:
        # A group that would miss the number by more than it is missed now stays.
        if n_rows - taken <= abs(n_rows - taken - len(group)):
            break
        taken += len(group)
        number += 1
    return groups[:number], groups[number:]


def _even_shares(groups: list[list[int]], n_folds: int) -> list[list[list[int]]]:
    """Deal groups out so that each goes to the share that has the fewest rows."""
    if len(groups) < n_folds:
        raise InputError(
            f"{len(groups)} groups cannot be dealt out to {n_folds} folds",
            advice="lower n_folds or label more structures",
        )
    shares: list[list[list[int]]] = [[] for _ in range(n_folds)]
    sizes = [0] * n_folds
    for group in groups:
        smallest = sizes.index(min(sizes))
        shares[smallest].append(group)
        sizes[smallest] += len(group)
    return shares


def _newest_first(ids: Sequence[str], times: Sequence[str] | None) -> list[int]:
    missing = list(ids)
    if times is not None:
        missing = [name for name, t in zip(ids, times, strict=True) if not t]
    if times is None or missing:
        raise InputError(
            f"{len(missing)} rows have no time to split by",
            evidence={"structure_ids": missing[:_MAX_LISTED]},
            advice="choose another split, or give times",
        )
    moments = [_moment(name, t) for name, t in zip(ids, times, strict=True)]
    return sorted(range(len(ids)), key=lambda r: (moments[r], ids[r]), reverse=True)


def _moment(name: str, time: str) -> datetime:
    """Return a time; as text, times in different notation would not sort."""
    try:
        moment = datetime.fromisoformat(time)
    except ValueError as error:
        raise InputError(
            f"the time of {name} is {time!r}, which is not ISO 8601",
            advice="write it like 2026-01-31T12:00:00+00:00",
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
