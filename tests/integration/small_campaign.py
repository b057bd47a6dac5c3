"""A campaign of the demonstration's kind that runs in seconds; also a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from processes import campaign_main, say, unique

ELEMENTS = ("Cu", "Ni", "Al", "Zr")  # 6 pairs, 42 candidates
NAME = "small"


def small_plan(folder: Path) -> Any:
    from nanoos_fw.demo import TARGET, demo_plan
    from nanoos_fw.firetasks.md import MDMethod
    from nanoos_fw.firetasks.relaxation import PotentialChoice, RelaxationMethod
    from nanoos_fw.md.inputs import MDConfig
    from nanoos_fw.ml.training import TrainingConfig

    plan = demo_plan(NAME, folder / "work", folder / "report.html")
    potential = PotentialChoice(name="zhou2004", elements=ELEMENTS)
    return plan.model_copy(
        update={
            "relaxation": RelaxationMethod(potential=potential),
            "training": TrainingConfig(
                target=TARGET, epochs=20, hidden_dim=16, num_layers=2, ensemble_size=2
            ),
            "md": MDMethod(
                config=MDConfig(
                    workflow_type="MD_NPT_LAMMPS",
                    equilibration_steps=200,
                    num_steps=400,
                    thermo_every=10,
                    dump_every=10,
                    supercell_min_atoms=100,
                ),
                rdf_bins=40,
                analyses=("rdf", "msd", "vdos"),
            ),
            "label_fraction": 0.6,
            "relaxations_per_firework": 9,
            "structures_per_firework": 14,
            "top_k": 4,
            "md_runs": 2,
        }
    )


def rows(database: Any) -> dict[str, Any]:
    """Return all result rows, by what identifies them, and fail on a double one."""
    campaign = database["campaigns"].find_one({"_id": NAME})
    return {
        "structures": sorted(d["_id"] for d in database["structures"].find()),
        "features": unique(
            [
                (d["structure"], (d["status"], d["sha256"]))
                for d in database["structure_features"].find()
            ],
            "features",
        ),
        "simulations": unique(
            [
                ((d["kind"], d["structure"]), (d["status"], d["result"]))
                for d in database["simulations"].find()
            ],
            "simulations",
        ),
        "models": unique(
            [
                (d["name"], (d["version"], d["metrics"]))
                for d in database["models"].find({"is_system_provided": False})
            ],
            "models",
        ),
        "predictions": unique(
            [
                ((d["model"], d["structure"]), (d["prediction"], d["uncertainty"]))
                for d in database["predictions"].find()
            ],
            "predictions",
        ),
        "ranking": campaign["outputs"]["ranking"],
    }


def submit(launchpad: Any, plan: Any) -> None:
    from nanoos_fw import demo

    demo.submit(launchpad, plan, verify=True)


def run(launchpad: Any, plan: Any, launch_dir: Path) -> list[Any]:
    from nanoos_fw import demo

    return demo.run(launchpad, plan, launch_dir, on_launch=say).failed


if __name__ == "__main__":
    campaign_main(small_plan, submit, run)
