"""Ordered binary alloys as entries for the structure store."""

from __future__ import annotations

from collections.abc import Iterator

from nanoos_fw.stores.structures import NewStructure


def alloy_candidates(elements: tuple[str, ...]) -> Iterator[NewStructure]:
    """Yield the ordered alloys of all pairs, volumes between those of the elements."""
    from nanoos_fw.prototypes import binary_alloys

    volumes = {
        entry.structure.composition.elements[0].symbol: entry.structure.volume
        / len(entry.structure)
        for entry in alloy_references(elements)
    }
    for candidate in binary_alloys(elements, volumes):
        yield NewStructure(
            structure=candidate.structure,
            label=candidate.label,
            source="nanoos_fw.prototypes.binary_alloys",
            prototype=candidate.prototype,
        )


def alloy_references(elements: tuple[str, ...]) -> Iterator[NewStructure]:
    """Yield the elements in their ground-state structures."""
    from nanoos_fw.prototypes import ground_state

    for element in elements:
        yield NewStructure(
            structure=ground_state(element),
            label=element,
            source="nanoos_fw.prototypes.ground_state",
        )
