"""The contract of labelling firetasks, and a base class that keeps it.

A campaign whose plan names a task, ``labels: {kind: task, task: package.module.MyTask,
options: {...}}``, makes fireworks of it with the parameters

``structures``
    keys in the structure store;
``source``
    ``target``, ``unit`` and ``method``: what the label is, and the key under which it
    is stored;
``options``
    those of the plan.

The firetask must leave one document for each structure in the store
``simulations``, with that method: a finite number, or the reason why there is none. A
structure that fails must not stop the others; a firework that was killed and is run
again must do only what is missing. What the machine did (a full disk, no memory, a
child that was killed, a package that is missing) is no result of a structure: it must
fail the firework and leave nothing. :class:`LabelTask` sees to all of that.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pymongo.errors import PyMongoError

from nanoos_fw.errors import InputError, NanoOSError, OutOfTimeError, SimulationError
from nanoos_fw.faults import is_environment
from nanoos_fw.firetasks.base import NanoTask, Parameters, TaskContext
from nanoos_fw.provenance import run_environment
from nanoos_fw.stores.active import LabelSource, put_labels

if TYPE_CHECKING:
    from nanoos_fw.stores.structures import StoredStructure


class LabelKey(Parameters):
    """What a label is, in which unit, and the key under which it is stored."""

    target: str
    unit: str
    method: str


class LabelParameters(Parameters):
    """Parameters of every labelling firetask.

    Parameters
    ----------
    structures
        Keys in the structure store.
    source
        ``target``, ``unit`` and ``method``.
    options
        Of the plan.
    """

    structures: tuple[str, ...] = Field(min_length=1)
    source: LabelKey
    options: dict[str, Any] = Field(default_factory=dict)


class LabelTask(NanoTask):
    """Base of labelling firetasks: implement :meth:`label`.

    A subclass states its own dotted name::

        class HalfFilled(LabelTask):
            _fw_name = "{{mypackage.labels.HalfFilled}}"

            def label(self, key, stored, place):
                return energy_of(stored.structure)
    """

    parameters_model = LabelParameters
    parameters: LabelParameters

    @abstractmethod
    def label(self, key: str, stored: StoredStructure, place: TaskContext) -> float:
        """Return the label of a structure, in the unit of the target.

        Raise an error if there is none: it is stored with the structure, and the
        others go on. Errors of the machine (``faults.is_environment``: OSError of a
        full disk, MemoryError, a child that was killed, errors of the database) end
        the firework instead, and nothing is stored of this structure.

        Parameters
        ----------
        key
            Of the structure.
        stored
            The structure, its label and properties.
        place
            Stores, settings, work directories, the time that is left.
        """

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Label what has no label and no failure yet, and store each at once."""
        parameters = self.parameters
        source = LabelSource(**parameters.source.model_dump())
        keys = parameters.structures
        known = place.simulations.find(keys, source.method)
        failed = 0
        for key, stored in place.structures.get_many(
            [key for key in keys if key not in known]
        ).items():
            place.check_time(labelled=len(known))
            values: dict[str, float] = {}
            failures: dict[str, Mapping[str, Any]] = {}
            try:
                values[key] = _finite(self.label(key, stored, place))
            except OutOfTimeError:
                raise
            except NanoOSError as error:
                if is_environment(error):
                    raise
                failures[key] = error.to_dict()
            except Exception as error:
                if is_environment(error) or isinstance(error, PyMongoError):
                    raise
                failures[key] = SimulationError(
                    f"{type(error).__name__}: {error}"[:500],
                    evidence={"task": self._fw_name, "structure": key},
                ).to_dict()
            failed += len(failures)
            put_labels(
                place.database, source, values, failures, about=run_environment()
            )
        return {
            "structures": len(keys),
            "hit": len(known),
            "computed": len(keys) - len(known),
            "failed": failed,
        }


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise InputError(f"the label {value} is no finite number")
    return float(value)
