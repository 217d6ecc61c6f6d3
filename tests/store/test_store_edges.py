"""Edge-level arrays: identity, counts and order against dictionaries of edges."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_store
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DamagedStoreError, DataError, SpecError, StoreError
from pipeline.store import creation as creation_module
from pipeline.store import writer as writer_module
from pipeline.store.backends import LocalBackend
from pipeline.store.layout import EdgeAxis, plan_blocks
from pipeline.store.metadata import read_split
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from pipeline.store.writer import ArrayPlan, StoreWriter, create_store

PLAN = toy_store.plan("bonds")
EDGES = PLAN.blocks.edges
assert EDGES is not None
PATHS = [array.path for array in toy_store.EDGES]
Key = tuple[int, int, int, tuple[int, ...]]

TRUTH: dict[Key, bytes] = {
    (sample, *edge): features.tobytes()
    for sample in range(PLAN.blocks.n_samples)
    for edge, features in toy_store.edges_of("bonds", sample).items()
}


def keyed(arrays: dict[str, np.ndarray], samples, counts) -> dict[Key, bytes]:
    """Rows of the three edge arrays under (sample, source, target, shift)."""
    index, shifts, features = (arrays[path] for path in PATHS)
    owners = [
        sample for sample, n in zip(samples, counts, strict=True) for _ in "x" * n
    ]
    assert len(owners) == len(index) == len(shifts) == len(features)
    rows = zip(owners, index.tolist(), shifts.tolist(), features, strict=True)
    return {(o, s, t, tuple(n)): value.tobytes() for o, (s, t), n, value in rows}


def some_truth(samples) -> dict[Key, bytes]:
    return {key: value for key, value in TRUTH.items() if key[0] in samples}


@pytest.fixture(scope="module")
def bonds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed store of the one split with edges; no test changes it."""
    path = tmp_path_factory.mktemp("bonds") / "toy.zarr"
    toy_store.build(path, ("bonds",))
    return path


@pytest.fixture
def victim(bonds: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bonds, tmp_path / "toy.zarr"))


def test_the_toy_reaches_the_corners():
    assert PLAN.blocks.n_blocks > 3
    assert EDGES.rows_per_block % 1024 == 0
    assert EDGES.rows_per_block > 1024
    assert (EDGES.n_edges == 0).sum() > 3
    assert {key[3][0] for key in TRUTH} >= {-128, 127}


def test_every_edge_is_read_under_its_identity(bonds: Path):
    split = FeatureStore.open(bonds).splits["bonds"]
    np.testing.assert_array_equal(split.n_edges, EDGES.n_edges)
    order = PLAN.blocks.order
    rng = np.random.default_rng(5)
    everyone = rng.permutation(len(split))
    for positions in (everyone, everyone[:7], np.sort(everyone[:20]), everyone[:1]):
        arrays = split.read(positions, PATHS)
        samples = order[positions].tolist()
        found = keyed(arrays, samples, split.n_edges[positions])
        assert found == some_truth(set(samples))
        assert [arrays[path].dtype for path in PATHS] == ["uint16", "int8", "float16"]


def test_zarr_python_finds_the_same_edges(bonds: Path):
    group: Any = zarr.open_group(bonds / "bonds", mode="r")
    start, counts = group["edges/start"][:], group["edges/n_edges"][:]
    rows = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(start, counts, strict=True)]
    )
    arrays = {path: group[path][:] for path in PATHS}
    used = {path: values[rows] for path, values in arrays.items()}
    assert keyed(used, PLAN.blocks.order.tolist(), counts) == TRUTH
    others = np.delete(arrays["edges/edge_features"], rows, axis=0)
    assert len(others)
    assert np.isnan(others).all()
    names = {path: group[path].metadata.dimension_names for path in PATHS}
    assert list(names.values()) == [
        ("edge", "end"),
        ("edge", "vector"),
        ("edge", "channel"),
    ]


def test_samples_without_edges_have_no_rows(bonds: Path):
    split = FeatureStore.open(bonds).splits["bonds"]
    empty = np.flatnonzero(split.n_edges == 0)
    arrays = split.read(empty, [*PATHS, "features/node_features", "labels/energy"])
    assert [arrays[path].shape for path in PATHS] == [(0, 2), (0, 3), (0, 6)]
    assert len(arrays["features/node_features"]) == split.n_atoms[empty].sum()
    assert len(arrays["labels/energy"]) == len(empty)


def test_a_split_may_have_no_edge_at_all(tmp_path: Path):
    blocks = plan_blocks([3, 2, 4], 5, n_edges=[0, 0, 0])
    names, checksums = ["a", "b", "c"], np.zeros(3, np.uint64)
    plan = replace(
        PLAN,
        sample_ids=names,
        checksums=checksums,
        blocks=blocks,
        arrays=toy_store.EDGES,
    )
    path = tmp_path / "toy.zarr"
    create_store(path, [plan], {})
    writer = StoreWriter(path)
    rows = {a.path: np.empty((0, *a.shape), a.dtype) for a in toy_store.EDGES}
    for block in range(blocks.n_blocks):
        writer.write_block("bonds", block, rows)
    writer.seal()
    assert verify_store(path) == []
    split = FeatureStore.open(path).splits["bonds"]
    assert split.read([2, 0, 1], PATHS)["edges/cell_offsets"].shape == (0, 3)


def test_reading_past_full_blocks(tmp_path: Path):
    """A sample without edges behind a full last block starts where no row is."""
    blocks = plan_blocks([2, 2], 2, n_edges=[0, 0])
    (last,) = blocks.order[-1:]
    counts = [3, 3]
    counts[last] = 0
    blocks = plan_blocks([2, 2], 4, n_edges=counts)
    assert blocks.n_blocks == 1
    assert blocks.edges is not None
    assert blocks.edges.start.max() == blocks.edges.rows_per_block
    plan = replace(
        PLAN,
        sample_ids=["a", "b"],
        checksums=np.zeros(2, np.uint64),
        blocks=blocks,
        arrays=toy_store.EDGES,
    )
    create_store(tmp_path / "toy.zarr", [plan], {})
    ends = np.array([[0, 1], [1, 0], [1, 1]])
    rows = {
        "edges/edge_index": ends[[1, 0, 2]],
        "edges/cell_offsets": np.zeros((3, 3), int),
        "edges/edge_features": np.ones((3, 6)),
    }
    StoreWriter(tmp_path / "toy.zarr").write_block("bonds", 0, rows)
    store = FeatureStore.open(tmp_path / "toy.zarr", allow_unsealed=True)
    split = store.splits["bonds"]
    assert split.read([1], PATHS)["edges/edge_index"].shape == (0, 2)
    assert split.read([1, 0, 1], PATHS)["edges/edge_index"].tolist() == [
        [1, 0],
        [0, 1],
        [1, 1],
    ]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 900)), min_size=1),
    st.sampled_from([30, 100, 1024]),
    st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_edge_rows_follow_the_atoms_blocks(samples, rows, seed):
    atoms, edges = zip(*samples, strict=True)
    plain = plan_blocks(atoms, rows, seed)
    plan = plan_blocks(atoms, rows, seed, n_edges=edges)
    assert plan.edges is not None
    np.testing.assert_array_equal(plan.start, plain.start)
    np.testing.assert_array_equal(plan.block_bounds, plain.block_bounds)
    assert plan.edges.n_edges.tolist() == [edges[i] for i in plan.order]
    sums = []
    for block in range(plan.n_blocks):
        first, end = plan.block_bounds[block : block + 2]
        row = block * plan.edges.rows_per_block
        for position in range(first, end):
            assert plan.edges.start[position] == row
            row += edges[plan.order[position]]
        sums.append(row - block * plan.edges.rows_per_block)
    largest = max(sums)
    chunked = next(n for n in range(1024, 10**6, 1024) if n >= largest)
    assert plan.rows("edge") == (max(largest, 1) if largest <= 1024 else chunked)


def test_a_split_without_edges_says_so(tmp_path: Path):
    toy_store.build(tmp_path / "val.zarr", ("val",))
    store = FeatureStore.open(tmp_path / "val.zarr")
    with pytest.raises(
        StoreError, match=r"'val' of .* has no edges; add edge_features"
    ):
        _ = store.splits["val"].n_edges


@pytest.mark.parametrize("array", ["edge_index", "cell_offsets", "edge_features"])
def test_a_damaged_edge_shard_is_found_and_built_again(
    array: str, victim: Path, bonds: Path
):
    file = victim / f"bonds/edges/{array}/c/1/0"
    content = bytearray(file.read_bytes())
    content[3] ^= 4
    file.write_bytes(content)
    split = FeatureStore.open(victim).splits["bonds"]
    block = np.array(split.block_positions(1))
    with_edges = block[split.n_edges[block] > 0]
    first = split.sample_ids[with_edges[0]]
    words = rf"{array}/c/1/0 has a damaged inner chunk 0 \(samples '{first}', "
    with pytest.raises(DamagedStoreError, match=words):
        split.read(with_edges[:1], [f"edges/{array}"])
    split.read(block, ["features/node_features"])
    split.read(np.array(split.block_positions(2)), PATHS)
    problems = verify_store(victim)
    assert {(p.file, p.split, p.block) for p in problems} == {
        (f"bonds/edges/{array}/c/1/0", "bonds", 1)
    }
    StoreWriter(victim).discard_block("bonds", 1)
    toy_store.build(victim, ("bonds",))
    assert toy_store.contents(victim) == toy_store.contents(bonds)


def test_edge_rows_are_traced_to_their_samples(bonds: Path):
    index = read_split(LocalBackend(bonds), "bonds")
    owners = {}
    for name, start, n in zip(
        PLAN.sample_ids, EDGES.start.tolist(), EDGES.n_edges.tolist(), strict=True
    ):
        owners.update({row: name for row in range(start, start + n)})
    for row in range(index.n_blocks * index.rows("edge")):
        expected = [owners[row]] if row in owners else []
        assert index.find_samples("edge", row, row + 1) == expected


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    path = tmp_path / "planned.zarr"
    create_store(path, [PLAN], {"fingerprint": "f"})
    return path


def rows_of(block: int) -> dict[str, np.ndarray]:
    rows = toy_store.block_rows("bonds", PLAN.blocks, block, PLAN.arrays)
    return {path: values.copy() for path, values in rows.items()}


def _drop(rows: dict[str, np.ndarray]) -> None:
    for path in PATHS:
        rows[path] = rows[path][:-1]


def _outside(rows: dict[str, np.ndarray]) -> None:
    rows["edges/edge_index"][-1, 0] = PLAN.blocks.n_atoms.max()


def _repeat(rows: dict[str, np.ndarray]) -> None:
    for path in PATHS[:2]:
        rows[path][-1] = rows[path][-2]


def _swap(rows: dict[str, np.ndarray]) -> None:
    for path in PATHS[:2]:
        rows[path][[-1, -2]] = rows[path][[-2, -1]]


def _by_source(rows: dict[str, np.ndarray]) -> None:
    rows["edges/edge_index"] = rows["edges/edge_index"][:, ::-1]


def _far(rows: dict[str, np.ndarray]) -> None:
    rows["edges/cell_offsets"] = rows["edges/cell_offsets"].astype(np.int64)
    rows["edges/cell_offsets"][-1, 1] = 200


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_drop, StoreError, r"block 1 of split 'bonds' has shape \(\d+, 2\), planned"),
        (_outside, StoreError, "LAST .* has edges of atoms outside their sample; "),
        (_repeat, StoreError, "LAST .* has edges that repeat or are not sorted"),
        (_swap, StoreError, "LAST .* has edges that repeat or are not sorted"),
        (_by_source, StoreError, "has edges that repeat or are not sorted"),
        (_far, DataError, "LAST .*'edges/cell_offsets' that does not fit int8"),
    ],
)
def test_edges_that_were_not_planned_are_refused(planned: Path, change, error, words):
    rows = rows_of(1)
    change(rows)
    writer = StoreWriter(planned)
    mine = range(*PLAN.blocks.block_bounds[1:3].tolist())
    last = [PLAN.sample_ids[p] for p in mine if EDGES.n_edges[p] > 1][-1]
    with pytest.raises(error, match=words.replace("LAST", f"Sample '{last}'")):
        writer.write_block("bonds", 1, rows)
    assert 1 in writer.pending_blocks("bonds")


def _moved_edge() -> tuple[EdgeAxis, int]:
    """Counts in which one edge of a sample is said to be the next one's."""
    counts = EDGES.n_edges.copy()
    mine = range(*PLAN.blocks.block_bounds[1:3].tolist())
    atoms = PLAN.blocks.n_atoms
    targets = rows_of(1)["edges/edge_index"][:, 1]
    ends = np.cumsum(counts[mine])
    place = next(
        p
        for p, end in zip(mine, ends[:-1], strict=False)
        # Only the order can tell: the next sample has an atom of that number too.
        if atoms[p + 1] >= atoms[p] and end > 0 and targets[end - 1] > targets[end]
    )
    counts[place] -= 1
    counts[place + 1] += 1
    start = EDGES.start.copy()
    start[place + 1] -= 1
    return EdgeAxis(start, counts, EDGES.rows_per_block), place + 1


def test_counts_that_agree_only_in_sum_are_refused(tmp_path: Path):
    edges, place = _moved_edge()
    plan = replace(PLAN, blocks=replace(PLAN.blocks, edges=edges))
    create_store(tmp_path / "toy.zarr", [plan], {})
    words = f"Sample '{PLAN.sample_ids[place]}' of split 'bonds' has edges that repeat"
    with pytest.raises(StoreError, match=words):
        StoreWriter(tmp_path / "toy.zarr").write_block("bonds", 1, rows_of(1))


def _build_unchecked(path: Path, plan, change=None) -> None:
    create_store(path, [plan], {})
    writer = StoreWriter(path)
    for block in range(plan.blocks.n_blocks):
        rows = rows_of(block)
        if change is not None and block == 1:
            change(rows)
        writer.write_block("bonds", block, rows)
    writer.seal()


def test_verify_finds_a_wrong_count(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(writer_module, "_check_edges", lambda *rows: None)
    path = tmp_path / "toy.zarr"
    edges, place = _moved_edge()
    plan = replace(PLAN, blocks=replace(PLAN.blocks, edges=edges))
    _build_unchecked(path, plan)
    (problem,) = verify_store(path)
    assert (problem.split, problem.block) == ("bonds", 1)
    assert str(problem).startswith(
        f"{path}/bonds/edges/edge_index/c/1/0 has edges that repeat or are not sorted"
    )
    assert f"samples '{PLAN.sample_ids[place]}' of split 'bonds'" in str(problem)


def test_verify_finds_edges_to_atoms_of_other_samples(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(writer_module, "_check_edges", lambda *rows: None)
    path = tmp_path / "toy.zarr"
    _build_unchecked(path, PLAN, _outside)
    (problem,) = verify_store(path)
    assert problem.block == 1
    assert "c/1/0 has edges of atoms outside their sample (samples" in str(problem)


@pytest.mark.parametrize(
    "edges",
    [
        replace(EDGES, start=EDGES.start + (np.arange(50) == 9)),
        replace(EDGES, rows_per_block=EDGES.rows_per_block + 1024),
        replace(EDGES, n_edges=np.where(np.arange(50) == 9, -1, EDGES.n_edges)),
    ],
)
def test_verify_finds_an_edge_axis_that_does_not_follow(
    tmp_path: Path, monkeypatch, edges: EdgeAxis
):
    monkeypatch.setattr(creation_module, "check_split", lambda split: None)
    plan = replace(PLAN, blocks=replace(PLAN.blocks, edges=edges))
    create_store(tmp_path / "toy.zarr", [plan], {})
    _, problem = verify_store(tmp_path / "toy.zarr")
    assert "/bonds/index has edge starts or rows that do not follow" in str(problem)
    assert problem.block is None


def _without(path: str) -> tuple[ArrayPlan, ...]:
    return tuple(array for array in PLAN.arrays if array.path != path)


LARGE = plan_blocks([65536], 131072, n_edges=[1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"blocks": replace(PLAN.blocks, edges=None)}, SpecError, "needs edge counts"),
        ({"arrays": _without("edges/edge_index")}, SpecError, "needs edge counts and"),
        ({"arrays": _without("edges/cell_offsets")}, SpecError, "plan them together"),
        (
            {"arrays": (*PLAN.arrays, ArrayPlan("edges/start", "node", (), "int8"))},
            SpecError,
            "'edges/start' .* reserved",
        ),
        (
            {
                "blocks": replace(
                    PLAN.blocks, edges=replace(EDGES, n_edges=EDGES.n_edges - 1)
                )
            },
            DataError,
            "one edge count of 0 or more for each of its 50 samples",
        ),
        (
            {"blocks": LARGE, "sample_ids": ["big"], "checksums": PLAN.checksums[:1]},
            DataError,
            "Sample 'big' of split 'bonds' has 65536 atoms, .* 65535 atoms; remove",
        ),
    ],
)
def test_impossible_edge_plans_are_refused(tmp_path: Path, change, error, words):
    with pytest.raises(error, match=words):
        create_store(tmp_path / "toy.zarr", [replace(PLAN, **change)], {})
    assert list(tmp_path.iterdir()) == []


def _edit_split(path: Path, change) -> None:
    file = path / "bonds/zarr.json"
    document = json.loads(file.read_text())
    change(document["attributes"]["kd_split"])
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.pop("edge_rows_per_block"), "lacks a usable 'kd_split'"),
        (lambda plan: plan.update(n_edges=1), "says 1 edges, which is not the sum"),
        (lambda plan: plan["arrays"].pop(2), "without a usable 'edges/edge_index'"),
        (lambda plan: plan["arrays"][2].update(level="bond"), "usable 'kd_split'"),
        (lambda plan: plan.update(edge_rows_per_block=0), "array that its split plans"),
    ],
)
def test_split_metadata_without_sound_edges_is_damage(planned: Path, change, words):
    _edit_split(planned, change)
    with pytest.raises(DamagedStoreError, match=words):
        FeatureStore.open(planned, allow_unsealed=True)


def test_edge_counts_are_sealed_with_the_index(victim: Path):
    for name in ("start", "n_edges"):
        digests = (victim / "digests/c/0").read_bytes()
        assert f" bonds/edges/{name}/c/0\n".encode() in digests
        chunk = victim / f"bonds/edges/{name}/c/0"
        intact = chunk.read_bytes()
        chunk.write_bytes(intact[:-1])
        with pytest.raises(
            DamagedStoreError, match=f"{name}/c/0 differs from the sealed store"
        ):
            FeatureStore.open(victim)
        chunk.write_bytes(intact)
