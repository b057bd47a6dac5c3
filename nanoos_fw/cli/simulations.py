"""``nanoos md``: run and submit simulations, and see how far they are."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli import trajectories
from nanoos_fw.cli.common import (
    add_json,
    finish,
    launchpad_of,
    print_json,
    save_if_embedded,
)
from nanoos_fw.errors import InputError

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from nanoos_fw.console import CountProgress


def add_commands(commands: Any) -> None:
    """Add ``md`` and what it can do."""
    group = commands.add_parser("md", help="run, analyse and plot simulations")
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add_simulate(actions)
    _add_submit(actions)

    status = actions.add_parser("status", help="how far a simulation is")
    status.add_argument("run", type=Path, metavar="DIR", help="folder of `md run -o`")
    add_json(status)
    status.set_defaults(command=_status)
    trajectories.add_actions(actions)


def _add_simulate(actions: Any) -> None:
    run = actions.add_parser(
        "run",
        help="simulate here and now, without a database",
        description=(
            "Interrupted or stopped, the same command continues from the last restart "
            "file."
        ),
    )
    run.add_argument("structure", type=Path, metavar="STRUCTURE_FILE")
    run.add_argument(
        "--workflow",
        default="MD_NVT_LAMMPS",
        metavar="NAME",
        help="default: %(default)s",
    )
    run.add_argument("--potential", metavar="NAME", help="see `nanoos potentials list`")
    run.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="parameters, such as temperature=300 num_steps=20000 timestep=2",
    )
    run.add_argument("--ranks", type=int, default=1, help="default: %(default)s")
    run.add_argument("--threads", type=int, default=1, help="of each rank")
    run.add_argument(
        "--corrections",
        type=int,
        default=2,
        metavar="N",
        help="tries with other parameters after a failure (default: %(default)s)",
    )
    run.add_argument(
        "--timeout", type=float, metavar="S", help="stop after so long, to go on later"
    )
    run.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    add_json(run)
    run.set_defaults(command=_run)


def _add_submit(actions: Any) -> None:
    submit = actions.add_parser(
        "submit",
        help="check a workflow file and submit it, for rlaunch or qlaunch",
        description=(
            "The file is as `nanoos template show` prints it. Structure, potential and "
            "parameters are checked before anything is written to the database; the "
            "file's work_dir is not used. The same simulation is submitted once."
        ),
    )
    submit.add_argument("workflow", help="workflow file (.yaml), or a shipped name")
    submit.add_argument(
        "--structure",
        metavar="NAME",
        help="a file instead of the one named there, or key or label of a stored one",
    )
    submit.add_argument("--potential", metavar="NAME", help="instead of the file's")
    submit.add_argument(
        "--analyses",
        help=f"names out of {','.join(trajectories.ANALYSES)} (default: rdf,msd)",
    )
    submit.add_argument(
        "--corrections",
        type=int,
        default=2,
        metavar="N",
        help="tries with other parameters after a failure (default: %(default)s)",
    )
    finish(submit, _submit)


def _submit(arguments: argparse.Namespace) -> int:
    import dataclasses

    from nanoos_fw.md.workflow_files import read_workflow
    from nanoos_fw.operations.simulations import submit_simulation
    from nanoos_fw.settings import load_settings

    workflow, stored = read_workflow(arguments.workflow), None
    if arguments.structure is not None:
        path = Path(arguments.structure)
        if path.exists():
            workflow = dataclasses.replace(workflow, structure=path.resolve())
        else:
            stored = arguments.structure
    if arguments.potential is not None:
        workflow = dataclasses.replace(workflow, potential=arguments.potential)
    launchpad, root = launchpad_of(arguments), str(load_settings().work_dir.resolve())
    names = arguments.analyses
    found = submit_simulation(
        launchpad,
        workflow,
        root,
        structure=stored,
        analyses=None if names is None else trajectories.analyses_of(names),
        max_corrections=arguments.corrections,
    )
    save_if_embedded(launchpad)
    plan = {**found.plan.to_dict(), "work_dir": root}
    if arguments.json:
        print_json({**plan, "structure": found.structure, "added": found.added})
        return 0
    for warning in found.plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    what = f"{plan['workflow_type']} of {plan['formula']}, {plan['n_atoms']} atoms"
    if found.added:
        print(f"{what}, is submitted; rlaunch runs it")
    else:
        print(f"{what}, is there already")
    print(f"structure {found.structure}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    parameters = _parameters(arguments)
    structure = _structure(arguments.structure)
    from rich.console import Console

    from nanoos_fw.console import CountProgress
    from nanoos_fw.md.engine import LAMMPSEngine
    from nanoos_fw.md.inputs import MDConfig
    from nanoos_fw.md.output import read_simulation
    from nanoos_fw.operations.simulation_folders import simulation_status
    from nanoos_fw.parallel import Resources, locked

    engine = LAMMPSEngine()
    folder = arguments.output.resolve()
    with locked(folder):
        inputs = engine.prepare_input(structure, parameters, folder)
        simulation = read_simulation(inputs)
        config = MDConfig.model_validate(simulation["config"])
        for warning in simulation["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        bar = CountProgress(Console(stderr=True), "timesteps", config.total_steps)
        with bar.shown(), _shown_by(bar):
            outcome = engine.run(
                structure,
                parameters,
                folder,
                max_corrections=arguments.corrections,
                timeout=arguments.timeout,
                resources=Resources(arguments.ranks, arguments.threads),
            )
    for number, entry in enumerate(outcome["corrections"], start=1):
        print(
            f"correction {number}: {entry['message']}; {entry['reason']}",
            file=sys.stderr,
        )
    if arguments.json:
        print_json(outcome)
    else:
        output = Path(outcome["output_dir"])
        print("\n".join(_status_lines(simulation_status(output))))
        print(output)
    return 0 if outcome["success"] else 1


def _parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    values: dict[str, Any] = {"workflow_type": arguments.workflow}
    for word in arguments.set:
        name, equals, text = word.partition("=")
        if not name or not equals:
            raise InputError(
                f"{word!r} sets nothing", advice="write --set temperature=300"
            )
        if name in ("workflow_type", "potential"):
            raise InputError(
                f"{name} has an option of its own",
                advice="use --workflow and --potential",
            )
        if name in values:
            raise InputError(f"{name} is set twice", advice="set it once")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text  # a word, such as the name of a barostat
    if arguments.potential is not None:
        values["potential"] = arguments.potential
    return values


def _structure(path: Path) -> Structure:
    from nanoos_fw.structure_files import EntryFailure, read_structures

    entries = list(itertools.islice(read_structures(path), 2))
    if len(entries) != 1:
        raise InputError(
            f"{path} holds {'several structures' if entries else 'no structure'}",
            advice="give a file with the one structure to simulate",
        )
    if isinstance(entries[0], EntryFailure):
        raise entries[0].error
    return entries[0].structure


@contextlib.contextmanager
def _shown_by(bar: CountProgress) -> Iterator[None]:
    """Hand the progress that the ranks report to a bar."""

    class Reports(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (progress := getattr(record, "progress", None)) is not None:
                bar.update(progress["done"])

    package, handler = logging.getLogger("nanoos_fw"), Reports(logging.INFO)
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _status(arguments: argparse.Namespace) -> int:
    from nanoos_fw.operations.simulation_folders import simulation_status

    found = simulation_status(arguments.run)
    if arguments.json:
        print_json(found)
    else:
        print("\n".join(_status_lines(found)))
    return 0


def _status_lines(found: dict[str, Any]) -> list[str]:
    state = "finished" if found["finished"] else "not finished"
    if found["converged"] is False:
        state = "ended, NOT converged"
    lines = [
        f"{found['workflow_type']}: {state}, step {found['step']} of "
        f"{found['total_steps']}"
    ]
    if not found["finished"]:
        lines.append(f"run again, it continues from step {found['restart_step']}")
    for name, value in found["last"].items():
        lines.append(f"  {name:20} {value['value']:.6g} {value['unit']}")
    return lines
