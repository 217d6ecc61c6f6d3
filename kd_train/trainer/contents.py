"""Elements and compositions of a split, read once before a run begins."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_train.loader.split import Split
from pipeline.datasets.label_statistics import free_directions
from pipeline.errors import SpecError
from pipeline.fields import FIELDS
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.models.elements import list_symbols
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer

log = logging.getLogger("kd_train")
# Singular values of compositions, relative to the largest, that are zero.
_ROUNDING = 1e-9
_NAMED = 3

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass
class Contents:
    """Elements, periodicity and compositions of a split.

    ``samples`` has by atomic number the ids of the first samples with that element,
    ``periodic`` is the id of the first periodic one, ``span`` (k, 119) spans the
    compositions of the samples with an energy.
    """

    samples: dict[int, list[str]] = field(default_factory=dict)
    periodic: str | None = None
    span: Floats = field(default_factory=lambda: np.zeros((0, NUM_REFERENCES)))

    @property
    def elements(self) -> list[int]:
        """Atomic numbers, ascending."""
        return sorted(self.samples)

    def undetermined(self) -> list[dict[str, float]]:
        """Return changes of element energies that change no composition's energy."""
        present = np.flatnonzero(np.abs(self.span).max(axis=0, initial=0))
        if not len(present):
            return []
        free = free_directions(self.span[:, present], _ROUNDING)
        return [
            {
                str(z): round(float(part), 12)
                for z, part in zip(present, row, strict=True)
            }
            for row in free
        ]


def check_contents(
    train: Split,
    others: Sequence[tuple[str, Split]],
    rule: NeighborSpec,
    normalizer: Normalizer,
    fitted: Split | None,
) -> dict[str, Any]:
    """Check the splits; return the facts that later uses of the student need.

    ``elements`` of the training split and ``undetermined`` (see Contents) of the one
    that reference energies were ``fitted`` to. Warns of elements that only the
    ``others`` have, by the key of the configuration that names each, and of those that
    the ``normalizer`` has no reference energy for.

    Raises
    ------
    SpecError
        A structure is periodic, and the student's ``rule`` ignores images.
    """
    known = read_contents(train)
    _require_periodic_graphs("train_split", train, known, rule)
    _warn_without_reference(train, known, normalizer)
    for key, split in others:
        found = read_contents(split)
        _require_periodic_graphs(key, split, found, rule)
        _warn_of_new_elements(key, split, found, known)
    undetermined: list[dict[str, float]] = []
    if fitted is not None:
        part = known if fitted is train else read_contents(fitted)
        undetermined = part.undetermined()
    return {"elements": known.elements, "undetermined": undetermined}


def read_contents(split: Split) -> Contents:
    """Read atomic numbers, periodic flags and energies of ``split`` in one pass."""
    found = Contents()
    for ids, numbers, periodic, labelled in _blocks(split):
        for z in np.flatnonzero(numbers.any(axis=0)).tolist():
            known = found.samples.setdefault(z, [])
            if len(known) < _NAMED:
                known += ids[np.flatnonzero(numbers[:, z])[:_NAMED]].tolist()
                del known[_NAMED:]
        if found.periodic is None and periodic.any():
            found.periodic = str(ids[int(np.argmax(periodic))])
        found.span = _extend_span(found.span, numbers[labelled])
    return found


def _blocks(
    split: Split,
) -> Iterator[tuple[npt.NDArray[Any], Counts, npt.NDArray[Any], npt.NDArray[Any]]]:
    """Yield ids, (n, 119) counts of elements, periodic flags and energy flags."""
    paths = [FIELDS[name].path for name in ("atomic_numbers", "pbc", "energy")]
    for block in range(split.n_blocks):
        positions = np.asarray(split.block_positions(block))
        if not len(positions):
            continue
        values = split.read(positions, paths)
        numbers, pbc, energy = (values[path] for path in paths)
        sample = np.repeat(np.arange(len(positions)), split.n_atoms[positions])
        cells = sample * NUM_REFERENCES + numbers.astype(np.int64)
        counts = np.bincount(cells, minlength=len(positions) * NUM_REFERENCES)
        yield (
            split.sample_ids[positions],
            counts.reshape(-1, NUM_REFERENCES),
            np.asarray(pbc.any(axis=1)),
            np.isfinite(energy),
        )


def _extend_span(span: Floats, counts: Counts) -> Floats:
    """Return orthonormal rows that span ``span`` and the rows of ``counts``."""
    present = np.flatnonzero(counts.any(axis=0) | span.any(axis=0))
    if len(span) == len(present):
        return span  # of all directions that there are, or of no sample
    distinct = np.unique(counts[:, present], axis=0)
    rows = np.zeros((len(distinct), NUM_REFERENCES))
    rows[:, present] = distinct
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    _, values, directions = np.linalg.svd(np.vstack((span, rows)), full_matrices=False)
    return directions[values > _ROUNDING * values.max()]


def _require_periodic_graphs(
    key: str, split: Split, contents: Contents, rule: NeighborSpec
) -> None:
    """Refuse periodic structures for a student that would ignore their images."""
    if contents.periodic is not None and not rule.periodic:
        raise SpecError(
            f"{key}: sample {contents.periodic!r} of {split.name!r} is periodic, but "
            "the student's graphs ignore periodic images; set "
            "student.hyperparameters.use_pbc=true, or, if the structures are "
            "molecules in a box, build the store with splits.NAME.pbc: none."
        )


def _warn_of_new_elements(
    key: str, split: Split, found: Contents, known: Contents
) -> None:
    """Warn of elements that a split has and that the training split lacks."""
    new = [z for z in found.elements if z not in known.samples]
    if not new:
        return
    ids = dict.fromkeys(name for z in new for name in found.samples[z])
    named = ", ".join(repr(name) for name in [*ids][:_NAMED])
    log.warning(
        "%s: %r has samples with %s (such as %s), which the training split lacks; "
        "errors on them mean little, so exclude these samples or train on other "
        "samples",
        key,
        split.name,
        list_symbols(new),
        named,
    )


def _warn_without_reference(
    train: Split, known: Contents, normalizer: Normalizer
) -> None:
    """Warn of elements that lack a reference energy while others have one."""
    references = normalizer.element_references
    bare = [z for z in known.elements if references[z] == 0.0]
    if any(references) and bare:
        log.warning(
            "train_split: %r has samples with %s (such as %r), which have no "
            "reference energy although other elements have one; the student must "
            "learn the whole energy of these atoms, so name the split with these "
            "elements first, or name a file in reference_energies",
            train.name,
            list_symbols(bare),
            known.samples[bare[0]][0],
        )
