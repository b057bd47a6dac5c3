"""Where a simulation goes on from, by files alone."""

from __future__ import annotations

import struct

import pytest

from nanoos_fw.errors import SimulationError
from nanoos_fw.md.inputs import Origin
from nanoos_fw.md.restarts import (
    PORTABLE,
    STOP_RESTART,
    drop_segments_after,
    is_exact,
    newest_origin,
    portable_step,
    publish,
    put_away,
    record_segment,
    restart_step,
)
from nanoos_fw.provenance import read_json

MAGIC = b"LammpS RestartT\0"


def restart(step, version=b"22 Jul 2025\0", units=b"metal\0"):
    """The head of a restart file as LAMMPS 22Jul2025 writes it, and its end."""
    fields = struct.pack("<ii", 0, len(version)) + version
    fields += struct.pack("<iii", 1, 4, 4) + struct.pack("<iii", 2, 8, 8)
    fields += struct.pack("<ii", 4, len(units)) + units
    fields += struct.pack("<iq", 5, step) if False else struct.pack("<i", 5)
    fields += struct.pack("<q", step)
    return MAGIC + struct.pack("<ii", 1, 3) + fields + bytes(500) + MAGIC
