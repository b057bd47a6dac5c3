"""Check what git tracks: links that are whole, no large file, no conflict marker.

usage: python scripts/check_files.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 500_000
LINKS = {
    "nanoos_fw/firetasks": "../firetasks",
    "nanoos_fw/templates": "../templates",
}
LINK_MODE = "120000"
CONFLICT = (b"<<<<<<< ", b">>>>>>> ")


def problems(root: Path) -> list[str]:
    """Return one line for each thing that is wrong with the tracked files."""
    listing = subprocess.run(
        ["git", "ls-files", "--stage", "-z"],
        cwd=root,
        capture_output=True,
        check=True,
        text=True,
    )
    found = []
    modes = {}
    for entry in filter(None, listing.stdout.split("\0")):
        head, name = entry.split("\t", 1)
        modes[name] = head.split()[0]
        found += _file_problems(root / name, name, is_link=modes[name] == LINK_MODE)
    for name, target in LINKS.items():
        if modes.get(name) != LINK_MODE:
            found.append(f"{name}: git must track it as a link to {target}")
        elif str((root / name).readlink()) != target:
            found.append(f"{name}: must be a relative link to {target}")
    return found


def _file_problems(path: Path, name: str, *, is_link: bool) -> list[str]:
    if is_link != path.is_symlink() and path.exists():
        return [f"{name}: a link in git but not on disk, or the other way round"]
    if path.is_symlink():
        return [] if path.exists() else [f"{name}: the link leads nowhere"]
    if not path.is_file():  # deleted, not yet committed
        return []
    if path.stat().st_size > MAX_BYTES:
        return [f"{name}: {path.stat().st_size} bytes, more than {MAX_BYTES}"]
    lines = path.read_bytes().splitlines()
    return [
        f"{name}:{number}: conflict marker"
        for number, line in enumerate(lines, 1)
        if line.startswith(CONFLICT)
    ]


if __name__ == "__main__":
    if lines := problems(ROOT):
        sys.exit("\n".join(lines))
