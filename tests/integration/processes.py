"""What tests of whole campaigns share: rows compared, rank programs watched."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Compare nested rows; numbers to 1e-6, since ranks add in any order."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6), (
            f"{where}: {found} is not {expected}"
        )
    else:
        assert found == expected, where


def wait_for_ranks(child: subprocess.Popen[str]) -> list[int]:
    """Return the rank programs of a campaign, once there are some."""
    for _ in range(600):
        found = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and is_rank_of(entry, child.pid)
        ]
        if found:
            return found
        assert child.poll() is None, "the campaign ended before it could be killed"
        time.sleep(0.05)
    pytest.fail("no ranks were started within 30 s")


def is_rank_of(process: Path, parent: int) -> bool:
    try:
        environ = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(
        entry.startswith(b"NANO_OS_PARENT=") and entry.endswith(f":{parent}".encode())
        for entry in environ
    )


def wait_until_gone(pid: int) -> None:
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    pytest.fail(f"rank {pid} outlived its firetask by 10 s")
