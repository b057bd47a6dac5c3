"""Aliases of model versions: movable names with an append-only history."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from nanoos_fw.errors import InputError, StoreError
from nanoos_fw.provenance import utc_now
from nanoos_fw.stores.database import store_errors

ACTIVE = "active"
LATEST = "latest"
NOTHING = 0
"""Version that an alias points at after it was taken off."""

_TRIES = 50
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class AliasEntry:
    """One move of an alias.

    Parameters
    ----------
    name, alias, sequence
        Model name, alias, and number of the move from 1.
    version
        Pointed at from then on; 0 for none.
    reason, by, time
        Why, who (user and host), and when (ISO 8601, UTC).
    restores
        Of a rollback: the move whose version came back.
    """

    name: str
    alias: str
    sequence: int
    version: int
    reason: str
    by: str
    time: str
    restores: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON-compatible values."""
        return asdict(self)


class AliasLog:
    """The collection ``model_aliases``: entries are added, never changed.

    The unique index on name, alias and sequence lets one of several writers be the
    next, so a history has neither gaps nor branches.
    """

    def __init__(self, database: Any) -> None:
        self._entries = database["model_aliases"]

    def version(self, name: str, alias: str = ACTIVE) -> int | None:
        """Return the version that an alias points at; None if it points at none."""
        with store_errors(f"read alias {alias} of {name}"):
            last = self._last(name, alias)
        return None if last is None or last.version == NOTHING else last.version

    def current(self, alias: str = ACTIVE) -> dict[str, int]:
        """Return name -> version of all names that have an alias."""
        with store_errors(f"read alias {alias}"):
            entries = self._entries.find({"alias": alias}).sort("sequence", 1)
            found = {entry["name"]: int(entry["version"]) for entry in entries}
        return {name: version for name, version in found.items() if version != NOTHING}

    def history(self, name: str, alias: str | None = None) -> list[AliasEntry]:
        """Return all moves of one alias of a name, or of all, oldest first."""
        query = {"name": name} if alias is None else {"name": name, "alias": alias}
        with store_errors(f"read the aliases of {name}"):
            entries = [_entry(document) for document in self._entries.find(query)]
        return sorted(entries, key=lambda e: (e.alias, e.sequence))

    def move(self, name: str, alias: str, version: int, reason: str) -> None:
        """Point an alias at a version; 0 takes it off. Where it is, it stays.

        Writers at the same time come one after the other; the last one's version
        stands.
        """
        check_alias(alias)
        for _ in range(_TRIES):
            with store_errors(f"read alias {alias} of {name}"):
                last = self._last(name, alias)
            if version == (NOTHING if last is None else last.version):
                return
            if self._append(_new_entry(name, alias, last, version, reason)):
                return
        raise StoreError(
            f"alias {alias!r} of {name!r} keeps being moved", advice="try again"
        )

    def roll_back(
        self,
        name: str,
        alias: str,
        reason: str,
        *,
        check: Callable[[int], None] = lambda _: None,
    ) -> AliasEntry:
        """Point an alias at what it pointed at before; return the new entry.

        Rolling back again goes one further back. Moves at the same time are not
        rolled back by accident.

        Parameters
        ----------
        name, alias, reason
            Whose alias, which, and why.
        check
            Called with the version before the alias moves; what it raises ends it.

        Raises
        ------
        InputError
            If there is nothing to go back to.
        StoreError
            If somebody else moves the alias at the same time.
        """
        history = self.history(name, alias)
        before = _before(history)
        if before is None:
            raise InputError(
                f"alias {alias!r} of {name!r} has no earlier version to go back to",
                evidence={"history": [entry.to_dict() for entry in history[-5:]]},
                advice=f"see 'nanoos models show {name}'",
            )
        check(before.version)
        entry = _new_entry(
            name,
            alias,
            history[-1],
            before.version,
            reason,
            restores=before.restores or before.sequence,
        )
        if not self._append(entry):
            raise StoreError(
                f"alias {alias!r} of {name!r} was moved meanwhile",
                advice=f"look at 'nanoos models show {name}' and decide anew",
            )
        return entry

    def _append(self, entry: AliasEntry) -> bool:
        """Write an entry, unless another writer has taken its place."""
        from pymongo.errors import DuplicateKeyError

        with store_errors(f"move alias {entry.alias} of {entry.name}"):
            try:
                self._entries.insert_one(entry.to_dict())
            except DuplicateKeyError:
                return False
        return True

    def _last(self, name: str, alias: str) -> AliasEntry | None:
        document = self._entries.find_one(
            {"name": name, "alias": alias}, sort=[("sequence", -1)]
        )
        return None if document is None else _entry(document)


def check_alias(alias: str) -> None:
    """Refuse an alias that a reference could not tell from a version."""
    if alias == LATEST or not _ALIAS.fullmatch(alias):
        raise InputError(
            f"{alias!r} cannot be an alias",
            advice="letters first, then letters, digits, '.', '_' or '-'; 'latest' is "
            "taken",
        )


def _before(history: list[AliasEntry]) -> AliasEntry | None:
    """Return the move to go back to from the last one.

    A rollback stands for the move it restored: what came before that one is next.
    """
    if not history:
        return None
    last = history[-1]
    place = last.restores or last.sequence
    for entry in reversed(history[: place - 1]):
        if entry.version not in (NOTHING, last.version):
            return entry
    return None


def _new_entry(
    name: str,
    alias: str,
    last: AliasEntry | None,
    version: int,
    reason: str,
    restores: int | None = None,
) -> AliasEntry:
    return AliasEntry(
        name=name,
        alias=alias,
        sequence=1 if last is None else last.sequence + 1,
        version=version,
        reason=reason,
        by=f"{_user()}@{socket.gethostname()}",
        time=utc_now(),
        restores=restores,
    )


def _entry(document: dict[str, Any]) -> AliasEntry:
    return AliasEntry(**{k: v for k, v in document.items() if k != "_id"})


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for the user id
        return "unknown"
