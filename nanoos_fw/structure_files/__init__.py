"""Read crystals from files: CIF, POSCAR, extended XYZ, pymatgen JSON, folders.

`read_structures` streams: it holds one entry at a time, and reports what it cannot use
entry by entry instead of stopping.
"""

from __future__ import annotations

from nanoos_fw.structure_files.entries import EntryFailure, Source, StructureEntry
from nanoos_fw.structure_files.reading import read_structures

__all__ = ["EntryFailure", "Source", "StructureEntry", "read_structures"]
