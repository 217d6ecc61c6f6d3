"""`kd-cache select`: the choice is that of plain formulas, whatever the blocks are."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from pipeline.build import choose_points as choosing
from pipeline.build import descriptors as describing
from pipeline.build.choose_points import METHODS, Candidates, choose_points
from pipeline.build.descriptors import describe_structures
from pipeline.build.moments import Moments
from pipeline.build.select_samples import Wish, rank_ids, select_samples
from pipeline.cli.main import main
from pipeline.errors import StoreError
from pipeline.parallel.ordered_map import ignore_counts
from pipeline.store.reader import FeatureStore, SplitReader
from tests.commands import refusal, run_command
from tests.frames import collision_frames, frame, write_frames
from tests.stores import build, spec_document, write_spec

BUDGET = 24


def _chosen(store: FeatureStore | Path, out: Path, **wish: Any) -> list[str]:
    place = store if isinstance(store, Path) else Path(store.path)
    select_samples(place, Wish(**{"split": "train", "budget": BUDGET, **wish}), out)
    return out.read_text().splitlines()


def _rank(sample_id: str, seed: int = 0) -> int:
    return xxhash.xxh3_64(f"{seed}:{sample_id}".encode()).intdigest()


def _plain_descriptors(*splits: SplitReader) -> np.ndarray:
    """Descriptors by the definition, of all structures at once."""
    means: list[dict[int, np.ndarray]] = []
    shares: list[dict[int, float]] = []
    for split in splits:
        for position in range(len(split)):
            arrays = split.read(
                [position], ["structures/atomic_numbers", "features/node_features"]
            )
            numbers = arrays["structures/atomic_numbers"]
            features = arrays["features/node_features"].astype(float)
            present = np.unique(numbers).tolist()
            means.append({z: features[numbers == z].mean(axis=0) for z in present})
            shares.append({z: (numbers == z).mean() for z in present})
    columns = []
    for z in sorted(set().union(*means)):
        rows = [number for number, found in enumerate(means) if z in found]
        values = np.array([means[number][z] for number in rows])
        values = (values - values.mean(axis=0)) / values.std(axis=0)
        values /= np.sqrt(values.shape[1])
        u, s, _ = np.linalg.svd(values, full_matrices=False)
        block = np.zeros((len(means), 9))
        block[rows, 0] = [shares[number][z] for number in rows]
        block[rows, 1:] = u[:, :8] * s[:8]
        columns.append(block)
    wide = np.concatenate(columns, axis=1)
    u, s, _ = np.linalg.svd(wide - wide.mean(axis=0), full_matrices=False)
    kept = (s[:32] > 1e-6 * s[0]).sum()
    return u[:, :kept] * s[:kept]


def _plain_farthest(
    points: np.ndarray, ids: list[str], budget: int, known: np.ndarray
) -> list[str]:
    away = np.linalg.norm(points[:, None] - points[None], axis=-1)
    chosen = []
    if not len(known):
        chosen = [min(range(len(ids)), key=lambda number: _rank(ids[number]))]
    nearest = np.full(len(ids), np.inf)
    if len(known):
        nearest = np.linalg.norm(points[:, None] - known[None], axis=-1).min(axis=1)
    while len(chosen) < budget:
        if chosen:
            nearest = np.minimum(nearest, away[:, chosen].min(axis=1))
        chosen.append(int(nearest.argmax()))
    return [ids[number] for number in chosen]


def test_farthest_points_are_those_of_the_definition(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    train = small_store.splits["train"]
    points = _plain_descriptors(train)
    wanted = _plain_farthest(
        points, [*map(str, train.sample_ids)], BUDGET, np.zeros((0, 1))
    )
    assert _chosen(small_store, tmp_path / "ids.txt") == wanted


def test_leverage_weights_the_choice(small_store: FeatureStore, tmp_path: Path) -> None:
    train = small_store.splits["train"]
    points = _plain_descriptors(train)
    rows = np.concatenate([np.ones((len(points), 1)), points], axis=1)
    leverage = np.diagonal(rows @ np.linalg.pinv(rows))
    ids = [*map(str, train.sample_ids)]
    uniform = np.array([(_rank(name, 3) + 0.5) / 2**64 for name in ids])
    keys = -np.log(uniform) / leverage
    wanted = [ids[number] for number in keys.argsort()[:BUDGET]]
    out = tmp_path / "ids.txt"
    assert _chosen(small_store, out, method="leverage", seed=3) == wanted
    assert _chosen(small_store, out, method="random", seed=3) != wanted


def test_random_takes_the_least_ranks(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    ids = [*map(str, small_store.splits["train"].sample_ids)]
    found = _chosen(small_store, tmp_path / "ids.txt", method="random", seed=5)
    assert found == sorted(ids, key=lambda name: _rank(name, 5))[:BUDGET]


@pytest.mark.parametrize("method", METHODS)
def test_neither_blocks_nor_pieces_decide(
    method: str,
    small_store: FeatureStore,
    datasets: dict[str, Path],
    teacher_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = _chosen(small_store, tmp_path / "a.txt", method=method)
    document = spec_document(datasets, tmp_path / "other.zarr", teacher_file)
    document["store"] |= {"rows_per_block": 8192, "seed": 7}
    other = build(write_spec(tmp_path / "other.yaml", document))
    assert other.splits["train"].n_blocks < small_store.splits["train"].n_blocks
    assert _chosen(other, tmp_path / "b.txt", method=method) == wanted
    for module in (describing, choosing):
        monkeypatch.setattr(module, "PIECE_ROWS", 7)
    monkeypatch.setattr(choosing, "_REFERENCES", 5)
    monkeypatch.setattr(describing, "_PIECE_ATOMS", 50)
    assert _chosen(small_store, tmp_path / "c.txt", method=method) == wanted
    shorter = _chosen(small_store, tmp_path / "d.txt", method=method, budget=9)
    assert shorter == wanted[:9]


def test_descriptors_lie_in_a_mapped_file_without_a_name(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    train = small_store.splits["train"]
    counts: list[tuple[int, int]] = []
    found = describe_structures([train], tmp_path, lambda *c: counts.append(c))
    assert isinstance(found.rows, np.memmap)
    assert list(tmp_path.iterdir()) == []
    assert counts[0] == (0, 320)
    assert counts[-1] == (320, 320)
    np.testing.assert_allclose(found.rows.mean(axis=0), 0, atol=1e-6)
    covariance = np.cov(found.rows.T.astype(float), bias=True)
    np.testing.assert_allclose(covariance, np.diag(found.variances), atol=1e-6)


def test_moments_are_those_of_all_rows_at_once() -> None:
    rows = np.random.default_rng(0).normal(1e4, 1.0, (500, 6)) * np.arange(1, 7)
    moments = Moments(6)
    for piece in np.split(rows, [0, 3, 3, 260]):
        moments.add(piece)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        moments.covariance, np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("profile", ["q8", "compact"])
def test_encoded_features_are_decoded(
    profile: str, small_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "store.zarr"
    command = ["convert", small_store.path, out, "--profile", profile]
    assert run_command(main, command).exit_code == 0
    wanted = _chosen(small_store, tmp_path / "a.txt")
    found = _chosen(out, tmp_path / "b.txt")
    # One other point early on changes many later ones.
    assert len({*wanted} & {*found}) > BUDGET / 2


def _clusters(sizes: tuple[int, ...]) -> Candidates:
    random = np.random.default_rng(1)
    centres = 10 * np.eye(len(sizes))
    points = np.repeat(centres, sizes, axis=0)
    points += random.normal(0, 0.3, points.shape)
    points -= points.mean(axis=0)
    points = points @ np.linalg.eigh(points.T @ points)[1]
    size = len(points)
    return Candidates(
        points=points.astype(np.float32),
        variances=points.var(axis=0),
        allowed=np.ones(size, np.bool_),
        ranks=rank_ids(np.arange(size).astype(str), 0),
        references=np.zeros((0, len(sizes)), np.float32),
    )


def test_farthest_points_find_small_clusters() -> None:
    candidates = _clusters((3000, 4, 4, 4, 4))
    covered = {
        method: choose_points(candidates, 10, method, ignore_counts)
        for method in METHODS
    }
    groups = np.repeat(np.arange(5), (3000, 4, 4, 4, 4))
    assert {*groups[covered["farthest"].numbers]} == {0, 1, 2, 3, 4}
    assert {*groups[covered["random"].numbers]} == {0}
    assert len({*groups[covered["leverage"].numbers]}) > 1
    assert covered["farthest"].distances.max() < 3
    assert covered["random"].distances.max() > 10
    for chosen in covered.values():
        assert len({*chosen.numbers.tolist()}) == 10
        others = candidates.points[chosen.numbers].astype(float)
        away = candidates.points[:, None].astype(float) - others
        plain = np.linalg.norm(away, axis=-1).min(axis=1)
        np.testing.assert_allclose(chosen.distances, plain, atol=1e-4)


def test_farthest_points_of_a_store_cover_it_better_than_random_ones(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    found = {
        method: select_samples(
            small_store.path, Wish("train", BUDGET, method), tmp_path / "ids.txt"
        )
        for method in METHODS
    }
    largest = {method: found[method]["largest_distance"] for method in METHODS}
    assert largest["farthest"] < 0.7 * largest["random"]


@pytest.fixture(scope="module")
def pool_store(
    teacher_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> FeatureStore:
    """A store of a pool, of 20 of its frames that are labelled, and of others."""
    folder = tmp_path_factory.mktemp("pool")
    pool = write_frames(folder / "pool.extxyz", collision_frames(80))
    none = write_frames(folder / "plain.extxyz", collision_frames(5, 90))
    section = {"format": "extxyz", "path": str(pool)}
    splits = {
        "pool": section | {"labels": "none"},
        "labelled": section | {"every": 4},
        "plain": {"format": "extxyz", "path": str(none), "features": False},
    }
    document = spec_document(splits, folder / "pool.zarr", teacher_file)
    return build(write_spec(folder / "pool.yaml", document))


@pytest.mark.parametrize("method", METHODS)
def test_excluded_samples_are_not_chosen(
    method: str, pool_store: FeatureStore, tmp_path: Path
) -> None:
    found = _chosen(
        pool_store,
        tmp_path / "ids.txt",
        split="pool",
        budget=60,
        method=method,
        exclude=("labelled",),
    )
    pool, labelled = (
        {*map(str, pool_store.splits[s].sample_ids)} for s in ("pool", "labelled")
    )
    assert {*found} == pool - labelled


def test_farthest_points_start_from_the_excluded_ones(
    pool_store: FeatureStore, tmp_path: Path
) -> None:
    pool, labelled = (pool_store.splits[name] for name in ("pool", "labelled"))
    points = _plain_descriptors(pool, labelled)
    wanted = _plain_farthest(
        points[: len(pool)], [*map(str, pool.sample_ids)], 12, points[len(pool) :]
    )
    wish = {"split": "pool", "budget": 12, "exclude": ("labelled",)}
    assert _chosen(pool_store, tmp_path / "ids.txt", **wish) == wanted
    # Nothing is left to the seed.
    assert _chosen(pool_store, tmp_path / "ids.txt", seed=9, **wish) == wanted


def test_equal_structures_are_chosen_last_and_counted(
    teacher_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    atoms = (("O", "H", "H"), [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    frames = [frame(f"same{k}", *atoms, energy=-1.0) for k in range(3)]
    frames += collision_frames(5)
    data = write_frames(tmp_path / "data.extxyz", frames)
    document = spec_document({"train": data}, tmp_path / "s.zarr", teacher_file)
    store = build(write_spec(tmp_path / "s.yaml", document))
    with caplog.at_level(logging.WARNING):
        found = _chosen(store, tmp_path / "ids.txt", budget=6)
    assert sum(name.startswith("same") for name in found) == 1
    assert "the descriptor of another one" not in caplog.text
    with caplog.at_level(logging.WARNING):
        _chosen(store, tmp_path / "ids.txt", budget=8)
    assert "2 of the 8 chosen samples have the descriptor of another one" in caplog.text


def _command(store: FeatureStore | Path, out: Path, *more: object) -> list[object]:
    place = store if isinstance(store, Path) else store.path
    split = () if "--split" in more else ("--split", "train")
    budget = () if "--budget" in more else ("--budget", 5)
    return ["select", place, *split, *budget, "--out", out, *more]


def test_the_command_writes_ids_and_prints_what_they_cover(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "ids.txt"
    done = run_command(main, _command(small_store, out))
    assert done.exit_code == 0, done.output
    assert f"{out}: 5 of 160 samples of train, by farthest points; " in done.stdout
    ids = out.read_text().splitlines()
    assert len({*ids}) == 5
    done = run_command(main, _command(small_store, out, "--json"))
    found = json.loads(done.stdout)
    assert (found["budget"], found["candidates"], found["seed"]) == (5, 160, 0)
    assert found["largest_distance"] >= found["mean_distance"] > 0
    assert out.read_text().splitlines() == ids
    assert [file.name for file in out.parent.iterdir()] == ["ids.txt"]


def test_bad_input_is_refused_in_one_sentence(
    small_store: FeatureStore,
    labels_store: FeatureStore,
    pool_store: FeatureStore,
    small_spec: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "ids.txt"
    said = refusal(main, _command(small_store, out, "--budget", 161))
    assert said.startswith("A budget of 161 is more than the 160 samples of split ")
    words = ("--split", "pool", "--budget", 61, "--exclude", "labelled")
    said = refusal(main, _command(pool_store, out, *words))
    assert "the 60 samples of split 'pool' that are not in 'labelled'" in said
    said = refusal(main, _command(small_store, out, "--split", "tarin"))
    assert "has no split 'tarin'; it has train, val" in said
    said = refusal(main, _command(small_store, out, "--exclude", "old"))
    assert "has no split 'old'" in said
    said = refusal(main, _command(labels_store, out))
    assert "add the line `features: {node_features: {}}`" in said
    said = refusal(main, _command(pool_store, out, "--split", "plain"))
    assert "remove `features: false` from splits.plain" in said
    planned = tmp_path / "planned.zarr"
    assert run_command(main, ["plan", small_spec, "--out", planned]).exit_code == 0
    assert "continue it with `kd-cache build" in refusal(main, _command(planned, out))
    assert refusal(main, _command(tmp_path / "absent.zarr", out))
    for budget in (0, "many"):
        done = run_command(main, _command(small_store, out, "--budget", budget))
        assert done.exit_code == 2
    assert not out.exists()


def test_a_damaged_store_writes_nothing(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    place = tmp_path / "damaged.zarr"
    shutil.copytree(small_store.path, place)
    (shard, *_) = sorted((place / "train/features/node_features/c").rglob("[0-9]*/0"))
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    out = tmp_path / "ids.txt"
    with pytest.raises(StoreError, match="node_features"):
        _chosen(place, out)
    assert not out.exists()
