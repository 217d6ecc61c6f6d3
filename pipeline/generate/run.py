"""Makes the missing pieces of generated datasets, in this process or in workers."""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from pipeline.generate.dataset import GeneratedDataset
from pipeline.generate.method import PassEstimate, free_atoms
from pipeline.generate.piece import METHODS, make_piece
from pipeline.generate.screen import REASONS
from pipeline.parallel.devices import device_for_worker
from pipeline.parallel.ordered_map import OrderedMap, ignore_items
from pipeline.spec.sections import TeacherSpec
from pipeline.teachers.runner import TeacherRunner

log = logging.getLogger("pipeline.generate")
_WORDS = {
    "close": "atoms too close",
    "force": "forces too large",
    "energy": "energies too high",
}


def missing_pieces(dataset: GeneratedDataset) -> list[int]:
    """Return the pieces that have no sound file."""
    return [
        piece for piece in range(dataset.n_pieces) if dataset.read_piece(piece) is None
    ]


def make_pieces(
    name: str,
    dataset: GeneratedDataset,
    pieces: list[int],
    teacher: TeacherRunner,
    run: OrderedMap = map,
    made: Callable[[int], None] = ignore_items,
) -> None:
    """Make ``pieces`` of split ``name``; each is kept as soon as it is made.

    Parameters
    ----------
    run
        Runs a function over pieces, in processes that load the teacher themselves.
    made
        Called with the number of copies after each piece.

    Raises
    ------
    DataError
        A sample cannot be used or displaced.
    """
    if run is map:
        task: Callable[[int], int] = partial(_make, dataset, teacher)
    else:
        document = teacher.spec.model_dump_json()
        task = partial(_make_in_worker, dataset, document, str(teacher.device))
    for copies in run(task, pieces):
        made(copies)
    _log_refused(name, dataset)


def count_passes(dataset: GeneratedDataset) -> dict[str, int]:
    """Return teacher passes and refused draws by reason, over all pieces."""
    counts = dict.fromkeys(("passes", *REASONS), 0)
    for number in range(dataset.n_pieces):
        piece = dataset.read_piece(number)
        for key in counts:
            counts[key] += 0 if piece is None else piece.counts.get(key, 0)
    return counts


def estimate_passes(dataset: GeneratedDataset) -> int:
    """Estimate the teacher passes of all copies from the sizes of a few samples."""
    count = len(dataset.parents)
    chosen = range(0, count, max(1, count // 16))
    method = METHODS[dataset.spec.method]
    prices: list[PassEstimate] = [
        method.estimate_passes(
            dataset.spec, len(free_atoms(dataset.parents[index].structure))
        )
        for index in chosen
    ]
    total = sum(price.total(dataset.spec.copies) for price in prices)
    return round(total * count / len(prices))


def _make(dataset: GeneratedDataset, teacher: TeacherRunner, piece: int) -> int:
    """Make and keep ``piece``; return its number of copies."""
    parents = dataset.parents_of(piece)
    found = make_piece(parents, dataset.spec, teacher, dataset.closest)
    found.write(dataset.piece_file(piece), dataset.key)
    return len(found.reasons)


def _make_in_worker(
    dataset: GeneratedDataset, document: str, device: str, piece: int
) -> int:
    return _make(dataset, _load_teacher(document, device), piece)


@lru_cache(maxsize=1)
def _load_teacher(document: str, device: str) -> TeacherRunner:
    """Load the teacher once in each worker process, on a GPU of its own if possible."""
    from distributed import get_worker

    place: Any = device_for_worker(device, int(get_worker().name))
    return TeacherRunner.load(TeacherSpec.model_validate_json(document), str(place))


def _log_refused(name: str, dataset: GeneratedDataset) -> None:
    counts = count_passes(dataset)
    refused = [f"{counts[r]} for {_WORDS[r]}" for r in REASONS if counts[r]]
    log.info(
        "splits.%s: %d structures by %d teacher passes",
        name,
        len(dataset),
        counts["passes"],
    )
    if refused:
        log.warning(
            "splits.%s: %d draws of %d structures were refused and drawn again: %s",
            name,
            sum(counts[r] for r in REASONS),
            len(dataset),
            ", ".join(refused),
        )
