"""``nanoos serve``: the live view in a browser, and the API."""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path
from typing import Any

from nanoos_fw.cli.common import add_launchpad, open_launchpad
from nanoos_fw.errors import InputError, MissingDependencyError


def add_commands(commands: Any) -> None:
    """Add ``serve``."""
    serve = commands.add_parser(
        "serve",
        help="show campaigns, models, runs and features in a browser",
        description=(
            "Serve pages and the API /api/ml on this machine's loopback address, to "
            "whoever knows the token. On a cluster's login node, reach it from your "
            "own machine by 'ssh -L PORT:127.0.0.1:PORT HOST'. The token is a new one "
            "each time, or that of NANO_OS_WEB_TOKEN."
        ),
    )
    serve.add_argument(
        "--port", type=int, default=8765, help="0: any free one (default: %(default)s)"
    )
    serve.add_argument(
        "--allow-changes",
        action="store_true",
        help="let pages activate models, and the API submit work",
    )
    serve.add_argument(
        "--work-root",
        type=Path,
        default=Path("work"),
        help="folder of what the API submits, shared by all nodes (%(default)s)",
    )
    add_launchpad(serve)
    serve.set_defaults(command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.port < 65536:
        raise InputError(f"--port must be 0 to 65535, not {arguments.port}")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"'nanoos serve' needs the package {error.name}",
            advice="install the extra: pip install 'nanoos_fw[serve]'",
        ) from error
    from nanoos_fw.settings import load_settings

    settings = load_settings()
    launchpad = open_launchpad(arguments, settings)
    from nanoos_fw.web import create_app, serve  # FireWorks only after the launchpad

    stated = settings.web_token
    token = stated.get_secret_value() if stated else secrets.token_urlsafe(24)

    app = create_app(
        launchpad,
        token=token,
        work_root=arguments.work_root,
        may_write=arguments.allow_changes,
    )
    serve(app, arguments.port, lambda port: _say(port, token))
    return 0


def _say(port: int, token: str) -> None:
    print(f"http://127.0.0.1:{port}/?token={token}", flush=True)
    print("Ctrl-C ends it", flush=True)
