"""Sequences of candidates that are generated, not stored: any window, at any time.

A small specification stands for up to 2^53 crystals in a fixed order. A worker takes
the window ``[start, stop)`` of it as flat arrays, without an object per crystal, and a
candidate that was found interesting is made again from its number. Four kinds:

* ``supercells``: a prototype's cell repeated, each site decorated on its own;
* ``substitution``: elements of other candidates replaced in all ways;
* ``strain``: each of other candidates in several states of strain;
* ``pack``: crystals from files or the store, see :mod:`nanoos_fw.ml.candidate_packs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nanoos_fw.errors import InputError
from nanoos_fw.ml.graphs import CrystalArrays
from nanoos_fw.provenance import content_key

if TYPE_CHECKING:
    from pymatgen.core import Structure


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SupercellSpec(_Spec):
    """Ordered decorations of a repeated prototype cell.

    Parameters
    ----------
    prototype
        Name in :data:`nanoos_fw.prototypes.PROTOTYPES`.
    repeat
        Along the vectors of the primitive cell.
    elements
        For each role of the prototype, the symbols its sites may hold.
    volume_per_atom
        Å³/atom by symbol; of elements that are left out, that of the experimental
        ground state. The cell has the mean over its sites (Zen's rule).
    together
        Give all sites of a role one element: the prototype itself, decorated.
    count
        Only this many of all decorations.
    seed
        Of the order. None keeps the order of counting, in which neighbours resemble
        each other.
    unique
        Of decorations that a symmetry of the undecorated cell turns into each other,
        keep the first in the order of counting. With ``count`` that one may be beyond
        the end of the sequence, which then holds none of them.
    """

    kind: Literal["supercells"] = "supercells"
    prototype: str
    repeat: tuple[int, int, int] = (1, 1, 1)
    elements: tuple[tuple[str, ...], ...] = Field(min_length=1)
    volume_per_atom: dict[str, Annotated[float, Field(gt=0)]] = {}
    together: bool = False
    count: int | None = Field(default=None, ge=1, le=2**53)
    seed: int | None = Field(default=0, ge=0)
    unique: bool = False


class SubstitutionSpec(_Spec):
    """All ways to replace elements of other candidates.

    Parameters
    ----------
    source
        Of the crystals.
    replace
        For each symbol, the symbols to put in its place; all sites of an element
        change together. It may be among them, for crystals that keep it.
    volume_per_atom
        As in :class:`SupercellSpec`: the volume changes as the mean of these does.
        None keeps cells as they are.
    """

    kind: Literal["substitution"] = "substitution"
    source: CandidateSpec
    replace: dict[str, tuple[str, ...]] = Field(min_length=1)
    volume_per_atom: dict[str, Annotated[float, Field(gt=0)]] | None = None


class StrainSpec(_Spec):
    """Other candidates, each in several states of strain.

    Parameters
    ----------
    source
        Of the crystals.
    strains
        Components xx, yy, zz, yz, xz, xy of the symmetric strain tensor (not the
        engineering shear): each lattice vector a becomes (1 + strain) a.
    """

    kind: Literal["strain"] = "strain"
    source: CandidateSpec
    strains: tuple[tuple[float, float, float, float, float, float], ...] = Field(
        min_length=1
    )


class PackSpec(_Spec):
    """Crystals from files or the store.

    Parameters
    ----------
    directory
        A folder of :func:`nanoos_fw.ml.candidate_packs.write_pack`.
    key
        Its content key, which is compared when it is opened.
    """

    kind: Literal["pack"] = "pack"
    directory: str
    key: str


CandidateSpec = Annotated[
    SupercellSpec | SubstitutionSpec | StrainSpec | PackSpec,
    Field(discriminator="kind"),
]
SubstitutionSpec.model_rebuild()
StrainSpec.model_rebuild()
_ADAPTER: TypeAdapter[Any] = TypeAdapter(CandidateSpec)


class CandidateSource(ABC):
    """A sequence of crystals of which any window can be made."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of candidates, those that are left out included."""

    @abstractmethod
    def window(self, start: int, stop: int) -> CrystalArrays:
        """Return candidates ``start`` to ``stop`` - 1.

        ``positions`` count from ``start``; candidates that equal another of the
        sequence, or could not be read, are missing from them.
        """

    def key(self) -> str:
        """Return the key of the sequence: equal keys, equal candidates."""
        return content_key("candidates", self.identity())

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Return what decides the sequence."""

    @abstractmethod
    def elements(self) -> set[str]:
        """Return the symbols that candidates may hold."""

    def unreadable(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Tell which candidates of a window are missing since they could not be read.

        ``(stop - start,)``; the others that are missing equal one of the sequence.
        """
        return np.zeros(stop - start, dtype=bool)

    def label(self, index: int) -> str | None:
        """Return the name that a candidate has in its file or store, if any."""
        return None

    def failure(self, index: int) -> str | None:
        """Return why a candidate could not be read."""
        return None

    def structure(self, index: int) -> Structure:
        """Return one candidate as an object.

        Raises
        ------
        InputError
            If there is none with this number, or it was left out.
        """
        from pymatgen.core import Element, Lattice, Structure

        if not 0 <= index < len(self):
            raise InputError(f"candidate {index} is not among the {len(self)}")
        flat = self.window(index, index + 1)
        if not len(flat.positions):
            raise InputError(
                f"candidate {index} was left out of its sequence",
                evidence={"failure": self.failure(index)},
            )
        return Structure(
            Lattice(flat.lattices[0]),
            [Element.from_Z(int(z)) for z in flat.numbers],
            flat.frac_coords,
        )


def read_spec(value: Mapping[str, Any]) -> Any:
    """Return a checked specification of candidates.

    Raises
    ------
    InputError
        If it is none.
    """
    try:
        return _ADAPTER.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"candidates: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            advice="kinds: supercells, substitution, strain, pack",
        ) from error


def open_candidates(spec: Any) -> CandidateSource:
    """Return the sequence that a specification, or its dictionary, stands for.

    Raises
    ------
    InputError
        If the specification names what is not known, or means no candidates or more
        than 2^53.
    """
    if isinstance(spec, Mapping):
        spec = read_spec(spec)
    if not isinstance(spec, PackSpec):
        from nanoos_fw.ml.candidate_generators import open_generated

        return open_generated(spec)
    from nanoos_fw.ml.candidate_packs import open_pack

    return open_pack(Path(spec.directory), spec.key)


def take_rows(flat: CrystalArrays, rows: NDArray[np.int64]) -> CrystalArrays:
    """Return some crystals of flat arrays, in the order of ``rows``, repeats allowed.

    ``positions`` are those of the rows.
    """
    sizes = np.diff(flat.atom_start)[rows]
    starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(sizes, out=starts[1:])
    atoms = np.arange(starts[-1]) - np.repeat(
        starts[:-1] - flat.atom_start[rows], sizes
    )
    return CrystalArrays(
        numbers=flat.numbers[atoms],
        lattices=flat.lattices[rows],
        frac_coords=flat.frac_coords[atoms],
        atom_start=starts,
        positions=flat.positions[rows],
    )
