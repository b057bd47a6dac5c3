"""The application: its gate, its errors, its routes, and the server that runs it."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from nanoos_fw import __version__
from nanoos_fw.errors import (
    InputError,
    LaunchError,
    MissingDependencyError,
    NanoOSError,
    StoreError,
)
from nanoos_fw.web import api, pages, screen_pages
from nanoos_fw.web.access import Gate

_STATUS = ((InputError, 422), (MissingDependencyError, 424), (StoreError, 503))


@dataclass
class State:
    """What all routes share.

    Parameters
    ----------
    launchpad
        Launchpad, whose database all stores are views of.
    work_root
        Folder of the work directories of what is submitted.
    may_write
        Whether work may be submitted and models activated.
    lock
        Held by every route that reads or writes: the embedded database and the caches
        of models are not made for several threads, and one person looks at the page.
    """

    launchpad: Any
    database: Any
    work_root: Path
    may_write: bool
    lock: threading.RLock = field(default_factory=threading.RLock)
    loaded: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write an embedded database to its file; a server has written it already."""
        from nanoos_fw.stores.embedded import embedded_file, save_embedded

        if embedded_file():
            save_embedded(self.launchpad)


def create_app(
    launchpad: Any,
    *,
    token: str,
    work_root: Path | None = None,
    may_write: bool = False,
) -> FastAPI:
    """Return the application, to be served, or called by tests.

    Parameters
    ----------
    launchpad
        Of ``load_launchpad`` or ``open_embedded``.
    token
        Who does not send it is answered 401.
    work_root
        Folder of the work directories of submitted work; default: ``work`` here.
    may_write
        Without it, everything that would change the database is answered 403.
    """
    from nanoos_fw.stores.database import open_database

    app = FastAPI(
        title="nanoos_fw",
        version=__version__,
        description=(
            "Features, predictions, models and trainings of this launchpad. "
            "Units: eV, Å, fs, bar, unless a field says otherwise."
        ),
        docs_url=None,
        redoc_url=None,
    )
    app.state.nanoos = State(
        launchpad,
        open_database(launchpad),
        (work_root or Path("work")).absolute(),
        may_write,
    )
    app.middleware("http")(Gate(token))
    app.add_exception_handler(NanoOSError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.include_router(api.router)
    app.include_router(pages.router)
    app.include_router(screen_pages.router)
    return app


def _answer_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, NanoOSError)
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    if isinstance(error, api.NotFoundError):
        status = 404
    elif isinstance(error, api.ForbiddenError):
        status = 403
    return JSONResponse(error.to_dict(), status)


def _answer_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    found = InputError(
        f"{where}: {first['msg']}",
        evidence={"errors": len(error.errors())},
        advice="see /openapi.json for what is expected",
    )
    return JSONResponse(found.to_dict(), 422)


def serve(app: FastAPI, port: int, on_ready: Any = lambda _: None) -> None:
    """Serve on the loopback address until interrupted.

    Parameters
    ----------
    port
        0 takes a free one.
    on_ready
        Called with the port when connections are accepted.

    Raises
    ------
    LaunchError
        If the port is taken.
    """
    import uvicorn

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise LaunchError(
            f"port {port} cannot be used: {error.strerror}",
            advice="choose another with --port, or 0 for any free one",
        ) from error
    with listener:
        listener.listen(64)
        on_ready(listener.getsockname()[1])
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False
        )
        uvicorn.Server(config).run(sockets=[listener])
