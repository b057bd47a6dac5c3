"""A warm server that starts LAMMPS in a few milliseconds instead of half a second.

Importing Python's packages and loading LAMMPS is most of a short run. A server process
does it once and forks: it maps the library but never initializes MPI, which does not
survive a fork. One child always stands by, with MPI and LAMMPS ready; it serves one
simulation and ends, so runs are as isolated as programs of their own. A crash ends a
child, never the server.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from nanoos_fw.errors import InputError, LaunchError
from nanoos_fw.parallel import (
    LOG,
    Resources,
    child_environment,
    clear_messages,
    supervise,
)

SERVED = ("nanoos_fw.md.simulation", "nanoos_fw.md.properties")
_START_S = 120.0
_LINE = 1 << 16


class ForkServer:
    """Rank programs of one rank, each in a forked child of a warm process.

    Examples
    --------
    >>> with ForkServer() as server:
    ...     engine = LAMMPSEngine(server=server)

    Parameters
    ----------
    threads
        Threads of each child.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._buffer = b""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Number of the server's process, if it lives."""
        alive = self._process is not None and self._process.poll() is None
        return self._process.pid if self._process is not None and alive else None

    def start(self) -> None:
        """Start the server, unless it runs, and wait until a child stands by.

        Raises
        ------
        LaunchError
            If it does not come up; carries what it printed.
        """
        if self.pid is not None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "nanoos_fw.md.fork_server",
                    str(theirs.fileno()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                env=child_environment(self.threads),
                start_new_session=True,
            )
        self._socket, self._buffer = ours, b""
        try:
            self._receive(_START_S)
        except LaunchError as error:
            self._process.kill()
            text = self._process.communicate()[1].decode(errors="replace")
            self.close()
            error.evidence["output"] = text[-2000:]
            raise

    def close(self) -> None:
        """End the server and the child that stands by."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            try:
                self._process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if self._process.stderr is not None:
                self._process.stderr.close()
        self._process = self._socket = None

    def run(
        self,
        module: str,
        config: Path,
        resources: Resources,
        deadline: float | None = None,
        stall_s: float | None = None,
    ) -> dict[str, Any]:
        """Run a rank program as `parallel.launch_ranks` does, in a forked child.

        Raises
        ------
        InputError
            If it is none of the programs the server knows, or asks for more than one
            rank or other threads than the server's.
        LaunchError
            If the child died without a word, or the server is gone.
        NanoOSError
            Whatever error the rank reported.
        """
        if module not in SERVED:
            raise InputError(f"the server does not run {module}")
        if resources.ranks != 1 or resources.threads != self.threads:
            raise InputError(
                f"the server runs one rank of {self.threads} thread(s), not "
                f"{resources.ranks} of {resources.threads}",
                advice="run without a server",
            )
        self.start()
        work_dir = config.parent.resolve()
        clear_messages(work_dir)
        job = {
            "module": module,
            "config": str(config.resolve()),
            "parent": f"{socket.gethostname()}:{os.getpid()}",
        }
        self._send(job)
        child = _Served(self, int(self._receive(_START_S)["pid"]))
        return supervise(
            child,
            module,
            work_dir,
            deadline=deadline,
            stall_s=stall_s,
            signs=("log.*.lammps",),
        )

    def _send(self, value: dict[str, Any]) -> None:
        if self._socket is None:
            raise _gone()
        try:
            self._socket.sendall(json.dumps(value).encode() + b"\n")
        except OSError as error:
            raise _gone() from error

    def _receive(self, timeout: float | None) -> dict[str, Any]:
        """Return the next message of the server.

        Raises
        ------
        LaunchError
            If it is gone, or silent for too long.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = None if end is None else max(0.0, end - time.monotonic())
            if self._socket is None:
                raise _gone()
            ready, _, _ = select.select([self._socket], [], [], left)
            if not ready:
                raise LaunchError(
                    "the LAMMPS server does not answer", evidence={"class": "silent"}
                )
            data = self._socket.recv(_LINE)
            if not data:
                raise _gone()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


_of_thread = threading.local()


def shared_server() -> ForkServer:
    """Return the warm server of this thread, for as long as this process lives.

    It starts with its first run; simulations one after the other, as the fireworks of
    a queue job are, then begin at once.
    """
    server: ForkServer | None = getattr(_of_thread, "server", None)
    if server is None:
        server = _of_thread.server = ForkServer()
        atexit.register(server.close)
    return server


def _gone() -> LaunchError:
    return LaunchError(
        "the LAMMPS server has ended",
        evidence={"class": "server"},
        advice="run again: it is started anew",
    )


class _Served:
    """A forked child, seen from the client."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server = server
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(timeout=0.0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            try:
                self._code = int(self._server._receive(timeout)["exit"])
            except LaunchError as error:
                if error.evidence.get("class") == "silent":
                    raise subprocess.TimeoutExpired("child", timeout or 0.0) from None
                # Without its server the child is an orphan; its group ends here, and
                # not by a fault of its own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self._code = -signal.SIGKILL
        return self._code


# --------------------------------------------------------------------------- server


def serve(connection: socket.socket) -> None:
    """Serve one client until it is gone."""
    _load()
    standby = _Standby(connection)
    _reply(connection, {"ready": os.getpid()})
    buffer = b""
    while True:
        data = connection.recv(_LINE)
        if not data:
            standby.end()
            return
        buffer += data
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            if not standby.lives():
                standby = _Standby(connection)
            child = standby
            child.begin(line)
            _reply(connection, {"pid": child.pid})
            # The next one makes itself ready while this one works.
            standby = _Standby(connection)
            _, status = os.waitpid(child.pid, 0)
            _reply(connection, {"exit": os.waitstatus_to_exitcode(status)})


def _load() -> None:
    """Import everything and map the library, but leave MPI alone."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    for module in SERVED:
        importlib.import_module(module)
    from nanoos_fw.md.calculator import map_lammps

    map_lammps()
    _rehearse()


def _rehearse() -> None:
    """Write the scripts of a small simulation, as every child will.

    What that imports, reads and compiles at its first use, above all the periodic
    table of pymatgen, is then there in all children.
    """
    from nanoos_fw.md.box import LammpsBox
    from nanoos_fw.md.inputs import MDConfig, data_file_text, render_parts
    from nanoos_fw.md.potentials import lennard_jones_potential

    potential = lennard_jones_potential({"Ar": (0.0104, 3.4)}, cutoff_a=8.5)
    box = LammpsBox.from_lattice(5.0 * np.eye(3))
    for kind in ("MD_NVE_LAMMPS", "MD_NVT_LAMMPS", "MD_NPT_LAMMPS", "STATIC_LAMMPS"):
        config = MDConfig(workflow_type=kind)
        render_parts(config, potential, ["Ar"], box)
    data_file_text(box, ["Ar"], ["Ar"], np.zeros((1, 3)))


def _reply(connection: socket.socket, value: dict[str, Any]) -> None:
    # A client that is gone shows at the next read.
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(value).encode() + b"\n")


class _Standby:
    """A forked child that has LAMMPS ready and waits for its one job."""

    def __init__(self, connection: socket.socket) -> None:
        reader, self._writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._writer)
            connection.close()
            _become(reader)
        os.close(reader)

    def lives(self) -> bool:
        return os.waitpid(self.pid, os.WNOHANG) == (0, 0)

    def begin(self, job: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._writer, job + b"\n")
        os.close(self._writer)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _become(reader: int) -> None:
    """Be the child: prepare, wait for the job, run it, end."""
    code = 1
    try:
        os.setsid()
        from mpi4py import MPI

        from nanoos_fw.md.calculator import prepare_lammps

        MPI.Init()
        prepare_lammps()
        with os.fdopen(reader) as pipe:
            line = pipe.readline()
        if not line:
            os._exit(0)  # the server is gone
        code = _job(json.loads(line))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _job(job: dict[str, str]) -> int:
    from nanoos_fw.parallel import run_rank_program

    config = Path(job["config"])
    os.chdir(config.parent)
    log = os.open(config.parent / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(log, f"$ served: {job['module']} {config}\n".encode())
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.environ["NANO_OS_PARENT"] = job["parent"]
    program = importlib.import_module(job["module"]).main
    try:
        run_rank_program(program, [str(config)])
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
