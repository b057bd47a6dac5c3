"""An active-learning campaign by LAMMPS that runs in seconds; also a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from processes import campaign_main, say, unique

ELEMENTS = ["Cu", "Ni", "Al", "Zr"]  # 6 pairs, 42 candidates
NAME = "small-active"


def small_plan(folder: Path) -> Any:
    from nanoos_fw.operations.active import read_plan

    return read_plan(
        {
            "name": NAME,
            "candidates": {"alloys": ELEMENTS},
            "labels": {
                "kind": "lammps",
                "method": {"potential": {"name": "zhou2004", "elements": ELEMENTS}},
            },
            "initial": {"size": 14},
            "selection": {"size": 6},
            "stop": {"max_rounds": 2},
            "training": {
                "target": "formation_energy_per_atom", "epochs": 10, "hidden_dim": 8,
                "readout_dim": 8, "ensemble_size": 2, "forest_baseline": False,
            },
            "labels_per_firework": 6,
            "structures_per_firework": 25,
            "work_root": str(folder / "work"),
            "report": str(folder / "report.html"),
            "report_every_round": False,
        }
    )  # fmt: skip


def rows(database: Any) -> dict[str, Any]:
    """Return all result rows, by what identifies them, and fail on a double one."""
    rounds = sorted(database["active_rounds"].find(), key=lambda d: d["number"])
    return {
        "chosen": [[pick[0] for pick in d["picks"]] for d in rounds],
        "scores": [[pick[1:] for pick in d["picks"]] for d in rounds],
        "stop": [d["stop"] for d in rounds],
        "datasets": [(d.get("dataset") or {}).get("hash") for d in rounds],
        "models": [(d.get("model") or {}).get("reference") for d in rounds],
        "labels": unique(
            [
                (d["structure"], (d["status"], d["result"]["energy_ev"]))
                for d in database["simulations"].find()
            ],
            "labels",
        ),
        "versions": unique(
            [
                (d["version"], (d["parent"], d["metrics"]["val"]["mae"]))
                for d in database["models"].find({"is_system_provided": False})
            ],
            "versions",
        ),
        "predictions": unique(
            [
                ((d["model"], d["structure"]), (d["prediction"], d["uncertainty"]))
                for d in database["predictions"].find()
            ],
            "predictions",
        ),
        "fireworks": sorted(
            (d["spec"]["nanoos"]["stage"], d["spec"]["nanoos"].get("round", -1))
            for d in database["fireworks"].find()
        ),
    }


def submit(launchpad: Any, plan: Any) -> None:
    from nanoos_fw.operations.active import submit_active

    submit_active(launchpad, plan)


def run(launchpad: Any, plan: Any, launch_dir: Path) -> list[Any]:
    from nanoos_fw import operations
    from nanoos_fw.stores.embedded import save_embedded
    from nanoos_fw.stores.launches import failed_fireworks

    operations.rerun_failed(launchpad, plan.name)
    save_embedded(launchpad)
    operations.run_embedded(launchpad, launch_dir, on_launch=say)
    return failed_fireworks(launchpad.db, plan.name)


if __name__ == "__main__":
    campaign_main(small_plan, submit, run)
