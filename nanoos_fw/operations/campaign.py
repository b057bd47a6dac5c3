"""Operating a campaign: import structures, prepare, run in this process."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.errors import InputError
from nanoos_fw.stores.database import store_errors
from nanoos_fw.stores.embedded import save_embedded
from nanoos_fw.stores.launches import SPEC_KEY, failed_fireworks
from nanoos_fw.stores.structures import NewStructure, StructureStore

if TYPE_CHECKING:
    from nanoos_fw.structure_files import EntryFailure, StructureEntry

logger = logging.getLogger(__name__)

_IMPORT_BATCH = 500
# FireWorks logs each launch whatever level it is asked for.
_FIREWORKS_LOGGERS = ("launchpad", "rocket.launcher", "queue.launcher")


# ------------------------------------------------------------------------- import


@dataclass
class ImportReport:
    """What became of every entry of an import.

    Parameters
    ----------
    added
        Number of new structures.
    duplicates
        Label and key of entries whose structure was there already; numbers that it
        lacked have been added to it.
    failures
        Entries that cannot be used, and duplicates whose numbers are not those of
        the store.
    notes
        Label of an entry that was used, and what the reader found strange in it.
    """

    added: int = 0
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    failures: list[EntryFailure] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Number of entries read."""
        return self.added + len(self.duplicates) + len(self.failures)


def import_structures(
    store: StructureStore,
    paths: Iterable[Path],
    *,
    in_set: str,
    id_prop_target: str = "target",
    on_entry: Callable[[ImportReport], None] = lambda _: None,
) -> ImportReport:
    """Read structure files into the store, entry by entry.

    A duplicate (of the store, or of an earlier entry) and an entry that cannot be
    used are reported and never stop the rest. Numbers of a duplicate that the store
    lacks are added to the structure; if one differs from the store's, none is.

    Parameters
    ----------
    paths
        Files or folders, see ``structure_files.read_structures``.
    in_set
        Named set the structures are put into; duplicates too.
    id_prop_target
        Name of the property in the ``id_prop.csv`` of a CGCNN folder.
    on_entry
        Called after each batch, for progress.
    """
    from nanoos_fw.structure_files import EntryFailure, read_structures

    report = ImportReport()
    batch: list[StructureEntry] = []

    def flush() -> None:
        entries = [
            NewStructure(
                structure=entry.structure,
                label=entry.label,
                properties=entry.properties,
                source=str(entry.source),
            )
            for entry in batch
        ]
        result = store.add(entries, in_set=in_set)
        for entry, key, added in zip(batch, result.keys, result.added, strict=True):
            report.notes += [(entry.label, note) for note in entry.notes]
            if added:
                report.added += 1
                continue
            try:
                store.add_properties(key, entry.properties)
            except InputError as error:
                failure = EntryFailure(entry.label, entry.source, error)
                report.failures.append(failure)
            else:
                report.duplicates.append((entry.label, key))
        batch.clear()

    for path in paths:
        for entry in read_structures(path, id_prop_target=id_prop_target):
            if isinstance(entry, EntryFailure):
                report.failures.append(entry)
            else:
                batch.append(entry)
            if len(batch) >= _IMPORT_BATCH:
                flush()
                on_entry(report)
    flush()
    on_entry(report)
    return report


# ------------------------------------------------------------------------ prepare


def prepare_launchpad(launchpad: Any) -> None:
    """Make a launchpad usable that nobody has reset yet.

    ``lpad reset`` does this for a new database, and deletes what is in an old one;
    here nothing is deleted.
    """
    from pymongo.errors import DuplicateKeyError

    counter = {"_id": -1, "next_fw_id": 1, "next_launch_id": 1}
    with store_errors("prepare the launchpad"):
        if launchpad.fw_id_assigner.find_one({}) is None:
            with contextlib.suppress(DuplicateKeyError):  # another process was first
                launchpad.fw_id_assigner.insert_one(counter)
            launchpad.tuneup(bkground=True)
        launchpad.fireworks.create_index(f"spec.{SPEC_KEY}.campaign")
        launchpad.workflows.create_index("metadata.key")


# ---------------------------------------------------------------------------- run


def run_embedded(
    launchpad: Any,
    launch_dir: Path,
    *,
    on_launch: Callable[[str], None] = lambda _: None,
) -> None:
    """Run all that is ready in this process, and save after every firework.

    A process killed at any time loses the firework it was in, not more; its work
    directory keeps what that firework had finished. ``on_launch`` is called after
    each firework with its stage.
    """
    from fireworks.core.fworker import FWorker
    from fireworks.core.rocket_launcher import launch_rocket

    launch_dir.mkdir(parents=True, exist_ok=True)
    quiet_fireworks()
    fworker = FWorker("embedded")
    while launchpad.run_exists(fworker):
        with (
            (launch_dir / "failures.log").open("a", encoding="utf-8") as log,
            _directory(launch_dir),
        ):
            launch_rocket(launchpad, fworker, strm_lvl="ERROR", err_file=log)
        save_embedded(launchpad)
        on_launch(_last_stage(launchpad))


def _last_stage(launchpad: Any) -> str:
    launch = launchpad.launches.find_one({}, {"fw_id": 1}, sort=[("launch_id", -1)])
    firework = launchpad.fireworks.find_one({"fw_id": launch["fw_id"]}, {"spec": 1})
    return str(firework["spec"].get(SPEC_KEY, {}).get("stage", ""))


def rerun_failed(launchpad: Any, campaign: str) -> int:
    """Set all fizzled fireworks of a campaign to run again; return how many."""
    ids = [failed.fw_id for failed in failed_fireworks(launchpad.db, campaign)]
    for fw_id in ids:
        launchpad.rerun_fw(fw_id)
    return len(ids)


def quiet_fireworks() -> None:
    """Drop what FireWorks logs of every launch; the launchpad knows it anyway.

    A filter, because FireWorks sets the level of its loggers back each time.
    """
    for name in _FIREWORKS_LOGGERS:
        log = logging.getLogger(name)
        if _warnings_only not in log.filters:
            log.addFilter(_warnings_only)


def _warnings_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[None]:
    """Launch in a folder of the campaign: rockets write beside where they start."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
