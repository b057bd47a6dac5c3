"""The queue adapter that ``qlaunch`` loads from ``my_qadapter.yaml``.

FireWorks' own adapter drops fields that it does not know with a warning nobody sees,
gives ``squeue`` five seconds, and hides what ``sbatch`` said.
"""

from __future__ import annotations

import getpass
import logging
import time
from collections.abc import Mapping
from typing import Any

from fireworks.queue.queue_adapter import QueueAdapterBase
from fireworks.utilities.fw_serializers import serialize_fw

from nanoos_fw.errors import LaunchError
from nanoos_fw.slurm import SlurmRequest, batch_script, run_slurm, slurm_request

logger = logging.getLogger(__name__)

_SUBMIT_TIMEOUT_S = 120.0
_SUBMIT_WAITS_S = (2.0, 10.0, 30.0)
# Refusals that pass: the controller is busy, or one of the user's limits is reached.
_PASSING = (
    "socket timed out",
    "unable to contact",
    "connection refused",
    "resource temporarily unavailable",
    "temporarily unable",
    "slurm temporarily",
    "did not answer",
    "maxsubmitjob",
    "job violates accounting/qos policy",
)


class SlurmAdapter(QueueAdapterBase):  # type: ignore[misc]
    """Submit to SLURM. The keys are the fields of ``slurm.SlurmRequest``."""

    _fw_name = "{{nanoos_fw.queue_adapter.SlurmAdapter}}"
    template_file = "slurm/job.sh of nanoos_fw"
    submit_cmd = "sbatch"
    q_name = "slurm"

    def __init__(self, fields: Mapping[str, Any]) -> None:
        # No default factory: a missing field must not spring into being.
        super().__init__(None, fields)

    @serialize_fw  # type: ignore[untyped-decorator]
    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and the name that FireWorks loads them by."""
        return dict(self)

    @classmethod
    def from_dict(cls, m_dict: Mapping[str, Any]) -> SlurmAdapter:
        """Return an adapter of the fields of a file."""
        return cls(_fields(m_dict))

    @property
    def request(self) -> SlurmRequest:
        """The checked request.

        Raises
        ------
        InputError
            If a field is unknown or has a bad value.
        """
        given = {k: v for k, v in _fields(self).items() if v is not None}
        memory = [name for name in given if name in {"mem", "mem_per_cpu"}]
        # The one of a firework's _queueadapter comes after, and replaces, the file's.
        for name in memory[:-1]:
            del given[name]
        return slurm_request(
            given,
            "queue adapter (my_qadapter.yaml or _queueadapter)",
        )

    def get_script_str(self, launch_dir: str) -> str:
        """Return the batch script."""
        return batch_script(self.request, launch_dir)

    def submit_to_queue(self, script_file: str) -> int:
        """Submit the script and return the job's number.

        Refusals that pass are waited for, up to a minute.

        Raises
        ------
        LaunchError
            With the words of ``sbatch``.
        """
        for wait_s in (*_SUBMIT_WAITS_S, None):
            try:
                answer = run_slurm(
                    ["sbatch", "--parsable", script_file], timeout_s=_SUBMIT_TIMEOUT_S
                )
            except LaunchError as error:
                if wait_s is None or not any(p in str(error).lower() for p in _PASSING):
                    raise
                logger.warning("%s; again in %g s", error, wait_s)
                time.sleep(wait_s)
            else:
                return int(answer.strip().partition(";")[0])
        raise AssertionError("unreachable")

    def get_njobs_in_queue(self, username: str | None = None) -> int:
        """Return the number of the user's jobs in the partition; tasks count."""
        command = [
            "squeue",
            "--noheader",
            "--array",
            "--format=%A",
            f"--user={username or getpass.getuser()}",
        ]
        if self.request.queue:
            command.append(f"--partition={self.request.queue}")
        return len(run_slurm(command).split())


def _fields(m_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in m_dict.items() if not k.startswith("_fw_") and k != "logdir"
    }
