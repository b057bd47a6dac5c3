"""Firetask that relaxes structures, and the choice of a potential."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from nanoos_fw.errors import InputError, SimulationError
from nanoos_fw.firetasks.base import NanoTask, Parameters, TaskContext
from nanoos_fw.md.catalogue import Catalogue
from nanoos_fw.md.cells import site_charges
from nanoos_fw.md.potential_checks import check_files, check_styles
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.relaxation import (
    RelaxationResult,
    RelaxationSettings,
    relax_structures,
)
from nanoos_fw.parallel import locked
from nanoos_fw.provenance import content_key, run_environment
from nanoos_fw.stores.simulations import Simulation, method_key
from nanoos_fw.stores.structures import StoredStructure

_NAMED = 5  # structures in an error


class PotentialChoice(Parameters):
    """A potential by name or style, with the elements it must know.

    Parameters
    ----------
    name
        See `nanoos_fw.md.catalogue`: ``zhou2004``, ``tersoff``, ``SiC.tersoff``; or
        commands, as `nanoos_fw.md.pair_commands.PotentialCommands` has them.
    elements
        All elements of the structures.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)] | dict[str, Any]
    elements: tuple[str, ...] = Field(min_length=1)

    def resolve(self, place: TaskContext) -> Potential:
        """Return the potential; a generated file is in the campaign's work root."""
        directory = place.work_dir("potentials", content_key("potential", self.name))
        return Catalogue().resolve(self.name, self.elements, directory)

    def check(self, structures: Iterable[StoredStructure] = ()) -> Potential:
        """Return the potential; refuse what could not be used.

        It is for looking at before anything is queued: a generated file is gone.

        Parameters
        ----------
        structures
            That will be computed; read only if the potential needs their charges.

        Raises
        ------
        InputError
            If there is no such potential, it lacks an element, or a structure lacks
            the charges that it needs.
        MissingDependencyError
            If the installed LAMMPS lacks a style.
        """
        potential = _checked(json.dumps(self.name), self.elements)
        if potential.charges != "given":
            return potential
        lacking = [s.label for s in structures if site_charges(s.structure) is None]
        if lacking:
            raise InputError(
                f"the potential needs charges, and {len(lacking)} structures have "
                f"none, such as {lacking[0]!r}",
                evidence={"class": "charges", "structures": lacking[:_NAMED]},
                advice="import them with the site property 'charge'",
            )
        return potential


@lru_cache(maxsize=64)  # many workflows of one campaign ask for the same
def _checked(name: str, elements: tuple[str, ...]) -> Potential:
    with tempfile.TemporaryDirectory() as folder:
        potential = Catalogue().resolve(json.loads(name), elements, Path(folder))
        check_styles(potential)
        check_files(potential)
        return potential


class RelaxationMethod(Parameters):
    """How a structure is relaxed: what decides its energy."""

    potential: PotentialChoice
    settings: RelaxationSettings = RelaxationSettings()

    def key(self, potential: Potential) -> str:
        """Return the key under which results of this method are stored."""
        return method_key(
            "relaxation",
            {
                "potential": potential.identity,
                "settings": self.settings.model_dump(mode="json"),
            },
        )


class RelaxStructuresParameters(Parameters):
    """Parameters of RelaxStructuresTask: structures, or ranks of a campaign."""

    method: RelaxationMethod
    structures: tuple[str, ...] = ()
    campaign: str | None = None
    first_rank: int | None = Field(default=None, ge=1)
    last_rank: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_choice(self) -> RelaxStructuresParameters:
        ranks = (self.campaign, self.first_rank, self.last_rank)
        if bool(self.structures) == all(value is not None for value in ranks):
            raise ValueError("give either structures, or campaign and both ranks")
        return self


class RelaxStructuresTask(NanoTask):
    """Relax cell and positions of several structures in one LAMMPS child.

    A structure that fails is stored as failed with the reason and does not stop the
    others; results that are there are not computed again.
    """

    _fw_name = "{{nanoos_fw.firetasks.RelaxStructuresTask}}"
    parameters_model = RelaxStructuresParameters
    parameters: RelaxStructuresParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Relax what has no result yet."""
        keys = self._keys(place)
        potential = self.parameters.method.potential.resolve(place)
        method = self.parameters.method.key(potential)
        known = place.simulations.find(keys, method)
        missing = [key for key in keys if key not in known]
        if missing:
            self._relax(place, potential, method, keys, missing)
        found = place.simulations.find(keys, method)
        return {
            "method": method,
            "structures": len(keys),
            "hit": len(known),
            "computed": len(missing),
            "failed": sum(s.status == "failed" for s in found.values()),
        }

    def _keys(self, place: TaskContext) -> tuple[str, ...]:
        parameters = self.parameters
        if parameters.campaign is None:
            return parameters.structures
        ranking = place.campaigns.output(parameters.campaign, "ranking")
        return tuple(ranking[(parameters.first_rank or 1) - 1 : parameters.last_rank])

    def _relax(
        self,
        place: TaskContext,
        potential: Potential,
        method: str,
        keys: tuple[str, ...],
        missing: list[str],
    ) -> None:
        # Named by all keys, not by the missing ones: a rerun finds its results.
        work_dir = place.work_dir(
            "relaxation", content_key("relaxations", [method, sorted(keys)])
        )
        stored = place.structures.get_many(missing)
        with locked(work_dir):
            results = relax_structures(
                {key: stored[key].structure for key in missing},
                potential,
                work_dir,
                settings=self.parameters.method.settings,
                resources=place.resources,
                deadline=place.deadline,
            )
        environment = run_environment()
        place.simulations.put_many(
            _simulation(key, method, result, environment, str(work_dir))
            for key, result in results.items()
        )


def _simulation(
    key: str,
    method: str,
    result: RelaxationResult,
    environment: dict[str, Any],
    work_dir: str,
) -> Simulation:
    error = None
    if result.error is not None:
        error = SimulationError(
            result.error,
            evidence={"class": result.error_class, "n_steps": result.n_steps},
            advice="look at the structure; it is left out of the dataset",
        ).to_dict()
    return Simulation(
        structure=key,
        method=method,
        kind="relaxation",
        status="done" if error is None else "failed",
        result=result.to_dict(),
        error=error,
        files={"work_dir": work_dir},
        environment=environment,
    )
