"""Create hyper-parameter searches, and submit the fireworks that work on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.errors import InputError
from nanoos_fw.operations import prepare_launchpad, submit
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.search_records import SearchRecords

if TYPE_CHECKING:
    from nanoos_fw.ml.search import SearchConfig


@dataclass(frozen=True)
class SubmittedSearch:
    """The fireworks of a search.

    Parameters
    ----------
    search
        Its name.
    workers
        That were submitted now; 0 for a search that was created before and has its
        own.
    work_root
        Folder of their work directories.
    """

    search: str
    workers: int
    work_root: str


def read_search_file(path: Path) -> SearchConfig:
    """Return the configuration in a YAML file.

    Raises
    ------
    InputError
        If it cannot be read, or is not valid.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from nanoos_fw.ml.search import read_search

    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read search {path}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{path} describes no search", advice="see 'nanoos search create --help'"
        )
    return read_search(values)


def create_search(
    launchpad: Any, config: SearchConfig, work_root: Path, *, workers: int = 1
) -> SubmittedSearch:
    """Create a search and submit its workers; the same search again changes nothing.

    Parameters
    ----------
    launchpad
        Where the fireworks go, and whose database holds the search.
    config
        What to search. A relative ``dataset_dir`` is meant from the folder one is in.
    work_root
        Folder of the work directories, which all workers share.
    workers
        Fireworks that work on it at the same time.

    Raises
    ------
    InputError
        If the dataset does not fit, or another search has this name.
    """
    from nanoos_fw.ml.search import check_dataset

    folder = str(Path(config.dataset_dir).resolve())
    config = config.model_copy(update={"dataset_dir": folder})
    _check_workers(workers)
    SearchRecords(open_database(launchpad)).create(config, check_dataset(config))
    return _submit(launchpad, config.name, work_root, workers, turn=0)


def resume_search(
    launchpad: Any, name: str, work_root: Path, *, workers: int = 1
) -> SubmittedSearch:
    """Submit more workers, also to a search that was stopped.

    Parameters
    ----------
    launchpad, work_root, workers
        As in :func:`create_search`.
    name
        Of the search.

    Raises
    ------
    InputError
        If there is no such search.
    """
    _check_workers(workers)
    store = SearchRecords(open_database(launchpad))
    store.resume(name)
    turn = 1 + store.next_turn(name)
    return _submit(launchpad, name, work_root, workers, turn=turn)


# ------------------------------------------------------------------------- private


def _check_workers(workers: int) -> None:
    if workers < 1:
        raise InputError(f"a search needs at least one worker, not {workers}")


def _submit(
    launchpad: Any, name: str, work_root: Path, workers: int, *, turn: int
) -> SubmittedSearch:
    from nanoos_fw.workflows import search_workflow

    root = str(work_root.resolve())
    prepare_launchpad(launchpad)
    added = submit(launchpad, search_workflow(name, root, workers, turn))
    return SubmittedSearch(name, workers if added else 0, root)
