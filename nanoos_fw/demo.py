"""The demonstration: binary alloys of sixteen metals, screened for formation energy.

A real campaign on one machine. Candidates are ordered binary alloys on simple
prototypes; LAMMPS with the embedded-atom potential of Zhou, Johnson and Wadley
(Phys. Rev. B 69, 144113, 2004) labels a quarter of them; a CGCNN ensemble learns the
formation energy and ranks the rest; LAMMPS checks the best.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nanoos_fw import operations
from nanoos_fw.firetasks.campaign_plan import CampaignPlan, choose_labelled
from nanoos_fw.firetasks.md import MDMethod
from nanoos_fw.firetasks.relaxation import PotentialChoice, RelaxationMethod
from nanoos_fw.md import zhou2004
from nanoos_fw.md.inputs import MDConfig
from nanoos_fw.ml.datasets import DatasetConfig
from nanoos_fw.ml.training import TrainingConfig
from nanoos_fw.operations.alloys import alloy_candidates, alloy_references
from nanoos_fw.operations.status import CampaignStatus, campaign_status
from nanoos_fw.reports import RankedCandidate, Ranking, collect_report, findings
from nanoos_fw.slurm import queued_jobs
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.embedded import save_embedded
from nanoos_fw.stores.launches import FailedFirework, failed_fireworks
from nanoos_fw.stores.structures import StructureStore
from nanoos_fw.workflows import screening_workflow, verification_workflow

_WATCH_S = 3.0
TARGET = "formation_energy_per_atom"
DESCRIPTION = (
    "Ordered binary alloys of sixteen metals on the prototypes L1_2, L1_0, B2, B32 and "
    "D0_3, screened for their formation energy in the embedded-atom potential of Zhou, "
    "Johnson and Wadley (2004)."
)


@dataclass(frozen=True)
class Outcome:
    """How a run of the demonstration ended."""

    failed: list[FailedFirework]
    report: Path | None


def demo_plan(name: str, work_root: Path, report: Path) -> CampaignPlan:
    """Return the plan of the demonstration."""
    return CampaignPlan(
        name=name,
        description=DESCRIPTION,
        work_root=str(work_root),
        report=str(report),
        relaxation=RelaxationMethod(
            potential=PotentialChoice(name="zhou2004", elements=zhou2004.elements())
        ),
        dataset=DatasetConfig(
            target_property=TARGET,
            train_fraction=0.7,
            val_fraction=0.1,
            test_fraction=0.2,
        ),
        training=TrainingConfig(target=TARGET),
        md=MDMethod(
            config=MDConfig(
                workflow_type="MD_NPT_LAMMPS",
                temperature_k=300.0,
                pressure_bar=1.0,
                equilibration_steps=2500,
                num_steps=7500,
                thermo_every=20,
                dump_every=50,
                supercell_min_atoms=500,
            )
        ),
    )


def submit(launchpad: Any, plan: CampaignPlan, *, verify: bool) -> None:
    """Put structures, campaign and workflows into the database; again is harmless."""
    elements = plan.relaxation.potential.elements
    database = open_database(launchpad)
    operations.prepare_launchpad(launchpad)
    CampaignStore(database).create(plan.name, plan.model_dump(mode="json"))
    store = StructureStore(database)
    keys = store.add(alloy_candidates(elements), in_set=plan.candidates).keys
    elemental = store.add(alloy_references(elements), in_set=plan.references).keys
    labelled = choose_labelled(keys, plan.label_fraction, plan.seed)
    store.add_to_set(labelled, plan.labelled)
    operations.submit(launchpad, screening_workflow(plan, keys, elemental))
    if verify:
        operations.submit(launchpad, verification_workflow(plan, keys))


def run(
    launchpad: Any,
    plan: CampaignPlan,
    launch_dir: Path,
    *,
    on_launch: Callable[[str, int], None],
) -> Outcome:
    """Run a submitted demonstration in this process, failed fireworks again too.

    Parameters
    ----------
    on_launch
        Called after each firework with its stage and the number completed in all.
    """
    operations.rerun_failed(launchpad, plan.name)
    save_embedded(launchpad)
    operations.run_embedded(
        launchpad,
        launch_dir,
        on_launch=lambda stage: on_launch(stage, progress(launchpad, plan.name)[1]),
    )
    return Outcome(
        failed=failed_fireworks(launchpad.db, plan.name),
        report=report_path(launchpad, plan.name),
    )


def watch(
    launchpad: Any, plan: CampaignPlan, job: str, *, say: Callable[[str], None]
) -> Outcome:
    """Wait until the workers of a job have ended the campaign, or left it.

    Parameters
    ----------
    job
        SLURM job of the workers.
    say
        Takes a line whenever something has changed.
    """
    ended = {"COMPLETED", "FIZZLED", "DEFUSED"}
    last = ""
    while True:
        lives = job in queued_jobs()  # asked first: what it did last is counted below
        status = campaign_status(launchpad.db, plan.name)
        total, done = _progress(status)
        running = [s for s, found in status.stages.items() if "RUNNING" in found]
        line = f"{done} of {total} fireworks done; running: {', '.join(running) or '-'}"
        if line != last:
            say(line)
            last = line
        if status.states.keys() <= ended:
            break
        if not lives:
            say(f"job {job} has ended before the campaign; nanoos reconcile tells why")
            break
        time.sleep(_WATCH_S)
    return Outcome(
        failed=failed_fireworks(launchpad.db, plan.name),
        report=report_path(launchpad, plan.name),
    )


def progress(launchpad: Any, name: str) -> tuple[int, int]:
    """Return the number of fireworks of a campaign, and of those completed."""
    return _progress(campaign_status(launchpad.db, name))


def _progress(status: CampaignStatus) -> tuple[int, int]:
    return sum(status.states.values()), status.states.get("COMPLETED", 0)


def summary(launchpad: Any, plan: CampaignPlan, outcome: Outcome) -> list[str]:
    """Return what the end of the demonstration tells, line by line."""
    data = collect_report(launchpad.db, plan.name)
    # A terminal has no subscripts: keep L1_0 from becoming L10.
    abstract = re.sub(r"\b([A-Z]\d)<sub>", r"\1_<sub>", str(findings.abstract(data)))
    lines = ["", *textwrap.wrap(Markup(abstract).striptags(), 88), ""]
    if isinstance(data.ranking, Ranking):
        lines.append("rank  candidate           predicted         LAMMPS  eV/atom")
        lines += [_line(row) for row in data.ranking.candidates[: plan.top_k]]
    lines += [
        f"failed: firework {failed.fw_id} ({failed.stage}): {failed.error}"
        for failed in outcome.failed
    ]
    if outcome.failed:
        lines.append("run the same command again to try the failed fireworks again")
    if outcome.report is not None:
        lines += ["", f"report: {outcome.report}"]
    return lines


def _line(row: RankedCandidate) -> str:
    sigma = "" if row.uncertainty is None else f"± {row.uncertainty:.3f}"
    lammps = f"{row.lammps:.3f}" if isinstance(row.lammps, float) else "–"
    name = f"{row.formula} {row.prototype}"
    return f"{row.rank:4d}  {name:18} {row.predicted:9.3f} {sigma:8} {lammps:>7}"


def report_path(launchpad: Any, name: str) -> Path | None:
    """Return where the report of a campaign was written last, if it is there."""
    outputs = CampaignStore(launchpad.db).get(name)["outputs"]
    path = Path(outputs["report"]) if "report" in outputs else None
    return path if path is not None and path.exists() else None
