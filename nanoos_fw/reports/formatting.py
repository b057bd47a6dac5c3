"""Numbers, names and durations as text for people."""

from __future__ import annotations

import math
import re

from markupsafe import Markup, escape

MINUS = "\N{MINUS SIGN}"
THIN_SPACE = "\N{NARROW NO-BREAK SPACE}"
# Not to be torn apart at the end of a line.
_PLUS_MINUS = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
_KEY_LENGTH = 12


def number(value: float, decimals: int = 0) -> str:
    """Return a number with fixed decimals, a true minus and grouped thousands."""
    text = f"{abs(value):,.{decimals}f}".replace(",", THIN_SPACE)
    # A rounded zero has no sign.
    negative = value < 0 and any(c not in "0." for c in text)
    return f"{MINUS}{text}" if negative else text


def with_error(mean: float, error: float | None) -> str:
    """Return ``mean ± error``, both to two significant digits of the error."""
    if error is None:
        return f"{significant(mean, 4)} (no error bar)"
    if error == 0:
        return f"{significant(mean, 4)}{_PLUS_MINUS}0"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{number(mean, decimals)}{_PLUS_MINUS}{number(error, decimals)}"


def significant(value: float, digits: int) -> str:
    """Return a number rounded to significant digits, never in scientific notation."""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return number(round(value, decimals), max(0, decimals))


def plain(value: float) -> str:
    """Return a given value, such as a set point, without trailing zeros."""
    text = significant(value, 6)
    return text.rstrip("0").rstrip(".") if "." in text else text


def energy(value: float, uncertainty: float | None = None) -> str:
    """Return an energy in eV/atom to the meV, with its uncertainty if there is one."""
    text = number(value, 3)
    return (
        text if uncertainty is None else f"{text}{_PLUS_MINUS}{number(uncertainty, 3)}"
    )


def milli(value: float) -> str:
    """Return an energy in eV/atom as a number of meV/atom, two digits or more."""
    in_milli = value * 1000.0
    return number(in_milli, 0 if abs(in_milli) >= 10 else 1)


def percent(fraction: float) -> str:
    """Return a fraction in percent, without decimals."""
    return f"{number(100 * fraction)}{THIN_SPACE}%"


def plural(count: int, noun: str, plural_noun: str | None = None) -> str:
    """Return a count with its noun: ``1 run``, ``2 runs``."""
    word = noun if count == 1 else (plural_noun or f"{noun}s")
    return f"{number(count)} {word}"


def formula(text: str) -> Markup:
    """Return an escaped chemical formula with its numbers as subscripts."""
    return Markup(
        re.sub(r"(?<=[A-Za-z)\]])(\d+(?:\.\d+)?)", r"<sub>\1</sub>", str(escape(text)))
    )


def prototype(text: str) -> Markup:
    """Return an escaped prototype name with subscripts (``L1_2``, ``D0_{22}``)."""
    return Markup(
        re.sub(r"_(?:\{(\w+)\}|(\w+))", r"<sub>\1\2</sub>", str(escape(text)))
    )


def short_key(text: str) -> str:
    """Return the first digits of a content key or checksum."""
    return text if len(text) <= _KEY_LENGTH + 4 else f"{text[:_KEY_LENGTH]}…"


def duration(seconds: float) -> str:
    """Return a duration in the two largest fitting units."""
    if seconds < 60:
        return f"{significant(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def masked(value: object) -> str:
    """Return a setting as text, with the password of a URI masked."""
    return re.sub(r"(://[^\s/:@]*:)[^\s@]+(?=@)", r"\1•••", str(value))
