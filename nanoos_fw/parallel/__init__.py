"""The MPI boundary: start ranks as a child, talk between ranks, stop in time.

A firetask is one process and owns the database. Work on several cores happens in a
*rank program*: a module started by ``srun`` or ``mpiexec`` with one JSON file as its
argument. Files of the work directory are all that parent and ranks share:

``result.json``
    written last, by rank 0: the only evidence of success.
``error.json``
    written by the first rank that fails: ``NanoOSError.to_dict()``.
``stopped.json``
    written when the ranks stopped in time with a checkpoint on disk.
``progress.json``
    how far the work is.
``stop``
    made by the parent to ask the ranks to stop. Launchers treat signals differently
    (Hydra kills the ranks when it gets TERM), a file means the same to all.
"""

from __future__ import annotations

from nanoos_fw.parallel.files import (
    ERROR,
    LOCK,
    LOG,
    PROGRESS,
    RANKS_LOCK,
    RESULT,
    RESUMABLE_EXIT,
    STOP,
    STOPPED,
    locked,
    report_progress,
)
from nanoos_fw.parallel.launch import (
    Child,
    Resources,
    child_environment,
    clear_messages,
    launch_command,
    launch_ranks,
    supervise,
)
from nanoos_fw.parallel.ranks import (
    Communicator,
    RankProgram,
    StopRequest,
    communicator,
    run_rank_program,
)

__all__ = [
    "ERROR",
    "LOCK",
    "LOG",
    "PROGRESS",
    "RANKS_LOCK",
    "RESULT",
    "RESUMABLE_EXIT",
    "STOP",
    "STOPPED",
    "Child",
    "Communicator",
    "RankProgram",
    "Resources",
    "StopRequest",
    "child_environment",
    "clear_messages",
    "communicator",
    "launch_command",
    "launch_ranks",
    "locked",
    "report_progress",
    "run_rank_program",
    "supervise",
]
