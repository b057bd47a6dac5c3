"""Submit numbered workflows, one batch at a time when told to: a process of a test.

    python submitting_process.py MY_LAUNCHPAD.YAML WORKFLOWS

Before each batch it says ``ready`` and waits for a line; at the end it prints what
`submit_many` returned.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from fireworks import Firework, PyTask, Workflow

from nanoos_fw.operations import submission
from nanoos_fw.stores.database import load_launchpad

BATCH = 50


def workflow(number: int) -> Workflow:
    """Return two fireworks, one after the other, that do nothing."""
    spec = {"nanoos": {"campaign": "c", "stage": "first", "order": 0}}
    task = PyTask(func="os.getcwd")
    first = Firework([task], spec=spec, name="first")
    second = Firework([task], spec=spec, name="second", parents=[first])
    metadata = {"campaign": "c", "key": f"{number:08x}"}
    return Workflow([first, second], name=f"pair {number}", metadata=metadata)


def when_told(count: int) -> Iterator[Workflow]:
    """Yield workflows; wait before the last of each batch, which is looked up next."""
    for number in range(count):
        if (number + 1) % BATCH == 0 or number + 1 == count:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            sys.stdin.readline()
        yield workflow(number)


def main() -> None:
    submission._BATCH = BATCH
    launchpad = load_launchpad(Path(sys.argv[1]))
    added, mended = submission.submit_many(launchpad, when_told(int(sys.argv[2])))
    sys.stdout.write(f"{added} {mended}\n")


if __name__ == "__main__":
    main()
