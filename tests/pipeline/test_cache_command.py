"""``kd-cache`` as it is typed: building, looking, checking, and every refusal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.build.build import build_store
from pipeline.build.worker import FillOptions
from pipeline.cli.main import main
from pipeline.models.checkpoint import save_model
from pipeline.models.zoo import build_model
from pipeline.spec.cache_spec import load_spec
from pipeline.store.reader import FeatureStore
from tests.commands import refusal, run_command
from tests.frames import collision_frames, frame, write_frames
from tests.stores import (
    STUDENTS,
    save_teacher,
    spec_document,
    teacher_normalizer,
    write_spec,
)


@pytest.fixture
def document(
    tmp_path: Path, collisions: Callable[..., Path], teacher_file: Path
) -> dict[str, Any]:
    """A sound spec of five samples; tests break it."""
    return spec_document({"train": collisions(5)}, tmp_path / "s.zarr", teacher_file)


def _refused(tmp_path: Path, document: dict[str, Any], *more: object) -> str:
    spec = write_spec(tmp_path / "spec.yaml", document)
    return refusal(main, ["build", spec, "--device", "cpu", *more])


def _with_data(document: dict[str, Any], path: Path) -> dict[str, Any]:
    splits = {"train": {"format": "extxyz", "path": str(path)}}
    return document | {"splits": splits}


def _without_teacher(document: dict[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in ("splits", "store")}


def test_builds_tells_and_writes_a_receipt(
    document: dict[str, Any], tmp_path: Path
) -> None:
    spec = write_spec(tmp_path / "spec.yaml", document)
    receipt = tmp_path / "deep" / "receipt.json"
    arguments = ["build", spec, "--device", "cpu", "--receipt", receipt]
    done = run_command(main, arguments)
    assert done.exit_code == 0
    head, row, _, passes, last = done.stdout.splitlines()
    assert head.split()[:4] == ["split", "frames", "energy", "forces"]
    assert row.split() == ["train", *"555", "none", *"HCO", "0"]
    assert passes == "teacher passes of train: 5 for labels and features"
    assert last == f"{tmp_path / 's.zarr'}: complete and sealed."
    store = FeatureStore.open(tmp_path / "s.zarr")
    kept = json.loads(receipt.read_text())
    assert kept["fingerprint"] == store.fingerprint
    assert kept["complete"] is True
    assert "1 blocks to do" in (tmp_path / "s.zarr.log").read_text()
    again = run_command(main, arguments)
    assert again.exit_code == 0
    assert json.loads(receipt.read_text()) == kept


def test_out_and_set_override_the_spec(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = write_spec(tmp_path / "spec.yaml", document)
    more = ["--out", "here.zarr", "--set", "splits.train.limit=2"]
    done = run_command(main, ["build", spec, "--device", "cpu", *more])
    assert done.exit_code == 0
    assert len(FeatureStore.open(tmp_path / "here.zarr").splits["train"]) == 2
    assert not (tmp_path / "s.zarr").exists()


def test_empty_folders_are_used(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B7, A13: a folder made ahead, whose name would be a comment in YAML."""
    monkeypatch.chdir(tmp_path)
    spec = write_spec(tmp_path / "a spec #1.yaml", document)
    store, small = Path("run #2.zarr"), Path("it's small: q8.zarr")
    for folder in (store, small, Path("labels #3"), Path("pushed #4.zarr")):
        folder.mkdir()
    on_cpu = ["--device", "cpu"]
    done = run_command(main, ["build", spec, "--out", store, *on_cpu])
    assert done.stdout.endswith(f"{tmp_path / store}: complete and sealed.\n")
    again = run_command(main, ["build", spec, "--out", store, *on_cpu])
    assert again.stdout == done.stdout
    run_command(main, ["compact", store, small, "--profile", "q8"])
    assert run_command(main, ["verify", small]).exit_code == 0
    run_command(main, ["label", spec, "--out", "labels #3", *on_cpu])
    assert (tmp_path / "labels #3" / "train.extxyz").is_file()
    run_command(main, ["push", store, "pushed #4.zarr"])
    assert run_command(main, ["verify", "pushed #4.zarr"]).exit_code == 0
    made = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert "run" not in made
    assert "it" not in made
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert "mine is not a feature store" in refusal(
        main, ["build", spec, "--out", "mine", *on_cpu]
    )


def test_an_offset_past_the_end_is_named(
    document: dict[str, Any], tmp_path: Path
) -> None:
    """B10: it read as if the file were empty."""
    told = _refused(tmp_path, document, "--set", "splits.train.offset=5")
    assert told.endswith("has no sample left after offset=5; lower the offset.")


def test_ranges_of_blocks_leave_the_store_open(
    small_spec: Path, tmp_path: Path
) -> None:
    store = tmp_path / "part.zarr"
    arguments = ["build", small_spec, "--out", store, "--device", "cpu"]
    receipt = tmp_path / "receipt.json"
    part = run_command(main, [*arguments, "--blocks", "0:1", "--receipt", receipt])
    assert part.exit_code == 0
    assert "still missing" in part.stdout
    assert not receipt.exists()
    told = json.loads(run_command(main, ["info", store, "--json"]).stdout)
    assert told["complete"] is False
    assert told["splits"]["train"]["blocks_done"] == 1
    assert "NOT complete" in run_command(main, ["info", store]).stdout
    check = run_command(main, ["verify", store])
    assert check.exit_code == 1
    assert "is not sealed" in check.stderr
    rest = run_command(main, arguments)
    assert "complete and sealed" in rest.stdout
    assert run_command(main, ["verify", store]).exit_code == 0


def test_info_tells_fields_samples_and_fingerprint(small_store: FeatureStore) -> None:
    told = json.loads(run_command(main, ["info", small_store.path, "--json"]).stdout)
    assert told["fingerprint"] == small_store.fingerprint
    assert told["complete"] is True
    assert told["teacher"]["model"] == "painn"
    train = told["splits"]["train"]
    split = small_store.splits["train"]
    assert train["samples"] == len(split) == 160
    assert train["atoms"] == int(split.n_atoms.sum())
    assert train["blocks"] == train["blocks_done"] == split.n_blocks
    assert train["fields"].keys() == split.arrays.keys()
    vectors = train["fields"]["features/vector_features"]
    assert vectors["shape"] == ["N", 3, 16]
    assert vectors["dtype"] == "float32"
    per_sample = 3 * 16 * 4 * train["atoms"] / train["samples"]
    assert vectors["bytes_per_sample"] == pytest.approx(per_sample)
    assert train["fields"]["labels/energy"]["bytes_per_sample"] == 8
    text = run_command(main, ["info", small_store.path]).stdout
    for word in (small_store.fingerprint, "160 samples", "features/vector_features"):
        assert word in text


def test_info_of_a_labels_store(labels_store: FeatureStore) -> None:
    told = json.loads(run_command(main, ["info", labels_store.path, "--json"]).stdout)
    assert told["teacher"] is None
    text = run_command(main, ["info", labels_store.path]).stdout
    assert "labels only" in text


def test_verify_finds_a_flipped_byte_and_repair_makes_it_good(
    small_store: FeatureStore, small_spec: Path, tmp_path: Path
) -> None:
    store = tmp_path / "copy.zarr"
    shutil.copytree(small_store.path, store)
    sound = run_command(main, ["verify", store])
    assert sound.exit_code == 0
    assert "nothing damaged" in sound.stdout
    shard = store / "train" / "teacher" / "forces" / "c" / "2" / "0"
    before = shard.read_bytes()
    content = bytearray(before)
    content[17] ^= 32
    shard.write_bytes(content)
    found = run_command(main, ["verify", store])
    assert found.exit_code == 1
    assert str(shard) in found.stderr
    assert shard.read_bytes() == content
    repaired = run_command(main, ["verify", store, "--repair"])
    assert repaired.exit_code == 1
    assert "1 damaged block" in repaired.stderr
    build = ["build", small_spec, "--out", store, "--device", "cpu"]
    assert run_command(main, build).exit_code == 0
    assert shard.read_bytes() == before
    assert run_command(main, ["verify", store]).exit_code == 0


def test_verify_repair_of_metadata_says_that_it_cannot(
    labels_store: FeatureStore, tmp_path: Path
) -> None:
    store = tmp_path / "copy.zarr"
    shutil.copytree(labels_store.path, store)
    (store / "val" / "index" / "n_atoms" / "c" / "0").unlink()
    done = run_command(main, ["verify", store, "--repair"])
    assert done.exit_code == 1
    assert "build the store again" in done.stderr


@pytest.mark.parametrize("command", ["info", "verify"])
def test_places_without_a_store_are_refused(command: str, tmp_path: Path) -> None:
    assert "not a feature store" in refusal(main, [command, tmp_path / "absent"])
    assert "not a feature store" in refusal(main, [command, tmp_path])


def test_schema_prints_json_that_names_every_key() -> None:
    schema = json.loads(run_command(main, ["schema"]).stdout)
    assert schema["required"] == ["splits", "store"]
    definitions = schema["$defs"]
    assert "batch_atoms" in definitions["TeacherSpec"]["properties"]
    assert "reference_energies" in definitions["SplitSpec"]["properties"]
    assert definitions["StoreSpec"]["additionalProperties"] is False


def test_unknown_keys_come_with_the_nearest_known(
    document: dict[str, Any], tmp_path: Path
) -> None:
    wrong = document | {"featurs": document["features"]}
    sentence = _refused(tmp_path, wrong)
    assert "'featurs'" in sentence
    assert "'features'" in sentence
    assert str(tmp_path / "spec.yaml") in sentence


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "garbage"], "--set 'garbage'"),
        (["--set", "teacher.checkpoint=absent.pt"], "absent.pt does not exist"),
        (["--set", "splits.train.path=absent.xyz"], "absent.xyz does not exist"),
        (["--set", "splits.train.path=$NO_SUCH_PLACE/x"], "NO_SUCH_PLACE is not set"),
        (["--set", "splits.train.path=spec.yaml"], "cannot be read as extended XYZ"),
        (["--set", "teacher.checkpoint=."], "there is no checkpoint file"),
        (["--set", "features.edge_features={}"], "'edge_features'"),
        (["--set", "teacher.model=schnet"], "teacher.model"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_bad_values_are_one_sentence(
    more: list[str], words: str, document: dict[str, Any], tmp_path: Path
) -> None:
    assert words.lower() in _refused(tmp_path, document, *more).lower()
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--workers", "-1"],
        ["--workers", "some"],
        ["--blocks", "1"],
        ["--blocks", "3:1"],
        ["--blocks", "²:3"],
        ["--threads", "0"],
    ],
)
def test_options_out_of_range_are_refused(
    more: list[str], document: dict[str, Any], tmp_path: Path
) -> None:
    spec = write_spec(tmp_path / "spec.yaml", document)
    done = run_command(main, ["build", spec, *more])
    assert done.exit_code == 2
    assert more[0] in done.stderr
    assert not (tmp_path / "s.zarr").exists()


def test_specs_that_are_no_files_are_refused(tmp_path: Path) -> None:
    absent = tmp_path / "absent.yaml"
    assert f"{absent} does not exist" in refusal(main, ["build", absent])
    assert str(tmp_path) in refusal(main, ["build", tmp_path])


def test_relative_paths_keep_their_case_in_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "absent.yaml does not exist" in refusal(main, ["build", "absent.yaml"])


def test_yaml_tags_are_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"splits: !!python/object/apply:os.mkdir [{trace}]\n")
    assert "not valid YAML" in refusal(main, ["build", spec])
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(spec.read_text())
    assert not trace.exists()


def test_broken_datasets_are_named(document: dict[str, Any], tmp_path: Path) -> None:
    packed = write_frames(tmp_path / "cut.extxyz.xz", collision_frames(4))
    packed.write_bytes(packed.read_bytes()[:-40])
    assert str(packed) in _refused(tmp_path, _with_data(document, packed))
    frames = [*collision_frames(3), *collision_frames(2)]
    twice = write_frames(tmp_path / "twice.extxyz", frames)
    sentence = _refused(tmp_path, _with_data(document, twice))
    assert "samples 0 and 3 share the id" in sentence
    empty = write_frames(tmp_path / "empty.extxyz", [])
    assert "no samples" in _refused(tmp_path, _with_data(document, empty))
    assert not (tmp_path / "s.zarr").exists()


def test_samples_the_teacher_cannot_take_are_named(
    document: dict[str, Any], tmp_path: Path
) -> None:
    alone = frame("alone", ["H"], [[0, 0, 0]], energy=-13.0)
    data = write_frames(tmp_path / "alone.extxyz", [*collision_frames(3), alone])
    assert "'alone' has no neighbours" in _refused(tmp_path, _with_data(document, data))
    heavy = frame("heavy", ["U", "H"], [[0, 0, 0], [1, 0, 0]], energy=-13.0)
    data = write_frames(tmp_path / "heavy.extxyz", [*collision_frames(3), heavy])
    wrong = _with_data(document, data)
    wrong["store"] = wrong["store"] | {"path": str(tmp_path / "other.zarr")}
    sentence = _refused(tmp_path, wrong)
    assert "'heavy' holds an atom with atomic number 92" in sentence


def test_worker_processes_refuse_in_one_sentence_too(
    document: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = frame("alone", ["H"], [[0, 0, 0]], energy=-13.0)
    data = write_frames(tmp_path / "alone.extxyz", [alone])
    sentence = _refused(tmp_path, _with_data(document, data), "--workers", 1)
    assert "'alone' has no neighbours" in sentence
    assert "Traceback" not in capfd.readouterr().err


def test_labels_may_hold_isolated_atoms(
    document: dict[str, Any], tmp_path: Path
) -> None:
    alone = frame("alone", ["U"], [[0, 0, 0]], energy=-13.0)
    data = write_frames(tmp_path / "alone.extxyz", [alone])
    labels = _without_teacher(_with_data(document, data))
    spec = write_spec(tmp_path / "spec.yaml", labels)
    assert run_command(main, ["build", spec]).exit_code == 0


def test_teachers_that_cannot_be_used_are_refused(
    document: dict[str, Any], tmp_path: Path
) -> None:
    def refused(path: Path) -> str:
        wrong = document | {"teacher": {"model": "painn", "checkpoint": str(path)}}
        sentence = _refused(tmp_path, wrong)
        assert str(path) in sentence
        return sentence

    other = tmp_path / "schnet.safetensors"
    model = build_model("schnet", STUDENTS["schnet-demo"])
    save_model(other, "schnet", model, teacher_normalizer(), {})
    assert "holds a schnet" in refused(other)

    broken = save_teacher(tmp_path / "nan.safetensors")
    with safe_open(broken, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(broken)
    tensors["out_energy.0.bias"][3] = torch.nan
    save_file(tensors, broken, metadata=metadata)
    assert "not finite" in refused(broken)

    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    refused(foreign)
    torn = tmp_path / "torn.pt"
    torn.write_bytes(b"PK\x03\x04 torn")
    refused(torn)
    assert not (tmp_path / "s.zarr").exists()


def test_numbers_that_overflow_are_refused(
    document: dict[str, Any], tmp_path: Path
) -> None:
    """Finite weights whose features are infinite: caught when a block is written."""
    teacher = save_teacher(tmp_path / "huge.safetensors")
    with safe_open(teacher, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(teacher)
    tensors["upd_out_scalar_scale_1.scale_factor"] *= 1e38
    save_file(tensors, teacher, metadata=metadata)
    wrong = document | {"teacher": {"model": "painn", "checkpoint": str(teacher)}}
    sentence = _refused(tmp_path, wrong)
    assert "NaN or infinite value" in sentence
    assert "Sample 't0" in sentence


def test_store_of_another_spec_is_refused(
    small_spec: Path, small_store: FeatureStore
) -> None:
    sentence = refusal(
        main, ["build", small_spec, "--device", "cpu", "--set", "store.seed=3"]
    )
    assert small_store.fingerprint[:12] in sentence


@pytest.mark.parametrize("place", ["file", "file/below.zarr", "full"])
def test_places_that_hold_something_else_are_left_alone(
    place: str, document: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    sentence = _refused(tmp_path, document, "--out", tmp_path / place)
    assert str(tmp_path / "f") in sentence
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "full" / "mine").read_text() == "mine"


def test_two_builds_do_not_fight_over_a_block(small_spec: Path, tmp_path: Path) -> None:
    from pipeline.store.writer import StoreWriter

    store = tmp_path / "s.zarr"
    spec = load_spec(small_spec, [f"store.path={store}"])
    assert not build_store(spec, filling=FillOptions(blocks=(7, 8)))
    with StoreWriter(store).claim_block("train", 1) as missing:
        assert missing
        sentence = refusal(
            main, ["build", small_spec, "--out", store, "--device", "cpu"]
        )
    assert "Block 1 of split 'train'" in sentence
    assert "another process" in sentence
