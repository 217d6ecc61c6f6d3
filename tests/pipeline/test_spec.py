"""Specs: what they mean, what they refuse, and where their paths lead."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.documents import apply_overrides, expand_path, nearest, read_yaml
from pipeline.errors import SpecError
from pipeline.spec import CacheSpec, load_spec

MINIMAL: dict[str, Any] = {
    "splits": {"train": {"format": "extxyz", "path": "data.extxyz"}},
    "store": {"path": "store.zarr"},
}
TEACHER = {"model": "painn", "checkpoint": "teacher.pt"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("data.extxyz", "teacher.pt", "scales.json"):
        (tmp_path / name).touch()
    return tmp_path


def _load(folder: Path, document: Any, *overrides: str) -> CacheSpec:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(document))
    return load_spec(path, overrides)


def test_paths_are_relative_to_the_spec_not_to_the_caller(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    teacher = TEACHER | {"scale_file": "scales.json"}
    spec = _load(folder, MINIMAL | {"teacher": teacher})
    assert spec.splits["train"].path == str(folder / "data.extxyz")
    assert spec.store.path == str(folder / "store.zarr")
    assert spec.teacher is not None
    assert spec.teacher.checkpoint == str(folder / "teacher.pt")
    assert spec.teacher.scale_file == str(folder / "scales.json")


def test_absolute_home_and_variable_paths(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("WHERE", str(folder))
    monkeypatch.setenv("STEM", "data")
    for text in ("$WHERE/data.extxyz", "${WHERE}/${STEM}.extxyz", "~/data.extxyz"):
        document = MINIMAL | {"splits": {"a": {"format": "extxyz", "path": text}}}
        spec = _load(folder, document)
        assert spec.splits["a"].path == str(folder / "data.extxyz")


def test_defaults_are_those_of_the_documentation(folder: Path) -> None:
    document = MINIMAL | {"teacher": TEACHER, "features": {"node_features": None}}
    spec = _load(folder, document)
    assert spec.store.rows_per_block == 131072
    assert spec.store.seed == 0
    assert spec.splits["train"].features
    assert spec.splits["train"].reference_energies == "per_element"
    assert spec.teacher is not None
    assert spec.teacher.weights == "ema"
    assert spec.features["node_features"].dtype is None
    assert spec.features["node_features"].profile == "faithful"


def test_overrides_set_make_and_replace_keys(folder: Path) -> None:
    spec = _load(
        folder,
        MINIMAL,
        "splits.train.limit=7",
        "store.rows_per_block=2048",
        "teacher.model=painn",
        "teacher.checkpoint=teacher.pt",
        "features.node_features.dtype=float32",
    )
    assert spec.splits["train"].limit == 7
    assert spec.store.rows_per_block == 2048
    assert spec.features["node_features"].dtype == "float32"


def test_a_resolved_spec_survives_json(folder: Path) -> None:
    document = MINIMAL | {"teacher": TEACHER, "features": {"vector_features": None}}
    spec = _load(folder, document)
    assert CacheSpec.model_validate_json(spec.model_dump_json()) == spec


def _changed(**changes: Any) -> dict[str, Any]:
    return MINIMAL | changes


def _split(**changes: Any) -> dict[str, Any]:
    return _changed(splits={"train": MINIMAL["splits"]["train"] | changes})


REFUSED: list[tuple[Any, list[str]]] = [
    (_changed(splts=1), ["'splts'", "'splits'"]),
    (_split(limt=1), ["'splits.train.limt'", "'limit'"]),
    (_changed(store={"path": "s", "row_per_block": 2048}), ["'rows_per_block'"]),
    (
        _changed(teacher=TEACHER, features={"node_features": {"dtyp": 1}}),
        ["'features.node_features.dtyp'", "'dtype'"],
    ),
    (_changed(teacher=TEACHER | {"chekpoint": 1}), ["'teacher.chekpoint'"]),
    (
        _changed(teacher=TEACHER, features={"node_feature": {}}),
        ["'node_feature'", "'node_features'"],
    ),
    (_changed(features={"node_features": {}}), ["teacher:"]),
    (
        _changed(teacher=TEACHER, features={"node_features": {"dtype": "int8"}}),
        ["dtype", "'int8'"],
    ),
    (_changed(teacher=TEACHER, features=["node_features"]), ["features"]),
    ({"store": {"path": "s"}}, ["'splits'", "missing"]),
    ({"splits": MINIMAL["splits"]}, ["'store'", "missing"]),
    (_changed(splits={}), ["splits"]),
    (_changed(splits={"a b": MINIMAL["splits"]["train"]}), ["'a b'"]),
    (_changed(splits={"../up": MINIMAL["splits"]["train"]}), ["'../up'"]),
    (_changed(splits={1: MINIMAL["splits"]["train"]}), ["splits"]),
    (_split(format="xyz"), ["format", "'xyz'"]),
    (_split(limit=0), ["limit", "0"]),
    (_split(every=0), ["every", "0"]),
    (_split(offset=-1), ["offset", "-1"]),
    (_changed(store={"path": "s", "rows_per_block": 1500}), ["1024", "1500"]),
    (_changed(store={"path": "s", "rows_per_block": 0}), ["rows_per_block"]),
    (_split(path="absent.extxyz"), ["splits.train.path", "absent.extxyz", "--set"]),
    (
        _changed(teacher=TEACHER | {"checkpoint": "absent.pt"}),
        ["teacher.checkpoint", "absent.pt", "--set"],
    ),
    (
        _changed(teacher=TEACHER | {"scale_file": "absent.json"}),
        ["teacher.scale_file", "absent.json"],
    ),
    (_split(path="${NO_SUCH_PLACE}/x"), ["NO_SUCH_PLACE", "splits.train.path"]),
    (_changed(store={"path": "$NO_SUCH_PLACE/x"}), ["NO_SUCH_PLACE", "store.path"]),
    ("just text", ["mapping"]),
    (None, ["mapping"]),
]


@pytest.mark.parametrize(("document", "words"), REFUSED)
def test_wrong_specs_are_refused_in_one_line(
    document: Any, words: list[str], folder: Path
) -> None:
    with pytest.raises(SpecError) as error:
        _load(folder, document)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("splits: [", "not valid YAML"),
        ("a: 1\n\tb: 2", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: !thing 3", "not valid YAML"),
        ("", "mapping"),
    ],
)
def test_files_that_are_no_plain_mapping(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=words) as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="does not exist"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SpecError, match="not valid YAML"):
        read_yaml(tmp_path / "binary.yaml")
    with pytest.raises(SpecError, match=str(tmp_path)):
        read_yaml(tmp_path)


def test_overrides_that_fit_nowhere() -> None:
    for override in ("a", "=1", "a.b=1", "c=[1"):
        with pytest.raises(SpecError, match=r"--set"):
            apply_overrides({"a": 3}, [override])


def test_overrides_read_yaml_values() -> None:
    document: dict[str, Any] = {"empty": None}
    apply_overrides(document, ["n=3", "x=null", "t=a=b", "empty.k=[1, 2]", "z="])
    assert document == {
        "n": 3,
        "x": None,
        "t": "a=b",
        "empty": {"k": [1, 2]},
        "z": None,
    }


def test_nearest_offers_a_word_or_the_choice() -> None:
    assert nearest("stroe", ["store", "splits"]) == ", the nearest known one is 'store'"
    assert nearest("qqq", ["b", "a"]) == " (known: a, b)"
    assert nearest("x", []) == ""


def test_expanded_paths_name_the_missing_variable(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"k is '\$NO_SUCH_PLACE'.*export NO_SUCH"):
        expand_path("$NO_SUCH_PLACE", tmp_path, "k")
    assert expand_path("a/../b", tmp_path, "k") == tmp_path / "b"


def test_schema_describes_every_key() -> None:
    schema = CacheSpec.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"teacher", "splits", "features", "store"}
    json.dumps(schema)
