"""add-field that is killed, at any moment and where it matters most."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.build import extend
from pipeline.build.extend import extend_store
from pipeline.spec.cache_spec import load_spec
from pipeline.store.verify import verify_store
from tests.faults import run_faults
from tests.stores import build, spec_document, write_spec

FIELDS = {"node_features": None, "per_atom_energy": None, "vector_features": None}


@pytest.fixture
def spec(
    tmp_path: Path, collisions: Callable[..., Path], teacher_file: Path
) -> Callable[[int], Path]:
    """``spec(n)`` asks for the first n of `FIELDS`; all have the same store."""
    data = collisions(130)

    def make(count: int) -> Path:
        features: dict[str, Any] = dict(itertools.islice(FIELDS.items(), count))
        place = tmp_path / "folder" / "s.zarr"
        document = spec_document({"train": data}, place, teacher_file, features)
        return write_spec(tmp_path / f"{count}.yaml", document)

    return make


def _entries(folder: Path) -> dict[str, bytes | None]:
    return {
        str(entry.relative_to(folder)): entry.read_bytes() if entry.is_file() else None
        for entry in folder.rglob("*")
    }


def _interrupt_removal(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Stop at the removal of a file once ``after`` are gone."""
    unlink, gone = os.unlink, itertools.count()

    def stopping(*args: Any, **kwargs: Any) -> None:
        if kwargs.get("dir_fd") is not None and next(gone) == after:
            raise KeyboardInterrupt
        unlink(*args, **kwargs)

    monkeypatch.setattr(os, "unlink", stopping)


def test_kills_at_any_moment_leave_the_old_store_or_the_new_one() -> None:
    told = run_faults("kills", "--operation", "add-field", "--count", 3)
    assert list(told) == ["add-field at moments", "add-field at changes"]
    for tally in told.values():
        assert (tally["kills"], tally["failures"]) == (3, [])


def test_what_a_killed_removal_left_is_no_obstacle_to_more_fields(
    spec: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(spec(3)).path.parent
    truth = _entries(folder)
    (folder / "s.zarr").rename(tmp_path / "away")
    build(spec(1))
    with monkeypatch.context() as patch:
        _interrupt_removal(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            extend_store(load_spec(spec(2)))
    assert len(list(folder.iterdir())) > 1
    assert extend_store(load_spec(spec(3))) == ["train/features/vector_features"]
    assert _entries(folder) == truth


def test_half_of_an_abandoned_extension_never_becomes_the_store(
    spec: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished but not put in place, then given up, then wanted after all."""
    folder = build(spec(3)).path.parent
    truth = _entries(folder)
    (folder / "s.zarr").rename(tmp_path / "away")
    build(spec(1))

    def stop(*_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extend, "_exchange", stop)
        with pytest.raises(KeyboardInterrupt):
            extend_store(load_spec(spec(3)))
    with monkeypatch.context() as patch:
        _interrupt_removal(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            extend_store(load_spec(spec(1)))
    assert len(extend_store(load_spec(spec(3)))) == 2
    assert verify_store(folder / "s.zarr") == []
    assert _entries(folder) == truth
