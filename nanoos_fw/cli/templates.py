"""``nanoos template``: workflow files to begin with, checked and rendered."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import add_json, print_json

if TYPE_CHECKING:
    from nanoos_fw.md.workflow_files import WorkflowPlan


def add_commands(commands: Any) -> None:
    """Add ``template`` and what it can do."""
    group = commands.add_parser(
        "template", help="workflow files of simulations: list, show, check, render"
    )
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")

    listing = actions.add_parser("list", help="list the shipped workflow files")
    add_json(listing)
    listing.set_defaults(command=_list)

    show = actions.add_parser("show", help="print one, to be changed")
    show.add_argument("name", help="as 'nanoos template list' has it")
    show.set_defaults(command=_show)

    validate = actions.add_parser(
        "validate",
        help="check structure, potential and parameters; say what would be run",
    )
    _add_workflow(validate)
    add_json(validate)
    validate.set_defaults(command=_validate)

    render = actions.add_parser(
        "render", help="write in.lammps, structure.data and the potential; run nothing"
    )
    _add_workflow(render)
    render.add_argument(
        "-o", "--output", type=Path, help="folder, instead of the file's work_dir"
    )
    add_json(render)
    render.set_defaults(command=_render)


def _add_workflow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workflow", help="workflow file (.yaml), or a shipped name")
    parser.add_argument(
        "--structure", type=Path, metavar="FILE", help="instead of the file's"
    )
    parser.add_argument("--potential", metavar="NAME", help="instead of the file's")


def _list(arguments: argparse.Namespace) -> int:
    from nanoos_fw.md.workflow_files import shipped_workflows

    found = shipped_workflows()
    if arguments.json:
        print_json(found)
        return 0
    for name, about in found.items():
        print(f"{name:14} {about}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from nanoos_fw.md.workflow_files import workflow_text

    print(workflow_text(arguments.name), end="")
    return 0


def _plan(arguments: argparse.Namespace, output: Path | None = None) -> WorkflowPlan:
    from nanoos_fw.md.workflow_files import plan_workflow, read_workflow

    given = {
        "structure": arguments.structure,
        "potential": arguments.potential,
        "work_dir": output,
    }
    return plan_workflow(
        dataclasses.replace(
            read_workflow(arguments.workflow),
            **{key: value for key, value in given.items() if value is not None},
        )
    )


def _validate(arguments: argparse.Namespace) -> int:
    plan = _plan(arguments)
    if arguments.json:
        print_json(plan.to_dict())
    else:
        _print_plan(plan.to_dict())
    return 0


def _render(arguments: argparse.Namespace) -> int:
    from nanoos_fw.md.workflow_files import render_workflow

    plan = _plan(arguments, arguments.output)
    folder = render_workflow(plan)
    if arguments.json:
        print_json({**plan.to_dict(), "input_dir": str(folder)})
        return 0
    _print_plan(plan.to_dict())
    print(f"written: {folder}")
    if plan.evaluations:
        print("in.lammps is the unstrained crystal; the engine makes the strained ones")
    return 0


def _print_plan(plan: dict[str, Any]) -> None:
    box = " × ".join(f"{length:.2f}" for length in plan["box_a"])
    print(f"{plan['workflow']} is valid: one {plan['workflow_type']} simulation")
    print(f"  structure  {plan['formula']}, {plan['n_atoms']} atoms, {box} Å")
    print(f"  potential  {plan['potential']}")
    print(f"  folder     {plan['work_dir']}")
    if "stages" in plan:
        print(
            f"  length     {plan['steps']} steps of {plan['timestep_fs']:g} fs: "
            f"{plan['time_ps']:g} ps, {plan['frames']} frames"
        )
    for stage in plan.get("stages", ()):
        print(
            f"  stage      {stage['name']}: {stage['ensemble']}, {stage['steps']} "
            f"steps, {stage['start_k']:g} K to {stage['stop_k']:g} K"
        )
    if "evaluations" in plan:
        print(f"  copies     {plan['evaluations']} strained copies, each relaxed")
    if "steps_at_most" in plan:
        print(f"  length     at most {plan['steps_at_most']} steps of minimization")
    for warning in plan["warnings"]:
        print(f"warning: {warning}")
