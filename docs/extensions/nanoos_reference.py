"""Reference pages from the program itself: commands, firetasks, settings, errors.

What these directives write is taken from the objects that do the work, so that a page
cannot lag behind: the parsers of the command line, the parameter models of the
firetasks, `Settings`, the table of indexes and those of failures.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def literal(text: object) -> str:
    """Return text as a literal of reStructuredText."""
    return f"``{str(text).strip()}``"


def plain(text: str) -> str:
    """Return text with the characters escaped that mean something to docutils."""
    return re.sub(r"([\\*`|]|_\b)", r"\\\1", " ".join(text.split()))


def indented(text: str, width: int = 3) -> list[str]:
    """Return the lines of a text moved to the right."""
    return [" " * width + line if line.strip() else "" for line in text.splitlines()]


class Generated(SphinxDirective):
    """A directive whose content is reStructuredText made by `lines`."""

    optional_arguments = 1

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Parse the text in the place of the directive."""
        return self.parse_text_to_nodes(
            "\n".join(self.lines()), allow_section_headings=True
        )


# ------------------------------------------------------------------------- commands


def walk(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser, str]]:
    """Yield every command with its parser and its line of help."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        helps = {entry.dest: entry.help or "" for entry in action._choices_actions}
        for name, below in action.choices.items():
            path = (*words, name)
            yield path, below, helps.get(name, "")
            yield from walk(below, path)


class Commands(Generated):
    """All commands of the command line, with their options and Python calls."""

    def lines(self) -> Iterator[str]:
        """Yield a section for each command."""
        from nanoos_fw.cli import _parser
        from nanoos_fw.cli.python_calls import PYTHON_CALLS

        for words, parser, about in walk(_parser()):
            name = " ".join(words)
            group = parser.get_default("command") is None
            yield from ("", f".. _command-{'-'.join(words)}:", "")
            title = f"nanoos {name}"
            yield from (title, ("=" if len(words) == 1 else "-") * len(title), "")
            text = parser.description or about
            yield plain(f"{text[:1].upper()}{text[1:].rstrip('.')}.")
            yield ""
            if group:
                continue
            formatter = argparse.HelpFormatter(f"nanoos {name}", width=78)
            formatter.add_usage(parser.usage, parser._actions, [], "")
            yield from (".. code-block:: text", "")
            yield from indented(formatter.format_help().strip())
            yield ""
            for action in parser._actions:
                if not isinstance(action, argparse._HelpAction):
                    yield from self._option(action, parser)
            yield from (f"In Python: {_reference(PYTHON_CALLS[name])}.", "")

    def _option(
        self, action: argparse.Action, parser: argparse.ArgumentParser
    ) -> Iterator[str]:
        formatter = argparse.HelpFormatter(parser.prog)
        if action.option_strings:
            value = ""
            if action.nargs != 0:
                default = formatter._get_default_metavar_for_optional(action)
                value = " " + formatter._format_args(action, default)
            head = ", ".join(f"{option}{value}" for option in action.option_strings)
        else:
            default = formatter._get_default_metavar_for_positional(action)
            head = formatter._format_args(action, default)
        about = formatter._expand_help(action) if action.help else ""
        yield literal(head)
        yield from indented(plain(about) or "\\")
        yield ""


def _reference(call: str) -> str:
    module, _, name = call.partition(":")
    role = "py:func" if "." not in name else "py:meth"
    return f":{role}:`~{module}.{name}`"


class Calls(Generated):
    """The table of commands and Python calls."""

    def lines(self) -> Iterator[str]:
        """Yield the table."""
        from nanoos_fw.cli.python_calls import PYTHON_CALLS

        rows = [
            (f":ref:`nanoos {name} <command-{name.replace(' ', '-')}>`", _full(call))
            for name, call in PYTHON_CALLS.items()
        ]
        yield from table(("Command", "Call"), rows, "35 65")


def _full(call: str) -> str:
    return _reference(call).replace("`~", "`")


# ------------------------------------------------------------------------- firetasks


class Firetasks(Generated):
    """All firetasks, with the models of their parameters."""

    def lines(self) -> Iterator[str]:
        """Yield a section for each firetask."""
        from nanoos_fw import firetasks

        for name in firetasks.__all__:
            task = getattr(firetasks, name)
            yield from ("", f".. _firetask-{name}:", "", name, "-" * len(name), "")
            yield from inspect.getdoc(task).splitlines()
            yield from ("", f"Stored as {literal(task._fw_name)}.", "")
            yield from parameters_of(task.parameters_model)


class Parameters(Generated):
    """The fields of a pydantic model: ``.. parameters:: module:Class``."""

    required_arguments = 1

    def lines(self) -> Iterator[str]:
        """Yield the text of the model and a list of its fields."""
        module, _, name = self.arguments[0].partition(":")
        model = getattr(importlib.import_module(module), name)
        yield from (inspect.getdoc(model) or "").splitlines()[:1]
        yield ""
        yield from parameters_of(model)


def parameters_of(model: type[BaseModel]) -> Iterator[str]:
    """Yield a definition list of the fields of a model."""
    for name, field in model.model_fields.items():
        kind = annotation(field.annotation)
        if field.is_required():
            default = "required"
        elif field.default_factory is not None or isinstance(field.default, BaseModel):
            default = "with defaults of its own"
        elif field.default is PydanticUndefined:
            default = "required"
        else:
            default = f"default {literal(repr(field.default))}"
        yield f"{literal(name)} : {plain(kind)}, {default}"
        yield from indented(plain(field.description or "") or "\\")
        yield ""


def annotation(kind: Any) -> str:
    """Return a type in words short enough for a page."""
    plain_type = isinstance(kind, type) and not hasattr(kind, "__args__")
    text = kind.__name__ if plain_type else str(kind)
    text = re.sub(r"\b(?:[a-z_0-9]+\.)+([A-Za-z_]+)", r"\1", text)
    return text.replace("NoneType", "None").replace(" | None", " or None")


# --------------------------------------------------------------------------- tables


def table(
    header: tuple[str, ...], rows: list[tuple[str, ...]], widths: str
) -> Iterator[str]:
    """Yield a table; the cells are reStructuredText."""
    yield from (".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", "")
    for row in (header, *rows):
        for number, cell in enumerate(row):
            yield f"   {'*' if number == 0 else ' '} - {cell}"
    yield ""


class SettingsTable(Generated):
    """All settings with variable, meaning and default."""

    def lines(self) -> Iterator[str]:
        """Yield the table."""
        from nanoos_fw.settings import PREFIX, Settings

        rows = [
            (
                literal(PREFIX + name.upper()),
                plain(field.description or ""),
                "none" if field.default is None else literal(field.default),
            )
            for name, field in Settings.model_fields.items()
        ]
        yield from table(("Variable", "Meaning", "Default"), rows, "30 50 20")


class Collections(Generated):
    """The collections of the database with their indexes."""

    def lines(self) -> Iterator[str]:
        """Yield the table."""
        from nanoos_fw.stores.database import INDEXES

        rows = []
        for name, indexes in INDEXES.items():
            words = [
                f"{literal(', '.join(fields))}{' (unique)' if unique else ''}"
                for fields, unique in indexes
            ]
            rows.append((literal(name), "; ".join(words) or "by key only"))
        yield from table(("Collection", "Indexes beside the key"), rows, "30 70")


class Errors(Generated):
    """The classes of errors, what a rerun does about them, and failures of LAMMPS."""

    def lines(self) -> Iterator[str]:
        """Yield three tables."""
        from nanoos_fw import errors
        from nanoos_fw.md.failures import FAILURES
        from nanoos_fw.operations.rules import RULES, failure_class

        which = self.arguments[0]
        if which == "kinds":
            rows = []
            for kind, cls in sorted(errors._KINDS.items()):
                if cls is errors.NanoOSError:
                    continue
                about = (inspect.getdoc(cls) or "").splitlines()[0]
                rows.append(
                    (
                        literal(cls.__name__),
                        literal(kind),
                        plain(about),
                        literal(failure_class(cls("x"))),
                    )
                )
            yield from table(
                ("Class", "kind", "Meaning", "Class of failure"), rows, "25 20 35 20"
            )
        elif which == "rules":
            rows = [(literal(name), *_rule(rule)) for name, rule in RULES.items()]
            yield from table(
                ("Class of failure", "Reruns", "What the next attempt gets"),
                rows,
                "25 15 60",
            )
        else:
            rows = [
                (literal(f.name), "; ".join(map(literal, f.fragments)), plain(f.advice))
                for f in FAILURES
            ]
            yield from table(
                ("evidence.class", "LAMMPS says (in part)", "Next step"),
                rows,
                "20 40 40",
            )


def _rule(rule: Any) -> tuple[str, str]:
    changes = []
    if rule.longer != 1:
        changes.append(f"walltime × {rule.longer:g}")
    if rule.memory != 1:
        changes.append(f"memory × {rule.memory:g}")
    if rule.exclude:
        changes.append("the node is excluded")
    count = "no limit" if rule.attempts is None else str(rule.attempts)
    return count, plain(rule.why or ", ".join(changes) or "as it was")


def unique_footnotes(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Give the numbered references of a docstring names that no other one has."""
    del app, what, obj, options
    label = name.replace(".", "-").lower()
    for number, line in enumerate(lines):
        used = re.sub(r"\[(\d+)\]_", rf"[#{label}-\1]_", line)
        lines[number] = re.sub(r"^(\s*\.\. )\[(\d+)\]", rf"\1[#{label}-\2]", used)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    for name, directive in (
        ("nanoos-commands", Commands),
        ("nanoos-calls", Calls),
        ("nanoos-firetasks", Firetasks),
        ("nanoos-parameters", Parameters),
        ("nanoos-settings", SettingsTable),
        ("nanoos-collections", Collections),
        ("nanoos-errors", Errors),
    ):
        app.add_directive(name, directive)
    app.connect("autodoc-process-docstring", unique_footnotes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
