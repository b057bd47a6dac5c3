"""What a trajectory says: averages with honest errors, structure, diffusion."""

from __future__ import annotations

from nanoos_fw.md.rdf import (
    RadialDistribution,
    radial_distribution,
    radial_distributions,
)
from nanoos_fw.md.statistics import (
    block_average,
    detect_equilibration,
    statistical_inefficiency,
)
from nanoos_fw.md.transport import mean_squared_displacement

__all__ = [
    "RadialDistribution",
    "block_average",
    "detect_equilibration",
    "mean_squared_displacement",
    "radial_distribution",
    "radial_distributions",
    "statistical_inefficiency",
]
