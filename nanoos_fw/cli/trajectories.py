"""``nanoos md``: what trajectories say: analyses, plots, files for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import add_json, print_json
from nanoos_fw.errors import InputError, validation_problems

if TYPE_CHECKING:
    from nanoos_fw.md.analysis import Analysis, AnalysisRequest

ANALYSES = ("rdf", "adf", "msd", "vdos", "npt")


def add_actions(actions: Any) -> None:
    """Add ``analyze``, ``plot`` and ``export``."""
    analyze = actions.add_parser(
        "analyze",
        help="distances, angles, diffusion, vibrations of a simulation's trajectory",
        description=(
            "Analyse the frames after equilibration. Memory does not grow with the "
            "trajectory. Curves are written as CSV files with -o."
        ),
    )
    _add_run(analyze)
    _add_request(analyze)
    analyze.add_argument(
        "-o", "--output", type=Path, help="folder for the curves, one CSV file each"
    )
    add_json(analyze)
    analyze.set_defaults(command=_analyze)

    plot = actions.add_parser(
        "plot", help="temperature, energy, pressure, volume and analyses as pictures"
    )
    _add_run(plot)
    _add_request(plot)
    plot.add_argument(
        "-o", "--output", type=Path, default=Path("plots"), help="folder (%(default)s)"
    )
    plot.add_argument(
        "--format", choices=("png", "svg"), default="png", help="default: %(default)s"
    )
    plot.set_defaults(command=_plot)

    export = actions.add_parser(
        "export",
        help="frames, last structure or thermo table for other programs",
        description=(
            "extxyz: frames in the crystal's own orientation and order of sites; "
            "lammps: a text dump; poscar: the last structure; csv: the thermo table. "
            "FILE.json tells units, digest and simulation."
        ),
    )
    _add_run(export)
    export.add_argument(
        "--format",
        choices=("extxyz", "lammps", "poscar", "csv"),
        default="extxyz",
        help="default: %(default)s",
    )
    export.add_argument(
        "--first-step",
        type=int,
        default=0,
        metavar="STEP",
        help="leave out what is before",
    )
    export.add_argument(
        "--every", type=int, default=1, metavar="N", help="every N-th frame or row"
    )
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    add_json(export)
    export.set_defaults(command=_export)


def _add_run(parser: Any) -> None:
    parser.add_argument(
        "run", type=Path, help="output folder of the simulation, or the one above"
    )


def _add_request(parser: Any) -> None:
    parser.add_argument(
        "--analyses",
        default="rdf,msd",
        help=f"names out of {','.join(ANALYSES)} (default: %(default)s)",
    )
    parser.add_argument("--rdf-max", type=float, metavar="Å", help="longest distance")
    parser.add_argument("--rdf-bins", type=int, metavar="N")
    parser.add_argument(
        "--adf-cutoff", type=float, metavar="Å", help="default: first minimum of g(r)"
    )
    parser.add_argument(
        "--msd-first", type=float, metavar="PS", help="start of the fit"
    )
    parser.add_argument("--msd-last", type=float, metavar="PS", help="end of the fit")
    parser.add_argument(
        "--vdos-longest", type=float, metavar="PS", help="longest lag of velocities"
    )
    parser.add_argument("--memory", type=float, metavar="MB", help="for time series")


def analyses_of(text: str) -> list[str]:
    """Return the names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _request(arguments: argparse.Namespace) -> AnalysisRequest:
    from pydantic import ValidationError

    from nanoos_fw.md.analysis import AnalysisRequest

    values = {
        "rdf_max_a": arguments.rdf_max,
        "rdf_bins": arguments.rdf_bins,
        "adf_cutoff_a": arguments.adf_cutoff,
        "msd_first_ps": arguments.msd_first,
        "msd_last_ps": arguments.msd_last,
        "vdos_longest_ps": arguments.vdos_longest,
        "memory_mb": arguments.memory,
    }
    try:
        return AnalysisRequest.model_validate(
            {
                "analyses": analyses_of(arguments.analyses),
                **{name: value for name, value in values.items() if value is not None},
            }
        )
    except ValidationError as error:
        raise InputError(
            f"the analysis cannot be made: {validation_problems(error)}",
            advice=f"analyses: {', '.join(ANALYSES)}",
        ) from error


def _analyze(arguments: argparse.Namespace) -> int:
    request = _request(arguments)
    from nanoos_fw.md.analysis import analyze_simulation
    from nanoos_fw.operations.simulation_folders import output_dir_of

    found = analyze_simulation(output_dir_of(arguments.run), request)
    if arguments.output is not None:
        _write_csv(found, arguments.output)
    if arguments.json:
        failures = {name: e.to_dict() for name, e in found.failures.items()}
        print_json({"analyses": found.numbers, "failed": failures})
    else:
        for name, numbers in found.numbers.items():
            print("\n".join(_lines(name, numbers)))
        for name, error in found.failures.items():
            print(f"{name}: not possible: {error}")
    return 1 if found.failures else 0


def _lines(name: str, numbers: dict[str, Any]) -> list[str]:
    if name == "rdf":
        minima = numbers["first_minima_a"]
        if not minima:
            return [f"rdf: {numbers['n_frames']} frames, no first shell"]
        shells = ", ".join(
            f"{name} {number:.2f} within {minima[name]:.2f} Å"
            for name, number in numbers["coordination"].items()
        )
        lines = [f"rdf: neighbours in the first shell: {shells}"]
        if numbers["r_a"][-1] > numbers["half_cell_a"]:
            lines.append(
                f"rdf: beyond {numbers['half_cell_a']:.2f} Å, half of the cell, images "
                "are counted: a liquid repeats itself there"
            )
        return lines
    if name == "adf":
        found = numbers["most_frequent_deg"].items()
        angles = ", ".join(f"{k} {v:.1f}°" for k, v in found)
        return [f"adf: within {numbers['cutoff_a']:.2f} Å, most frequent: {angles}"]
    if name == "msd":
        return [
            f"msd: {key}: not diffusive (exponent {_number(d['exponent'])})"
            if d["value"] is None
            else f"msd: {key}: D = {d['value']:.4g} ± {d['standard_error']:.2g} Å²/ps "
            f"({d['value_cm2_s']:.3g} cm²/s), from {d['first_ps']:g} to "
            f"{d['last_ps']:g} ps, periodic box"
            for key, d in numbers["diffusion"].items()
        ]
    if name == "vdos":
        line = (
            f"vdos: {numbers['n_modes']:.1f} modes of {numbers['n_modes_expected']} "
            f"at equilibrium, limit {numbers['limit_thz']:.3g} THz"
        )
        hint = "" if numbers["is_resolved"] else "; NOT resolved, dump more often"
        return [line + hint]
    return [
        f"{name}: {key} = {value['value']:.4g} ± {value['standard_error']:.2g} "
        f"{value['unit']}"
        for key, value in numbers.items()
        if isinstance(value, dict)
    ]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _write_csv(found: Analysis, folder: Path) -> None:
    import numpy as np

    from nanoos_fw.provenance import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    for name, arrays in found.arrays.items():
        # Curves of one length share a file: a VDOS has frequencies and times.
        lengths = dict.fromkeys(len(values) for values in arrays.values())
        for number, length in enumerate(lengths):
            columns = {k: v for k, v in arrays.items() if len(v) == length}
            rows = np.column_stack(list(columns.values()))
            text = ",".join(columns) + "\n"
            text += "".join(",".join(f"{x:.10g}" for x in row) + "\n" for row in rows)
            path = folder / f"{name}{f'-{number + 1}' if number else ''}.csv"
            write_atomic(path, text.encode())
            print(path)


def _plot(arguments: argparse.Namespace) -> int:
    request = _request(arguments)
    from nanoos_fw.operations.simulation_folders import plot_run

    found = plot_run(
        arguments.run, request, arguments.output, plot_format=arguments.format
    )
    for name, error in found.failures.items():
        print(f"{name}: not possible: {error}")
    for path in found.paths:
        print(path)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from nanoos_fw.md.exports import description_of, export_simulation
    from nanoos_fw.operations.simulation_folders import output_dir_of

    found = export_simulation(
        output_dir_of(arguments.run),
        arguments.output,
        arguments.format,
        first_step=arguments.first_step,
        every=arguments.every,
    )
    if arguments.json:
        print_json(found)
    else:
        print(arguments.output)
        print(description_of(arguments.output))
    return 0
