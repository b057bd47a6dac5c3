"""Interatomic potentials as recipes: styles, files, elements, units, charges, citation.

A pair file alone is not a simulation: LAMMPS must be told its unit system and atom
style, some potentials need a second one laid over them or a fix that equilibrates
charges, the files must belong to the elements, and the order of the elements must be
that of the atom types. A `Potential` carries all of it, and writes ``pair_coeff``
from the same element list that numbers the types.

Recipes are made by `nanoos_fw.md.recipes` from files and from commands of the user,
and found by name or elements in `nanoos_fw.md.catalogue`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from nanoos_fw.errors import CorruptArtifactError, InputError, MissingDependencyError
from nanoos_fw.md import zhou2004
from nanoos_fw.md.potential_files import setfl_subset
from nanoos_fw.md.potential_terms import (
    OVERLAY,
    PLAIN_WORD,
    PairCoefficient,
    PairTerm,
    PotentialFile,
    PotentialFix,
    Word,
    atomic_mass,
    check_element,
    check_safe_name,
    coefficient_commands,
    word_text,
)
from nanoos_fw.md.unit_systems import Units
from nanoos_fw.provenance import (
    content_key,
    sha256_bytes,
    sha256_file,
    write_atomic,
)

_METAL_TIMESTEP_FS = 2.0
_LIGHTEST_LITHIUM_U, _LIGHTEST_HEAVY_U = 6.0, 22.0
ZHOU2004_ELEMENTS: tuple[str, ...] = zhou2004.elements()


class Potential(BaseModel):
    """A recipe for LAMMPS: all that a simulation needs to know of a potential.

    Parameters
    ----------
    name
        For people and tables, such as ``"zhou2004"``.
    terms
        Pair styles. Several are added up by ``hybrid/overlay``.
    files
        Parameter files, with their SHA-256.
    elements
        Elements the potential knows.
    units, atom_style
        LAMMPS unit system and atom style that the potential asks for.
    charges
        ``none``: it knows of no charges. ``given``: the structure must carry them.
        ``equilibrated``: a fix computes them; those of a structure are a first guess.
    fixes
        Fixes without which the potential is not what it is.
    newton
        LAMMPS' newton flag of pair forces.
    citation
        Paper behind the numbers.
    timestep_fs
        Default timestep, safe at the melting point of its lightest element.
    cutoff_a
        Largest interaction distance in Å, if the files tell.
    generated_from
        SHA-256 of what a generated file was made from; it stands for the file in
        `identity`, since the last digit of ``exp`` differs between processors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[2] = 2
    name: str = Field(min_length=1, max_length=200)
    terms: tuple[PairTerm, ...] = Field(min_length=1)
    files: tuple[PotentialFile, ...] = ()
    elements: tuple[str, ...] = Field(min_length=1)
    units: Units = "metal"
    atom_style: Literal["atomic", "charge"] = "atomic"
    charges: Literal["none", "given", "equilibrated"] = "none"
    fixes: tuple[PotentialFix, ...] = ()
    newton: Literal["on", "off"] = "on"
    citation: str = ""
    timestep_fs: float = Field(gt=0.0)
    cutoff_a: float | None = Field(default=None, gt=0.0)
    generated_from: str | None = None

    # It stands in a comment of the script.
    _name = field_validator("name")(check_safe_name)

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("schema_version") == 1:
            return _from_version_1(data)
        return data

    @model_validator(mode="after")
    def _check(self) -> Potential:
        for element in self.elements:
            check_element(element)
        if len(set(self.elements)) != len(self.elements):
            raise InputError(
                f"potential {self.name!r} names an element twice: {self.elements}"
            )
        if (self.charges == "none") != (self.atom_style == "atomic"):
            raise InputError(
                f"potential {self.name!r} has charges {self.charges!r} and atom style "
                f"{self.atom_style!r}, which do not go together"
            )
        self._check_files()
        return self

    def _check_files(self) -> None:
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise InputError(f"potential {self.name!r} has two files of one name")
        words: list[Word] = []
        for term in self.terms:
            words += term.arguments
            for coefficient in term.coefficients:
                words += coefficient.words
        for fix in self.fixes:
            words += fix.arguments
        texts = {word for word in words if isinstance(word, str)}
        if unused := sorted(set(names) - texts):
            raise InputError(
                f"potential {self.name!r} does not use its file {unused[0]}"
            )
        # LAMMPS would open whatever stands where it expects a file.
        for text in sorted(texts - set(names)):
            if not PLAIN_WORD.match(text):
                raise InputError(
                    f"potential {self.name!r} speaks of {text!r}, which is none of its "
                    f"files",
                    evidence={"files": names},
                )

    @property
    def pair_style(self) -> str:
        """The pair style that stands in the script."""
        return self.terms[0].style if len(self.terms) == 1 else OVERLAY

    @property
    def pair_styles(self) -> tuple[str, ...]:
        """All pair styles that LAMMPS must have been built with."""
        styles = dict.fromkeys(term.style for term in self.terms)
        return (*styles, OVERLAY) if len(self.terms) > 1 else tuple(styles)

    @property
    def identity(self) -> str:
        """The content key of the physics: equal for equal interactions."""
        digests = {file.name: file.sha256 for file in self.files}
        if self.generated_from:
            digests = dict.fromkeys(digests, self.generated_from)

        def named(words: Sequence[Word]) -> list[Word]:
            # By content: the name of a file does not matter.
            return [digests.get(w, w) if isinstance(w, str) else w for w in words]

        return content_key(
            "potential",
            {
                "terms": [
                    {
                        "style": term.style,
                        "arguments": named(term.arguments),
                        "coefficients": [
                            {
                                "between": c.between,
                                "words": named(c.words),
                                # A generated file may hold more elements or fewer.
                                "labels": None if self.generated_from else c.labels,
                            }
                            for c in term.coefficients
                        ],
                    }
                    for term in self.terms
                ],
                "fixes": [
                    {"style": fix.style, "arguments": named(fix.arguments)}
                    for fix in self.fixes
                ],
                "units": self.units,
                "charges": self.charges,
            },
        )

    def check_elements(self, elements: Sequence[str]) -> None:
        """Refuse elements that the potential does not know.

        Raises
        ------
        InputError
            Naming the element, the file and the elements it has.
        """
        missing = sorted(set(elements) - set(self.elements))
        if missing:
            source = self.files[0].name if self.files else self.name
            raise InputError(
                f"potential {self.name!r} ({source}) has no parameters for "
                f"{', '.join(missing)}",
                evidence={"missing": missing, "elements": list(self.elements)},
                advice=f"it has {', '.join(self.elements)}; choose another potential",
            )

    def system_commands(self) -> list[str]:
        """Return the LAMMPS commands that come before the atoms."""
        return [
            f"units {self.units}",
            f"atom_style {self.atom_style}",
            f"newton {self.newton}",
        ]

    def pair_commands(
        self, elements: Sequence[str], *, with_fixes: bool = True
    ) -> list[str]:
        """Return the LAMMPS commands that set the interaction.

        Parameters
        ----------
        elements
            The element of each atom type, in the order of the types.
        with_fixes
            Whether to end with `fix_commands`, which need the atoms.

        Returns
        -------
        list of str
            ``pair_style``, ``pair_coeff`` and the fixes of the potential; they come
            after the box.

        Raises
        ------
        InputError
            If the potential does not know an element, or one occurs twice.
        """
        self.check_elements(elements)
        if len(set(elements)) != len(elements):
            raise InputError(f"atom types must differ, not {list(elements)}")
        several = len(self.terms) > 1
        style = ["pair_style"] + ([OVERLAY] if several else [])
        for term in self.terms:
            style += [term.style, *map(word_text, term.arguments)]
        commands = [" ".join(style)]
        counts = {t.style: 0 for t in self.terms}
        for term in self.terms:
            prefix = []
            if several:
                counts[term.style] += 1
                same = sum(t.style == term.style for t in self.terms)
                # LAMMPS numbers pair styles of one name, and only those.
                prefix = [term.style] + ([str(counts[term.style])] * (same > 1))
            for coefficient in term.coefficients:
                commands += coefficient_commands(coefficient, prefix, elements)
        return commands + (self.fix_commands() if with_fixes else [])

    def fix_commands(self) -> list[str]:
        """Return the commands of the fixes, ``fix potential1 all ...`` and on."""
        return [
            " ".join(
                [
                    f"fix potential{number} all {fix.style}",
                    *map(word_text, fix.arguments),
                ]
            )
            for number, fix in enumerate(self.fixes, start=1)
        ]

    def restricted_to(self, elements: Sequence[str], directory: Path) -> Potential:
        """Return the same physics for fewer elements, with a smaller file if possible.

        LAMMPS makes splines of all tables of an ``eam/alloy`` file at the start of
        every run, needed or not: with 16 elements that takes 25 ms, which is long
        beside the energy of a small cell. Other styles return themselves.

        Parameters
        ----------
        elements
            The elements to keep.
        directory
            Where the smaller file goes.
        """
        self.check_elements(elements)
        names = tuple(element for element in self.elements if element in set(elements))
        if self.pair_style != "eam/alloy" or names == self.elements:
            return self
        source = self.files[0]
        text = setfl_subset(source.path.read_text(encoding="utf-8"), names).encode()
        path = directory / f"subset_{source.name}"
        write_atomic(path, text)
        file = PotentialFile(
            name=path.name, path=path.absolute(), sha256=sha256_bytes(text)
        )
        update = {"terms": (setfl_term("eam/alloy", path.name, names),)}
        return self.model_copy(update={**update, "files": (file,), "elements": names})

    def relocated(self, directory: Path) -> Potential:
        """Return the same recipe with its files in another folder; see `install`."""
        files = tuple(
            file.model_copy(update={"path": (directory / file.name).absolute()})
            for file in self.files
        )
        return self.model_copy(update={"files": files})

    def install(self, work_dir: Path) -> None:
        """Copy the files into a work directory, under their safe names.

        Raises
        ------
        MissingDependencyError
            If a file is no longer there.
        CorruptArtifactError
            If a file is not the one the recipe was made from.
        """
        for file in self.files:
            target = work_dir / file.name
            if target.exists() and sha256_file(target) == file.sha256:
                continue
            try:
                data = file.path.read_bytes()
            except OSError as error:
                raise MissingDependencyError(
                    f"potential file {file.path} cannot be read: {error.strerror}",
                    advice="make the potential again from its name",
                ) from error
            if sha256_bytes(data) != file.sha256:
                raise CorruptArtifactError(
                    f"potential file {file.path} has changed",
                    evidence={"expected": file.sha256, "found": sha256_bytes(data)},
                    advice="restore the file, or make the potential again",
                )
            write_atomic(target, data)


def zhou2004_potential(elements: Sequence[str], directory: Path) -> Potential:
    """Write the 16-metal EAM for some of its elements and return the recipe.

    Parameters
    ----------
    elements
        Any of the 16 metals; the file lists them in the order of the paper's table.
    directory
        Where the ``eam/alloy`` file goes. An equal file already there is kept.

    Raises
    ------
    InputError
        If an element is not one of the 16.

    References
    ----------
    X. W. Zhou, R. A. Johnson, H. N. G. Wadley, Phys. Rev. B 69, 144113 (2004).
    """
    known = zhou2004.elements()
    for element in elements:
        zhou2004.ground_state(element)  # names the elements there are
    names = [element for element in known if element in set(elements)]
    text = zhou2004.setfl_text(names).encode()
    which = "all" if len(names) == len(known) else "".join(sorted(names))
    name = f"zhou2004_{which}.eam.alloy"
    path = directory / name
    digest = sha256_bytes(text)
    if not path.exists() or sha256_file(path) != digest:
        write_atomic(path, text)
    return Potential(
        name="zhou2004",
        terms=(setfl_term("eam/alloy", name, names),),
        files=(PotentialFile(name=name, path=path.absolute(), sha256=digest),),
        elements=tuple(names),
        citation=zhou2004.CITATION,
        timestep_fs=_METAL_TIMESTEP_FS,
        cutoff_a=zhou2004.cutoff_a(),
        # The elements of the file do not matter to the energies: see cutoff_a().
        generated_from=sha256_bytes(zhou2004.recipe_text().encode()),
    )


def lennard_jones_potential(
    parameters: Mapping[str, tuple[float, float]],
    *,
    cutoff_a: float,
    timestep_fs: float = 2.0,
    citation: str = "",
    name: str = "lennard-jones",
) -> Potential:
    """Make a ``lj/cut`` recipe from the parameters of the elements.

    Parameters
    ----------
    parameters
        Well depth in eV and diameter in Å of each element. Unlike pairs follow
        Lorentz and Berthelot: mean diameter, geometric mean of the depths.
    cutoff_a
        Cutoff in Å; energies are cut there, not shifted.
    timestep_fs, citation, name
        See `Potential`.
    """
    for element in parameters:
        check_element(element)
    pairs = []
    for (a, (ea, sa)), (b, (eb, sb)) in itertools.combinations_with_replacement(
        sorted(parameters.items()), 2
    ):
        if min(ea, eb) < 0.0 or min(sa, sb) <= 0.0:
            raise InputError(
                "well depths must not be negative and diameters be positive: "
                f"{dict(parameters)}"
            )
        depth = ea if a == b else (ea * eb) ** 0.5
        words = (float(depth), 0.5 * (sa + sb))
        pairs.append(PairCoefficient(between=(a, b), words=words))
    return Potential(
        name=name,
        terms=(
            PairTerm(
                style="lj/cut", arguments=(float(cutoff_a),), coefficients=tuple(pairs)
            ),
        ),
        elements=tuple(sorted(parameters)),
        citation=citation,
        timestep_fs=timestep_fs,
        cutoff_a=cutoff_a,
    )


def setfl_term(style: str, file_name: str, elements: Sequence[str]) -> PairTerm:
    """Return the pair style of one file that names the elements it knows."""
    labels = {element: element for element in elements}
    coefficient = PairCoefficient(words=(file_name,), labels=labels)
    return PairTerm(style=style, coefficients=(coefficient,))


def qeq_reaxff(taper_a: tuple[float, float]) -> PotentialFix:
    """Return the charge equilibration of ReaxFF, at every step.

    Parameters
    ----------
    taper_a
        Lower and upper taper radius of the file in Å. The tolerance is that of the
        examples of LAMMPS, 1e-6.
    """
    arguments = (1, *taper_a, 1e-6, "reaxff")
    return PotentialFix(style="qeq/reaxff", arguments=arguments)


def safe_timestep_fs(elements: Sequence[str], *, reactive: bool = False) -> float:
    """Return a timestep in fs that resolves the fastest vibration of some elements.

    Parameters
    ----------
    elements
        All elements of a potential.
    reactive
        Whether bonds form and charges are equilibrated at every step, which asks for
        shorter steps.

    Notes
    -----
    About a twentieth of the period: 9 fs for H-H and O-H, 15 to 20 fs for bonds
    between C, N and O, above 60 fs for heavier metals. ReaxFF is usually run at
    0.25 fs.
    """
    lightest = min(atomic_mass(element) for element in elements)
    if reactive:
        return 0.25
    if lightest < _LIGHTEST_HEAVY_U:
        return 0.5 if lightest < _LIGHTEST_LITHIUM_U else 1.0
    return _METAL_TIMESTEP_FS


# ------------------------------------------------------------------------- private


def _from_version_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that an earlier version stored, in the form of this one."""
    new = {k: v for k, v in data.items() if k not in ("pair_style", "pairs")}
    new["schema_version"] = 2
    style = data["pair_style"]
    if data.get("pairs"):
        coefficients: list[dict[str, Any]] = [
            {
                "between": (pair["first"], pair["second"]),
                "words": (pair["epsilon_ev"], pair["sigma_a"]),
            }
            for pair in data["pairs"]
        ]
        arguments = [data["cutoff_a"]]
    else:
        labels = {element: element for element in data["elements"]}
        coefficients = [{"words": (data["files"][0]["name"],), "labels": labels}]
        arguments = []
    new["terms"] = [
        {"style": style, "arguments": arguments, "coefficients": coefficients}
    ]
    return new
