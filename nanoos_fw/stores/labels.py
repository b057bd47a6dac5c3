"""Formation energies from stored relaxations: the label of a structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.stores.simulations import SimulationStore
from nanoos_fw.stores.structures import StructureStore

FORMATION_ENERGY = "formation_energy_per_atom"


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
    the same method: the lowest of its references, where there are several.

    Raises
    ------
    InputError
        If an elemental reference failed or is missing: no label can be right then.
    """
    elemental = _elemental_energies(structures, simulations, references, method)
    totals: dict[str, float] = {}
    failures: dict[str, dict[str, Any]] = {}
    for key, simulation in simulations.results(keys, method, ["energy_ev"]):
        if simulation.status == "failed":
            failures[key] = simulation.error or {}
        else:
            totals[key] = float(simulation.result["energy_ev"])
    energies: dict[str, float] = {}
    for key, counts in structures.element_counts(
        [key for key in keys if key in totals]
    ).items():
        missing = sorted(set(counts) - set(elemental))
        if missing:
            raise InputError(
                f"structure {key} has elements without a reference: "
                f"{', '.join(missing)}",
                evidence={"structure": key, "references": sorted(elemental)},
                advice="add the elements in their ground states to the references",
            )
        reference = sum(n * elemental[element] for element, n in counts.items())
        energies[key] = (totals[key] - reference) / sum(counts.values())
    pending = [key for key in keys if key not in totals and key not in failures]
    return FormationEnergies(energies=energies, failures=failures, pending=pending)


@dataclass(frozen=True)
class SimulatedValues:
    """Values of one property from simulations, and why some structures have none.

    Parameters
    ----------
    values
        Structure key -> value in ``unit``.
    unit
        Unit of the values; empty if the result does not tell it.
    failures, pending
        As in :class:`FormationEnergies`.
    """

    values: dict[str, float]
    unit: str
    failures: dict[str, dict[str, Any]]
    pending: list[str]


# Property -> where a relaxation has it, and its unit.
_OF_RELAXATIONS = {
    "energy": ("energy_ev", "eV"),
    "energy_per_atom": ("energy_per_atom_ev", "eV/atom"),
    "volume": ("volume_a3", "Å³"),
    "pressure": ("pressure_bar", "bar"),
    "max_force": ("max_force_ev_a", "eV/Å"),
}
_VOLUME_PER_ATOM = "volume_per_atom"


def simulated_values(
    structures: StructureStore,
    simulations: SimulationStore,
    *,
    keys: Sequence[str],
    method: str,
    name: str,
) -> SimulatedValues:
    """Return a property of stored simulations.

    Parameters
    ----------
    keys
        Structures.
    method
        Key of the method.
    name
        ``energy``, ``energy_per_atom``, ``volume``, ``volume_per_atom``, ``pressure``
        or ``max_force`` of a relaxation; or a number anywhere in the result, such as
        ``averages.density.mean``.

    Raises
    ------
    InputError
        If results of the method have no such number, or there is no such method.
    """
    per_atom = name == _VOLUME_PER_ATOM
    path, unit = _OF_RELAXATIONS.get("volume" if per_atom else name, (name, ""))
    values: dict[str, float] = {}
    failures: dict[str, dict[str, Any]] = {}
    found = 0
    for key, simulation in simulations.results(keys, method, [path]):
        found += 1
        if simulation.status == "failed":
            failures[key] = simulation.error or {}
            continue
        value: Any = simulation.result
        for step in path.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(
                f"the simulation of {key} has no number {path!r}",
                evidence={"structure": key, "method": method},
                advice=f"known: {', '.join([*_OF_RELAXATIONS, _VOLUME_PER_ATOM])}",
            )
        values[key] = float(value)
    if not found:
        raise InputError(
            f"none of {len(keys)} structures has a simulation by method {method!r}",
            evidence={"methods": simulations.methods()},
            advice="the methods in the evidence have results",
        )
    if per_atom:
        sizes = structures.sizes(list(values))
        values = {key: value / sizes[key] for key, value in values.items()}
        unit = "Å³/atom"
    pending = [key for key in keys if key not in values and key not in failures]
    return SimulatedValues(values, unit, failures, pending)


def _elemental_energies(
    structures: StructureStore,
    simulations: SimulationStore,
    references: Sequence[str],
    method: str,
) -> Mapping[str, float]:
    found = dict(simulations.results(references, method, ["energy_ev"]))
    energies: dict[str, float] = {}
    for key, counts in structures.element_counts(list(references)).items():
        if len(counts) != 1:
            raise InputError(
                f"reference {key} is not an element", evidence={"content": counts}
            )
        ((element, n_atoms),) = counts.items()
        simulation = found.get(key)
        if simulation is None or simulation.status == "failed":
            error = (simulation.error or {}) if simulation else {}
            raise InputError(
                f"the reference energy of {element} is missing",
                evidence={"structure": key, "error": error},
                advice="rerun the firework that relaxes the references",
            )
        energy = float(simulation.result["energy_ev"]) / n_atoms
        # An element's state is the lowest of those given, whatever their order.
        energies[element] = min(energy, energies.get(element, energy))
    return energies
