"""RunMDTask's simulation without a database."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nanoos_fw.firetasks.md import RunMDTask, _Run
from nanoos_fw.parallel import Resources
from nanoos_fw.stores.simulations import Simulation, simulation_key

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from nanoos_fw.md.potentials import Potential


def simulate_by_task(
    folder: Path,
    structure: Structure,
    potential: Potential,
    config: dict[str, Any],
    *,
    method: str = "m",
    **md: Any,
) -> Simulation:
    """Return what the task would store; called again, it goes on in the folder."""
    place: Any = SimpleNamespace(
        work_dir=folder.joinpath,
        resources=Resources(),
        resources_for=lambda _: Resources(),
        deadline=None,
    )
    task = RunMDTask(
        structure="s",
        potential={"name": "sw", "elements": ["Si"]},
        md={"config": config, **md},
    )
    folder.joinpath("md", simulation_key("s", method)).mkdir(
        parents=True, exist_ok=True
    )
    return task._simulate(place, _Run("s", method, structure, potential))
