"""Formation energies from stored relaxations: the label of a structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.stores.simulations import SimulationStore
from nanoos_fw.stores.structures import StructureStore


@dataclass(frozen=True)
class FormationEnergies:
    """Formation energies, and why some structures have none.

    Parameters
    ----------
    energies
        Structure key -> eV/atom.
    failures
        Structure key -> ``NanoOSError.to_dict()`` of its relaxation.
    pending
        Keys that have not been computed.
    """

    energies: dict[str, float]
    failures: dict[str, dict[str, Any]]
    pending: list[str]


def formation_energies(
    structures: StructureStore,
    simulations: SimulationStore,
    *,
    keys: Sequence[str],
    references: Sequence[str],
    method: str,
) -> FormationEnergies:
    """Return formation energies per atom against the relaxed elements.

    E_f = (E - Σ_i n_i e_i) / N with e_i the energy per atom of element i, relaxed by
    the same method.

    Raises
    ------
    InputError
        If an elemental reference failed or is missing: no label can be right then.
    """
    elemental = _elemental_energies(structures, simulations, references, method)
    found = simulations.find(keys, method)
    stored = structures.get_many([key for key in keys if key in found])
    energies: dict[str, float] = {}
    failures: dict[str, dict[str, Any]] = {}
    for key, simulation in found.items():
        if simulation.status == "failed":
            failures[key] = simulation.error or {}
            continue
        counts = element_counts(stored[key].structure)
        missing = sorted(set(counts) - set(elemental))
        if missing:
            raise InputError(
                f"structure {stored[key].label!r} has elements without a reference: "
                f"{', '.join(missing)}",
                evidence={"references": sorted(elemental)},
                advice="add the elements in their ground states to the references",
            )
        total = float(simulation.result["energy_ev"])
        n_atoms = sum(counts.values())
        reference = sum(n * elemental[element] for element, n in counts.items())
        energies[key] = (total - reference) / n_atoms
    pending = [key for key in keys if key not in found]
    return FormationEnergies(energies=energies, failures=failures, pending=pending)


def element_counts(structure: Any) -> dict[str, int]:
    """Return the number of atoms of each element of an ordered structure."""
    counts: dict[str, int] = {}
    for site in structure:
        counts[site.specie.symbol] = counts.get(site.specie.symbol, 0) + 1
    return counts


def _elemental_energies(
    structures: StructureStore,
    simulations: SimulationStore,
    references: Sequence[str],
    method: str,
) -> Mapping[str, float]:
    found = simulations.find(references, method)
    stored = structures.get_many(references)
    energies: dict[str, float] = {}
    for key, entry in stored.items():
        counts = element_counts(entry.structure)
        if len(counts) != 1:
            raise InputError(f"reference {entry.label!r} is not an element")
        (element,) = counts
        simulation = found.get(key)
        if simulation is None or simulation.status == "failed":
            error = (simulation.error or {}) if simulation else {}
            raise InputError(
                f"the reference energy of {element} is missing",
                evidence={"structure": key, "error": error},
                advice="rerun the firework that relaxes the references",
            )
        energies[element] = float(simulation.result["energy_ev"]) / counts[element]
    return energies
