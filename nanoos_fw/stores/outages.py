"""A database server that is away for a while must not cost a run its result.

FireWorks gives up at the first failed operation: the launch of a job that had finished
stays RUNNING for ever, or a workflow is marked FIZZLED half-way. So the connection
itself waits. It is the one that FireWorks uses too, so that this holds for heartbeats,
checkpoints and the end of a launch as well as for the stores.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nanoos_fw.errors import StoreError

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_LOG_AGAIN_S = 300.0
_MARK = "_nanoos_outage"
_WAITS = "_nanoos_waits"


@dataclass
class _Wait:
    """How long operations of a connection wait, and what ends that before."""

    seconds: float
    stop: Callable[[], bool]
    sleep: Callable[[float], None]


def is_outage(error: BaseException | None) -> bool:
    """Tell whether a driver error means that the server cannot be reached now."""
    from pymongo.errors import (
        AutoReconnect,
        ConnectionFailure,
        WaitQueueTimeoutError,
    )

    return isinstance(error, AutoReconnect | ConnectionFailure | WaitQueueTimeoutError)


def outlast_outages(
    launchpad: Any,
    seconds: float,
    *,
    stop: Callable[[], bool] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Let every operation of a launchpad's connection wait for an absent server.

    An operation that the server may or may not have done is done again. That is safe
    for what launches do: their writes are replacements and upserts under unique keys, a
    second insertion of the same document counts as done, and the lock of a workflow
    carries a token by which its holder knows it.

    Parameters
    ----------
    launchpad
        Of FireWorks; several calls for one are one.
    seconds
        After so long without any answer an operation fails; 0 changes nothing.
    stop
        Asked once a second; True lets the operation fail at once.
    sleep
        For tests.

    Raises
    ------
    StoreError
        If the installed pymongo has no place to wait in.
    """
    client = launchpad.connection
    if seconds <= 0 or type(client).__module__.startswith("mongomock"):
        return
    known: _Wait | None = vars(client).get(_MARK)
    if known is not None:
        known.seconds, known.stop = seconds, stop or known.stop
        return
    once = getattr(client, "_retry_internal", None)
    if once is None:
        raise StoreError(
            "this release of pymongo is not known to nanoos_fw",
            advice="pip install 'pymongo>=4.9,<5'",
        )

    wait = _Wait(seconds, stop or (lambda: False), sleep)

    def patiently(*arguments: Any, **options: Any) -> Any:
        return _patiently(lambda: once(*arguments, **options), wait)

    vars(client)[_MARK] = wait
    client._retry_internal = patiently
    launchpad.workflows = _LockableWorkflows(launchpad.workflows)


def let_launchers_wait(
    script: ModuleType, names: Sequence[str], seconds: float
) -> None:
    """Let a script of FireWorks wait for an absent server from its first operation on.

    Parameters
    ----------
    script
        Such as ``fireworks.scripts.qlaunch_run``.
    names
        Its functions that take the launchpad first.
    seconds
        See `outlast_outages`.
    """
    for name in names:
        launch = getattr(script, name)
        if not hasattr(launch, _WAITS):
            setattr(script, name, _waiting(launch, seconds))


def _waiting(launch: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    @functools.wraps(launch)
    def launch_patiently(launchpad: Any, *arguments: Any, **options: Any) -> Any:
        if launchpad is not None:  # rlaunch --offline
            outlast_outages(launchpad, seconds)
        return launch(launchpad, *arguments, **options)

    setattr(launch_patiently, _WAITS, True)
    return launch_patiently


def _patiently(operation: Callable[[], Any], wait: _Wait) -> Any:
    from pymongo.errors import DuplicateKeyError, PyMongoError

    began = time.monotonic()
    pause, tries, said = _FIRST_PAUSE_S, 0, began
    while True:
        try:
            result = operation()
        except DuplicateKeyError as error:
            # What an earlier try inserted before its answer was lost.
            if tries and set((error.details or {}).get("keyPattern") or ()) == {"_id"}:
                return None
            raise
        except PyMongoError as error:
            now = time.monotonic()
            left = began + wait.seconds - now
            if not is_outage(error) or left <= 0 or wait.stop():
                raise
            tries += 1
            if tries == 1 or now - said > _LOG_AGAIN_S:
                said = now
                logger.warning(
                    "the database is away (%s); waiting for it, %.0f s at most",
                    type(error).__name__,
                    left,
                )
            _sleep(min(pause, left), wait)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        else:
            if tries:
                logger.warning(
                    "the database is back after %.0f s", time.monotonic() - began
                )
            return result


def _sleep(seconds: float, wait: _Wait) -> None:
    while seconds > 0 and not wait.stop():
        part = min(seconds, 1.0)
        wait.sleep(part)
        seconds -= part


class _LockableWorkflows:
    """The collection of workflows, whose locks can be recognised.

    FireWorks' lock says only that somebody holds it. One that was set while the answer
    got lost would keep its own holder out, and after five minutes the launch would end
    unheard of.
    """

    def __init__(self, collection: Any) -> None:
        self._collection = collection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collection, name)

    def __getitem__(self, name: str) -> Any:
        return self._collection[name]

    def find_one_and_update(
        self, query: Mapping[str, Any], update: Any, **options: Any
    ) -> Any:
        """Find one and update it; a lock is set with a token, and once."""
        if query.get("locked") == {"$exists": False} and update == {
            "$set": {"locked": True}
        }:
            token = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(8)}"
            rest = {key: value for key, value in query.items() if key != "locked"}
            query = {**rest, "locked": {"$in": [None, token]}}
            update = {"$set": {"locked": token}}
        return self._collection.find_one_and_update(query, update, **options)
