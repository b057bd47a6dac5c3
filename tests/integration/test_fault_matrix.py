"""Some quick cells of the fault matrix; ``fault_matrix.py`` runs all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_cells import Cell
from undisturbed import Reference, drop_reference, make_reference

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.mongodb,
    pytest.mark.mpi,
    pytest.mark.lammps,
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    made = make_reference(uri, tmp_path_factory.mktemp("matrix") / "reference")
    yield made
    drop_reference(made)


@pytest.mark.parametrize(
    ("fault", "stage"),
    [("rank", "label"), ("node", "featurize"), ("database-during", "screen")],
)
def test_results_are_complete_and_single_after_a_fault(
    fault: str, stage: str, reference: Reference, tmp_path: Path
) -> None:
    result = Cell(reference, tmp_path / "cell", fault, stage, outage_s=5.0).run()

    assert not result.problems, (result.problems, result.said)
    assert result.found == result.expected > 0
    assert result.double == 0
    # An outage is waited for; whatever kills a job is mended by a second one.
    assert result.launches == (1 if fault.startswith("database") else 2)
