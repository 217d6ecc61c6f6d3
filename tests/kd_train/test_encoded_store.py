"""Training on features that are stored as integers, or far away."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from kd_train.cli.train import main
from kd_train.loader.concat import ConcatSplit
from kd_train.loader.data import CachedSamples, decode_batch
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.store.quantization import DTYPES, Quantization
from pipeline.store.reader import FeatureStore
from tests.commands import run_command
from tests.kd_train.runs import distilling, make_run
from tests.stores import build, spec_document, write_spec

RULE = NeighborSpec(5.0, 20, symmetric=True)
FIELDS = ("node_features", "vector_features")
PATHS = {name: f"features/{name}" for name in FIELDS}


@pytest.fixture(scope="module")
def coded(
    tmp_path_factory: pytest.TempPathFactory, datasets: Any, teacher_file: Path
) -> FeatureStore:
    folder = tmp_path_factory.mktemp("coded")
    features = {
        "node_features": {"profile": "q8"},
        "vector_features": {"profile": "compact"},
        "per_atom_energy": {},
    }
    document = spec_document(datasets, folder / "s.zarr", teacher_file, features)
    return build(write_spec(folder / "spec.yaml", document))


def samples_of(split: Any) -> CachedSamples:
    return CachedSamples(split, RULE, range(1, 84), FIELDS)


def test_batches_carry_integers_that_decode_on_the_device(coded: FeatureStore) -> None:
    split = coded.splits["train"]
    samples = samples_of(split)
    positions = np.random.default_rng(0).integers(0, len(split), 12)
    batch = samples.batch(positions)
    assert batch.node_features.dtype == torch.int8
    assert batch.node_features_scale.dtype == torch.float16
    assert batch.vector_features.dtype == torch.int16
    found = decode_batch(batch, FIELDS, samples.tables(torch.device("cpu")))
    wanted = split.read(positions, list(PATHS.values()))
    for name, path in PATHS.items():
        assert found[name].dtype == torch.float32
        np.testing.assert_array_equal(found[name], wanted[path])
    # The batch that travelled is left as it was.
    assert batch.node_features.dtype == torch.int8


@pytest.mark.parametrize("profile", ["q8", "compact"])
def test_torch_decodes_to_the_bits_of_numpy(profile: Any) -> None:
    """With a rotation, however rows are batched."""
    rng = np.random.default_rng(4)
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32)
    mean, step = np.zeros(16, np.float32), np.full(16, 0.01, np.float32)
    encoding = Quantization(profile, step, mean, rotation)
    integers = rng.integers(-127, 128, (1300, 3, 16)).astype(DTYPES[profile])
    scales = rng.uniform(0.1, 2, 1300).astype(np.float16) if profile == "q8" else None
    wanted = encoding.decode(integers, scales)
    tables = {"v": {n: torch.tensor(t) for n, t in encoding.decoder.items()}}
    for rows in (slice(None), slice(5, 6), slice(700, 1251)):
        batch = Data(v=torch.from_numpy(integers[rows]))
        if scales is not None:
            batch.v_scale = torch.from_numpy(scales[rows])
        found = decode_batch(batch, ("v",), tables).v
        np.testing.assert_array_equal(found, wanted[rows], strict=True)


def test_joined_splits_decode_each_by_its_own(coded: FeatureStore) -> None:
    parts = [coded.splits["train"], coded.splits["val"]]
    scales = [part.encoding(PATHS["node_features"]).channel_scale for part in parts]
    assert not np.array_equal(*scales)
    joined = ConcatSplit(parts, list(PATHS.values()))
    samples = samples_of(joined)
    positions = np.array([3, len(parts[0]) + 5, 0, len(parts[0])])
    found = decode_batch(
        samples.batch(positions), FIELDS, samples.tables(torch.device("cpu"))
    )
    alone = [
        (parts[0], 3),
        (parts[1], 5),
        (parts[0], 0),
        (parts[1], 0),
    ]
    for name, path in PATHS.items():
        wanted = np.concatenate([part.read([p], [path])[path] for part, p in alone])
        np.testing.assert_array_equal(found[name], wanted)


def test_losses_are_those_of_exact_features_up_to_the_error(
    coded: FeatureStore, small_store: FeatureStore, tmp_path: Path
) -> None:
    positions = np.arange(24)
    losses = []
    for number, store in enumerate((small_store, coded)):
        run = make_run(store, tmp_path / str(number), distilling(seed=5))
        found = run.losses(run.on_device(run.train_samples.batch(positions)))
        losses.append({name: value.item() for name, value in found.items()})
    exact, near = losses
    assert near["l0"] == exact["l0"]
    for name in ("n2n", "v2v"):
        assert near[name] != exact[name]
        assert near[name] == pytest.approx(exact[name], rel=1e-2)


def test_shuffling_stays_within_what_is_kept_decoded(coded: FeatureStore) -> None:
    limit = coded.splits["train"].n_blocks
    assert limit >= 2
    assert samples_of(coded.splits["train"]).max_shuffle_blocks(16) == 16
    block = 1024 * 3 * 16 * 2
    tight = FeatureStore.open(coded.path, cache_bytes=2 * block).splits["train"]
    assert samples_of(tight).max_shuffle_blocks(16) == 2
    assert samples_of(tight).max_shuffle_blocks(1) == 1
    both = ConcatSplit([coded.splits["val"], tight], list(PATHS.values()))
    assert samples_of(both).max_shuffle_blocks(16) == 2


def test_kd_train_reads_integers_behind_a_url(
    coded: FeatureStore, tmp_path: Path
) -> None:
    """The same student, bit for bit, from the folder and over HTTP."""
    pytest.importorskip("aiohttp")
    from tests.store.http_server import serving

    students = []
    with serving(Path(coded.path).parent) as server:
        for number, cache in enumerate((coded.path, f"{server.url}/s.zarr")):
            out = tmp_path / str(number)
            arguments = ["--cache", cache, "--strategy", "n2n+v2v", "--out", out]
            arguments += [
                "--student",
                "painn-small-demo",
                "--steps",
                3,
                "--device",
                "cpu",
            ]
            arguments += ["--set", "batch_size=8", "--set", "eval_every=3"]
            done = run_command(main, arguments)
            assert done.exit_code == 0, done.output
            students.append((out / "student.safetensors").read_bytes())
    assert students[0] == students[1]
