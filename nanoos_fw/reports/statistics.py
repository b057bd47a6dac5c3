"""Numbers that the report derives from its data: coverage, discovery, agreement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.reports.data import Discovery, Evaluation, Ranking

# Two-sided normal probabilities of one and two standard deviations.
WITHIN_ONE_SIGMA = 0.6827
WITHIN_TWO_SIGMA = 0.9545


@dataclass(frozen=True)
class Coverage:
    """How often the truth lies within a stated interval.

    Parameters
    ----------
    observed, expected
        Fractions between 0 and 1.
    standard_error
        Binomial standard error of ``observed`` if ``expected`` were true.
    """

    observed: float
    expected: float
    standard_error: float

    @property
    def verdict(self) -> str:
        """Return "compatible", "too small" or "too large" at two standard errors."""
        if abs(self.observed - self.expected) <= 2 * self.standard_error:
            return "compatible"
        return "too small" if self.observed < self.expected else "too large"


def coverage(
    errors: NDArray[np.float64], half_widths: NDArray[np.float64], expected: float
) -> Coverage:
    """Return the fraction of errors within their half widths.

    Parameters
    ----------
    errors, half_widths
        ``(n,)`` in one unit.
    expected
        Stated coverage.
    """
    n = len(errors)
    return Coverage(
        observed=float(np.mean(np.abs(errors) <= half_widths)),
        expected=expected,
        standard_error=float(np.sqrt(expected * (1 - expected) / n)),
    )


def sigma_coverages(part: Evaluation) -> tuple[Coverage, Coverage] | None:
    """Return the coverage of one and two standard deviations, if there are any."""
    if part.uncertainties is None:
        return None
    errors = np.subtract(part.predictions, part.targets)
    sigma = np.asarray(part.uncertainties)
    return (
        coverage(errors, sigma, WITHIN_ONE_SIGMA),
        coverage(errors, 2 * sigma, WITHIN_TWO_SIGMA),
    )


@dataclass(frozen=True)
class DiscoveryResult:
    """How well the ranking finds the truly best candidates.

    Parameters
    ----------
    n, k
        Candidates computed; best ones to find.
    ranks
        ``(k,)`` predicted ranks, from 1 and rising, of the truly best k.
    """

    n: int
    k: int
    ranks: tuple[int, ...]

    @property
    def found(self) -> int:
        """Number of the truly best k within the first k predicted ranks."""
        return sum(rank <= self.k for rank in self.ranks)

    @property
    def precision(self) -> float:
        """Precision at k, equal to recall at k since both lists hold k names."""
        return self.found / self.k

    @property
    def random_precision(self) -> float:
        """Precision at k expected of a random order: k/n."""
        return self.k / self.n


def discovery_result(part: Discovery) -> DiscoveryResult:
    """Return where the truly best k candidates stand in the predicted order.

    Notes
    -----
    Equal computed energies keep their predicted order, so that a tie at the bound
    counts for the model; energies from relaxations do not tie except for duplicates.
    """
    energies = np.asarray(part.energies_in_predicted_order)
    best = np.argsort(energies, kind="stable")[: part.k]
    ranks = tuple(int(rank) + 1 for rank in np.sort(best))
    return DiscoveryResult(n=len(energies), k=part.k, ranks=ranks)


@dataclass(frozen=True)
class Agreement:
    """Prediction against LAMMPS on the relaxed top of the ranking.

    Parameters
    ----------
    n
        Number of candidates with both values.
    mean_absolute, mean_signed
        Of prediction minus LAMMPS, eV/atom.
    largest, largest_formula
        Signed difference of largest size, eV/atom, and whose it is.
    """

    n: int
    mean_absolute: float
    mean_signed: float
    largest: float
    largest_formula: str


def agreement(part: Ranking) -> Agreement | None:
    """Return the agreement, or None if no candidate has a LAMMPS value."""
    differences = [
        (row.predicted - row.lammps, row.formula)
        for row in part.candidates
        if isinstance(row.lammps, float)
    ]
    if not differences:
        return None
    values = np.array([value for value, _ in differences])
    largest, owner = max(differences, key=lambda item: abs(item[0]))
    return Agreement(
        n=len(values),
        mean_absolute=float(np.mean(np.abs(values))),
        mean_signed=float(np.mean(values)),
        largest=largest,
        largest_formula=owner,
    )
