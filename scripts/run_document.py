"""Run the command blocks of a page of documentation, and compare what they print.

usage: python scripts/run_document.py PAGE.md --dir FOLDER [--skip N]

Everything happens in FOLDER, block after block, as a reader would do it:

* ``bash`` blocks run in bash with ``set -euo pipefail``; the exported variables and the
  current directory go on to the next block. Commands are those of ``PATH``.
* ``python`` blocks run as scripts of the ``python`` of ``PATH``, each on its own.
* A block with a ``:caption:`` is a file that the reader saves under this name.
* A ``text`` block is what the block before it prints: each of its lines must be found,
  in this order. ``…`` stands for anything; numbers with a decimal point may differ
  by a tenth, since processors round differently.
* Blocks of the class ``elsewhere`` need what no test machine has (another host, a
  site's modules, a compilation of LAMMPS); bash only reads these.

Nothing but the standard library is needed here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

TIMEOUT_S = 600.0
RELATIVE, ABSOLUTE = 0.1, 0.02
_FENCE = re.compile(r"^(?P<fence>`{3,}|:{3,})(?P<info>[^`]*)$")
_NUMBER = re.compile(r"[-−]?\d+\.\d+(?:e[-+]?\d+)?|…")
_SUFFIXES = {"bash": ".sh", "python": ".py"}


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Parameters
    ----------
    language
        ``bash``, ``python``, ``text``, ``yaml`` …
    text
        Its lines.
    line
        Number of its first line on the page.
    file
        Name under which the reader saves it, or empty.
    elsewhere
        Whether it cannot run on a test machine.
    expected
        What it prints, from the ``text`` block after it.
    """

    language: str
    text: str
    line: int
    file: str = ""
    elsewhere: bool = False
    expected: str = ""


class DocumentError(Exception):
    """A block failed, or printed something else than the page says."""


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page, outputs joined to what prints them."""
    found: list[Block] = []
    for block in _raw_blocks(page):
        last = found[-1] if found else None
        if block.language == "text" and not block.file:
            if last is None or last.language not in _SUFFIXES or last.expected:
                raise DocumentError(f"line {block.line}: output of which block?")
            found[-1] = replace(last, expected=block.text)
        else:
            found.append(block)
    return found


def _raw_blocks(page: str) -> Iterator[Block]:
    lines = page.splitlines()
    number = 0
    while number < len(lines):
        opened = _FENCE.match(lines[number])
        number += 1
        if opened is None:
            continue
        start, fence = number, opened["fence"]
        while number < len(lines) and not lines[number].startswith(fence):
            number += 1
        info, body = opened["info"].strip(), lines[start:number]
        number += 1
        options: dict[str, str] = {}
        if info.startswith("{"):
            if not info.startswith("{code-block}"):
                if fence.startswith(":"):
                    number = start  # a note: its text may hold blocks
                continue
            info = info.removeprefix("{code-block}").strip()
            while body and (option := re.match(r":(\w+):\s*(.*)$", body[0])):
                options[option[1]] = option[2]
                body, start = body[1:], start + 1
            while body and not body[0].strip():
                body, start = body[1:], start + 1
        yield Block(
            language=info,
            text="\n".join(body) + "\n",
            line=start + 1,
            file=options.get("caption", ""),
            elsewhere="elsewhere" in options.get("class", "").split(),
        )


def missing_line(expected: str, printed: str) -> str | None:
    """Return the first expected line that was not printed in its turn, or None."""
    lines = iter(printed.splitlines())
    for line in filter(str.strip, expected.splitlines()):
        if not any(_same(line, other) for other in lines):
            return line
    return None


def _same(expected: str, printed: str) -> bool:
    """Compare two lines: ``…`` is anything, decimal numbers agree roughly."""
    expected, printed = " ".join(expected.split()), " ".join(printed.split())
    pattern, numbers, at = "", [], 0
    for token in _NUMBER.finditer(expected):
        pattern += re.escape(expected[at : token.start()])
        if token[0] == "…":
            pattern += ".*"
        else:
            pattern += r"([-−]?\d+\.?\d*(?:e[-+]?\d+)?)"
            numbers.append(_value(token[0]))
        at = token.end()
    match = re.fullmatch(pattern + re.escape(expected[at:]), printed)
    return match is not None and all(
        abs(number - _value(other)) <= max(RELATIVE * abs(number), ABSOLUTE)
        for number, other in zip(numbers, match.groups(), strict=True)
    )


def _value(text: str) -> float:
    return float(text.replace("−", "-"))


def run_page(
    page: Path,
    folder: Path,
    *,
    environ: Mapping[str, str] | None = None,
    skip: int = 0,
    timeout_s: float = TIMEOUT_S,
) -> int:
    """Run the blocks of a page in a folder and return how many were run.

    Parameters
    ----------
    page
        Markdown file.
    folder
        Working directory of the first block; made if it is not there.
    environ
        Environment of the first block; None for that of this process.
    skip
        Leave out so many blocks at the beginning, such as the installation.
    timeout_s
        Of each block.

    Raises
    ------
    DocumentError
        Names the line of the page, and shows the end of what was printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".document"
    scratch.mkdir(exist_ok=True)
    state = scratch / "state.sh"
    state.write_text(f"cd {_quoted(str(folder.resolve()))}\n")
    count = 0
    for number, block in enumerate(blocks(page.read_text(encoding="utf-8"))):
        where = f"{page.name}:{block.line}"
        if number < skip:
            continue
        if block.file:
            target = _directory(state) / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif block.language in _SUFFIXES:
            script = scratch / f"{number:03d}{_SUFFIXES[block.language]}"
            script.write_text(block.text, encoding="utf-8")
            _run(block, script, state, where, environ, timeout_s)
            count += not block.elsewhere
    return count


def _run(
    block: Block,
    script: Path,
    state: Path,
    where: str,
    environ: Mapping[str, str] | None,
    timeout_s: float,
) -> None:
    path = _quoted(str(script.resolve()))
    if block.elsewhere:
        command = f"bash -n {path}"
    elif block.language == "python":
        # From the input, as in a notebook: what lies in the folder can be imported.
        command = f". {_quoted(str(state.resolve()))}; python - < {path}"
    else:
        saved = _quoted(str(state.resolve()))
        command = (
            f"set -euo pipefail; . {saved}; . {path}; "
            f"{{ export -p; printf 'cd %q\\n' \"$PWD\"; }} > {saved}"
        )
    output = script.with_suffix(".out")
    began = time.monotonic()
    # Into a file: what a block leaves in the background may hold a pipe open.
    with output.open("wb") as sink:
        child = subprocess.Popen(
            ["bash", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(os.environ if environ is None else environ),
        )
        try:
            code: int | None = child.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            code = None
    printed = output.read_text(encoding="utf-8", errors="replace")
    took = f"{time.monotonic() - began:.1f} s"
    print(f"{where}: {block.text.splitlines()[0][:60]} … {took}", flush=True)
    shown = "\n".join(printed.splitlines()[-30:])
    if code is None:
        raise DocumentError(f"{where}: not done after {timeout_s:g} s:\n{shown}")
    if code != 0:
        raise DocumentError(f"{where}: exit code {code}:\n{shown}")
    missing = missing_line(block.expected, printed)
    if missing is not None:
        raise DocumentError(f"{where}: not printed: {missing!r}; printed was\n{shown}")


def _directory(state: Path) -> Path:
    """Return the directory that the next block starts in."""
    answer = subprocess.run(
        ["bash", "-c", f". {_quoted(str(state.resolve()))}; pwd"],
        check=True,
        capture_output=True,
        text=True,
    )
    return Path(answer.stdout.rstrip("\n"))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def main() -> int:
    """Run a page from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    if shutil.which("bash") is None:
        sys.exit("bash is not on PATH")
    try:
        count = run_page(arguments.page, arguments.dir, skip=arguments.skip)
    except DocumentError as error:
        sys.exit(str(error))
    print(f"{arguments.page}: {count} blocks did what the page says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
