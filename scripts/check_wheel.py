"""Compare the files of a wheel with the packages of the checkout.

usage: python scripts/check_wheel.py WHEEL

All files that git tracks in the package folders must be in the wheel, and nothing else:
a template that was forgotten in ``package_data`` fails here, and so does a stray file.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
# Folder of the checkout -> folder of the wheel (package_dir of setup.cfg).
FOLDERS = {
    "nanoos_fw": "nanoos_fw",
    "firetasks": "nanoos_fw/firetasks",
    "templates": "nanoos_fw/templates",
}


def tree_files(root: Path) -> set[str]:
    """Return the files that belong into the wheel, by their names there."""
    found = set()
    for folder, target in FOLDERS.items():
        for path in _files(root, folder):
            if not (root / path).is_symlink():
                found.add(f"{target}/{PurePosixPath(path).relative_to(folder)}")
    return found


def wheel_files(wheel: Path) -> set[str]:
    """Return the files of a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    return {n for n in names if ".dist-info/" not in n}


def differences(wheel: Path, root: Path = ROOT) -> list[str]:
    """Return one line per file that is missing in the wheel or should not be there."""
    expected, found = tree_files(root), wheel_files(wheel)
    return [f"missing in the wheel: {n}" for n in sorted(expected - found)] + [
        f"not in the tree: {n}" for n in sorted(found - expected)
    ]


def _files(root: Path, folder: str) -> list[str]:
    """List a folder: what git tracks, or all files where there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--", folder],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0 and listing.stdout:
        return [n for n in listing.stdout.split("\0") if n and (root / n).exists()]
    return [
        path.relative_to(root).as_posix()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]


if __name__ == "__main__":
    problems = differences(Path(sys.argv[1]))
    if problems:
        sys.exit("\n".join(problems))
    print(f"{sys.argv[1]}: {len(wheel_files(Path(sys.argv[1])))} files, as in the tree")
