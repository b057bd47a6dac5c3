"""Submitting one simulation: checked with its structure, then a workflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from nanoos_fw.errors import InputError, validation_problems
from nanoos_fw.operations.campaign import prepare_launchpad
from nanoos_fw.operations.submission import submit
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.structures import NewStructure, StructureStore

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from nanoos_fw.md.workflow_files import WorkflowFile, WorkflowPlan

_SET = "simulations"


@dataclass(frozen=True)
class SubmittedSimulation:
    """A simulation that is in the database.

    Parameters
    ----------
    structure
        Its key in the structure store.
    plan
        What it comes to.
    added
        False if the same workflow was there already.
    """

    structure: str
    plan: WorkflowPlan
    added: bool


def submit_simulation(
    launchpad: Any,
    workflow: WorkflowFile,
    work_root: str,
    *,
    structure: str | None = None,
    analyses: Sequence[str] | None = None,
    max_corrections: int = 2,
) -> SubmittedSimulation:
    """Check a workflow file, store its structure and submit the simulation.

    Nothing is written before everything was checked. The folder named in the file is
    not used: that of a firework is named by what it computes.

    Parameters
    ----------
    launchpad
        Where to.
    workflow
        Its structure file is read, unless ``structure`` is given.
    work_root
        Folder of the work directories, which all workers share.
    structure
        Key, beginning of a key or label of a stored structure.
    analyses
        Of the trajectory; None takes distances and diffusion.
    max_corrections
        Tries with other parameters after a failure.

    Raises
    ------
    NanoOSError
        As `nanoos_fw.md.workflow_files.plan_workflow`; or if there is no such stored
        structure, or no such analysis.
    """
    from nanoos_fw.firetasks.md import MDMethod
    from nanoos_fw.firetasks.relaxation import PotentialChoice
    from nanoos_fw.md.cells import site_elements
    from nanoos_fw.md.workflow_files import plan_workflow
    from nanoos_fw.workflows import simulation_workflow

    try:
        md = MDMethod(
            config=workflow.config,
            max_corrections=max_corrections,
            **({} if analyses is None else {"analyses": tuple(analyses)}),
        )
    except ValidationError as error:
        raise InputError(
            f"the analysis cannot be made: {validation_problems(error)}"
        ) from error
    md.check()
    store = StructureStore(open_database(launchpad))
    if structure is None:
        plan = plan_workflow(workflow)
        entry = NewStructure(
            structure=_with_charges(plan),
            label=workflow.structure.stem,
            source=str(workflow.structure),
        )
        prepare_launchpad(launchpad)
        key = store.add([entry], in_set=_SET).keys[0]
    else:
        key = store.find_keys([structure])[0]
    # What is stored is what will be simulated: of two descriptions of one crystal, the
    # one that came first.
    stored = store.get_many([key])[key]
    plan = plan_workflow(workflow, stored.structure)
    choice = PotentialChoice(
        name=workflow.potential or plan.potential.name,
        elements=tuple(sorted(set(site_elements(stored.structure)))),
    )
    prepare_launchpad(launchpad)
    added = submit(
        launchpad,
        simulation_workflow(
            key,
            choice,
            md.key(plan.potential),
            md,
            work_root,
            label=stored.label,
        ),
    )
    return SubmittedSimulation(key, plan, added)


def _with_charges(plan: WorkflowPlan) -> Structure:
    """Return the structure with its oxidation states as charges, if they matter.

    Oxidation states are not stored, charges are.
    """
    from nanoos_fw.md.cells import site_charges

    structure, charges = plan.structure, None
    if plan.potential.charges != "none":
        charges = site_charges(structure)
    if charges is None:
        return structure
    return structure.copy(site_properties={"charge": charges.tolist()})
