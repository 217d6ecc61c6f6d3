"""Specs with profiles: what is built, converted and told, through the real commands."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import LocalCluster

from pipeline.build.build import build_store
from pipeline.build.worker import FillOptions
from pipeline.cli.main import main
from pipeline.errors import StoreError
from pipeline.spec.cache_spec import load_spec
from pipeline.store import calibration
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from tests.commands import refusal, run_command
from tests.stores import build, spec_document, write_spec

NODE, VECTOR = "features/node_features", "features/vector_features"
PROFILES = {
    "node_features": {"profile": "compact", "max_relative_error": 2e-3},
    "vector_features": {"profile": "q8"},
    "per_atom_energy": {},
}
Files = dict[str, bytes]


def files_of(store: Path) -> Files:
    return {
        str(file.relative_to(store)): file.read_bytes()
        for file in sorted(store.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def spec(
    tmp_path_factory: pytest.TempPathFactory, datasets: Any, teacher_file: Path
) -> Path:
    folder = tmp_path_factory.mktemp("profiles")
    document = spec_document(datasets, folder / "s.zarr", teacher_file, PROFILES)
    document["splits"]["val"]["features"] = False
    return write_spec(folder / "spec.yaml", document)


@pytest.fixture(scope="module")
def coded(spec: Path) -> FeatureStore:
    return build(spec)


def relative(got: np.ndarray, wanted: np.ndarray, centered: bool) -> float:
    center = wanted.mean(axis=0, dtype=np.float64) if centered else 0.0
    wrong = np.square(got.astype(np.float64) - wanted).sum()
    return float(wrong / np.square(wanted - center).sum())


def test_profiles_keep_their_error(
    coded: FeatureStore, small_store: FeatureStore
) -> None:
    assert coded.attributes["format_version"] == 3
    split, exact = coded.splits["train"], small_store.splits["train"]
    everyone = np.arange(len(split))
    assert list(split.sample_ids) == list(exact.sample_ids)
    for path, limit in {NODE: 2.2e-3, VECTOR: 2e-4}.items():
        got = split.read(everyone, [path])[path]
        wanted = exact.read(everyone, [path])[path]
        error = relative(got, wanted, path == NODE)
        assert 0 < error < limit
        assert split.error(path) == pytest.approx(error, rel=0.05)
    energies = "teacher/per_atom_energy"
    np.testing.assert_array_equal(
        split.read(everyone, [energies])[energies],
        exact.read(everyone, [energies])[energies],
    )
    assert NODE not in coded.splits["val"].arrays
    assert verify_store(coded.path) == []


def test_a_second_build_gives_the_same_bytes(
    spec: Path, coded: FeatureStore, tmp_path: Path
) -> None:
    again = tmp_path / "s.zarr"
    done = run_command(main, ["build", spec, "--out", again, "--device", "cpu"])
    assert done.exit_code == 0
    mine, other = files_of(Path(coded.path)), files_of(again)
    # The root names the path, and digests hold the root's hash.
    different = {name for name in mine | other if mine.get(name) != other.get(name)}
    assert different == {"zarr.json", "digests/c/0"}


def test_the_fingerprint_knows_profile_and_error(
    spec: Path, coded: FeatureStore
) -> None:
    for change in (
        "features.vector_features.profile=faithful",
        "features.node_features.max_relative_error=1e-3",
    ):
        said = refusal(main, ["build", spec, "--device", "cpu", "--set", change])
        assert "was planned for another spec" in said
        assert "kd-cache add-field" in said
    done = run_command(main, ["build", spec, "--device", "cpu"])
    assert "complete and sealed" in done.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"node_features.dtype": "float16"}, "dtype is for profile faithful"),
        ({"vector_features.max_relative_error": 0.01}, "is for profile compact; the"),
        ({"per_atom_energy.profile": "q8"}, "for features with channels"),
        ({"node_features.max_relative_error": 2.0}, "node_features.max_relative_error"),
        ({"node_features.profile": "q9"}, "node_features.profile"),
    ],
)
def test_contradictory_profiles_are_refused(
    spec: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    settings = [f"--set=features.{key}={value}" for key, value in changes.items()]
    out = ["--out", tmp_path / "s.zarr"]
    assert words in refusal(main, ["build", spec, "--device", "cpu", *out, *settings])
    assert not (tmp_path / "s.zarr").exists()


def test_info_tells_profiles_errors_and_how_to_read(coded: FeatureStore) -> None:
    told = json.loads(run_command(main, ["info", coded.path, "--json"]).stdout)
    fields = told["splits"]["train"]["fields"]
    assert fields[NODE]["profile"] == "compact"
    assert "blosc-zstd" in fields[NODE]["codec"]
    assert fields[NODE]["relative_squared_error"] == coded.splits["train"].error(NODE)
    assert fields[VECTOR]["profile"] == "q8"
    assert fields[VECTOR]["codec"] == "bytes+crc32c"
    assert fields["labels/energy"]["relative_squared_error"] is None
    (advice,) = told["advice"]
    assert "split train: every read decodes chunks" in advice
    assert "kd-cache hydrate" in advice
    text = run_command(main, ["info", coded.path]).stdout
    assert "compact, relative squared error 1." in text
    assert advice in text
    plain = Path(coded.path).with_name("nothing.zarr")
    assert "is not a feature store" in refusal(main, ["info", plain])


def test_compact_and_back(small_store: FeatureStore, tmp_path: Path) -> None:
    small, large = tmp_path / "c.zarr", tmp_path / "h.zarr"
    exact = small_store.splits["train"]
    done = run_command(main, ["compact", small_store.path, small, "--error", "1e-3"])
    assert done.exit_code == 0
    assert done.stdout == f"{small}: complete and sealed.\n"
    compacted = FeatureStore.open(small)
    assert compacted.fingerprint != small_store.fingerprint
    assert compacted.attributes["made_from"]["fingerprint"] == small_store.fingerprint
    everyone = np.arange(len(exact))
    wanted = exact.read(everyone, list(exact.arrays))
    got = compacted.splits["train"].read(everyone, list(exact.arrays))
    for path in exact.arrays:
        if path in (NODE, VECTOR):
            error = relative(got[path], wanted[path], path == NODE)
            assert 5e-4 < error < 1.1e-3
        else:
            np.testing.assert_array_equal(got[path], wanted[path])
    assert verify_store(small) == []
    run_command(main, ["hydrate", small, large, "--dtype", "float32"])
    hydrated = FeatureStore.open(large)
    assert {*hydrated.splits["train"].arrays} == {*exact.arrays}
    back = hydrated.splits["train"].read(everyone, list(exact.arrays))
    for path, rows in got.items():
        np.testing.assert_array_equal(back[path], rows)
    errors = hydrated.attributes["made_from"]["relative_squared_error"]["train"]
    assert errors[VECTOR] == compacted.splits["train"].error(VECTOR)
    assert verify_store(large) == []


def test_processes_convert_as_one_does(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    alone, shared = tmp_path / "a.zarr", tmp_path / "b.zarr"
    for out, workers in ((alone, 0), (shared, 2)):
        flags = ["--workers", workers]
        done = run_command(main, ["compact", small_store.path, out, *flags])
        assert done.exit_code == 0, done.output
    files = [file.relative_to(alone) for file in alone.rglob("*") if file.is_file()]
    assert len(files) > 50
    for file in files:
        assert (shared / file).read_bytes() == (alone / file).read_bytes(), file


def test_one_field_of_a_mixed_store(coded: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "h.zarr"
    source = Path(coded.path)
    run_command(main, ["hydrate", source, out, "--field", "node_features"])
    split = FeatureStore.open(out).splits["train"]
    assert split.arrays[NODE].dtype == np.float16
    assert split.encoding(VECTOR).profile == "q8"
    # What is not converted is copied, its measured error with it.
    shards = {n for n in files_of(source) if n.startswith(f"train/{VECTOR}")}
    for name in shards:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert split.error(VECTOR) == coded.splits["train"].error(VECTOR)


def test_a_stopped_conversion_goes_on(
    coded: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.store.writer import StoreWriter

    whole, cut = tmp_path / "whole.zarr", tmp_path / "cut.zarr"
    run_command(main, ["hydrate", coded.path, whole])
    write, written = StoreWriter.write_block, []

    def stopping(*arguments: Any) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(arguments[1])
        write(*arguments)

    monkeypatch.setattr(StoreWriter, "write_block", stopping)
    run_command(main, ["hydrate", coded.path, cut])
    monkeypatch.undo()
    with pytest.raises(StoreError, match="lacks block"):
        FeatureStore.open(cut)
    run_command(main, ["hydrate", coded.path, cut])
    assert files_of(cut) == files_of(whole)


def test_conversions_that_make_no_sense(
    small_store: FeatureStore, coded: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "x.zarr"
    small = small_store.path
    for arguments, words in [
        (["hydrate", small, out, "--dtype", "float32"], "has no field to store as"),
        (["compact", small, out, "--field", "energy"], "'energy' is not a feature"),
        (["compact", small, out, "--error", "3"], "--error 3 must lie between 0 and"),
        (["compact", small, out, "--profile", "q8", "--error", "0.1"], "for profile"),
        (["compact", tmp_path / "none", out], "is not a feature store"),
        (["compact", small, coded.path], "was not made from"),
    ]:
        assert words in refusal(main, arguments)
        assert not out.exists()


def test_damage_in_the_source_stops_a_conversion(
    coded: FeatureStore, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(coded.path, tmp_path / "s.zarr"))
    shard = source / "train/structures/positions/c/1/0"
    content = bytearray(shard.read_bytes())
    content[9] ^= 1
    shard.write_bytes(content)
    out = tmp_path / "h.zarr"
    said = refusal(main, ["hydrate", source, out])
    assert "train/structures/positions/c/1/0 does not match its commit record" in said


def test_a_cluster_that_lives_on_opens_each_build_anew(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next plan may store other numbers for the same features."""
    store = tmp_path / "s.zarr"
    chosen = load_spec(spec, [f"store.path={store}"])
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        memory_limit=0,
        dashboard_address=None,
    ) as cluster:
        filling = FillOptions(scheduler=cluster.scheduler_address)
        assert build_store(chosen, filling=filling)
        first = FeatureStore.open(store)
        everyone = np.arange(len(first.splits["train"]))
        wanted = first.splits["train"].read(everyone, [NODE])[NODE]
        stored = files_of(store)
        shutil.rmtree(store)
        axes = calibration._principal_axes
        monkeypatch.setattr(calibration, "_principal_axes", lambda rows: -axes(rows))
        assert build_store(chosen, filling=filling)
    second = FeatureStore.open(store)
    assert second.fingerprint == first.fingerprint
    assert files_of(store) != stored
    got = second.splits["train"].read(everyone, [NODE])[NODE]
    assert relative(got, wanted, centered=True) < 5e-3
