"""Specs: what they mean, what they refuse, and where their paths lead."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import SpecError
from pipeline.spec.cache_spec import CacheSpec, load_spec
from pipeline.spec.plain_yaml import yaml_text
from pipeline.spec.yaml_model import apply_overrides, expand_path, nearest, read_yaml

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
        ("a: !!int abc", "not valid YAML.*'abc'|abc is not a readable number"),
        ("a: " + 6000 * "[", "not valid YAML"),
        ("a: " + 6000 * "9", "not valid YAML.*not a readable number"),
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


VALUES = [
    ("a #b", "a #b"),
    ("p/run #2.zarr", "p/run #2.zarr"),
    ("a: b", "a: b"),
    ("*.xyz", "*.xyz"),
    ("'1'", "1"),
    ("[a, 1e1]", ["a", 10.0]),
    ("1e1", 10.0),
    ("1_000", 1000),
    ("-.5", -0.5),
    ("010", "010"),
    ("1:30", "1:30"),
    ("0x10", "0x10"),
    ("no", "no"),
    ("on", "on"),
    ("2024-01-01", "2024-01-01"),
    ("true", True),
    ("~", None),
    ("<<", "<<"),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_values_are_taken_as_they_are(text: str, value: Any) -> None:
    """A13, A18, B10: no comments in --set, and decimal numbers alone are numbers."""
    document: dict[str, Any] = {}
    apply_overrides(document, [f"k={text}"])
    assert document == {"k": value}
    assert type(document["k"]) is type(value)


@pytest.mark.parametrize("text", ["[1] #c", '"a" b', "'a", "{a: 1, a: 2}"])
def test_values_with_something_behind_them(text: str) -> None:
    with pytest.raises(SpecError, match=r"^--set '?\"?k="):
        apply_overrides({}, [f"k={text}"])


@pytest.mark.parametrize("value", [value for _, value in VALUES])
def test_what_is_written_reads_back(value: Any, tmp_path: Path) -> None:
    document = {"k": value, "l": [value, {"m": value}]}
    (tmp_path / "d.yaml").write_text(yaml_text(document))
    assert read_yaml(tmp_path / "d.yaml") == document
    assert yaml.safe_load(yaml_text(document)) == document


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nsplits:\n  b: 1\n  b: 2\n", "key 'b' is in lines 3 and 4"),
        ("a: 1\n'a': 2\n", "key 'a' is in lines 1 and 2"),
        ("a: [{b: 1, b: 1}]\n", "key 'b' is in lines 1 and 1"),
        ("{x: 1,\n x: 2}", "key 'x' is in lines 1 and 2"),
    ],
)
def test_a_key_twice_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """A17: the last one no longer wins."""
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=f"^{path}: the {words}; remove one of the two"):
        read_yaml(path)


def test_merged_keys_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\n")
    assert read_yaml(path)["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "splits.train.limit=true",
            "limit.*must be a plain decimal number, found True",
        ),
        (
            "splits.train.limit=010",
            "limit.*must be a plain decimal number, found '010'",
        ),
        (
            "splits.train.every=1:30",
            "every.*must be a plain decimal number, found '1:30'",
        ),
        (
            "splits.train.offset='3'",
            "offset.*must be a plain decimal number, found '3'",
        ),
        ("store.seed=10000000000000000000000", "store.seed.*too large"),
        ("store.path=12", "store.path: the value must be text, so put it in quotes"),
        ("splits.train.path=~nobody_here/x", "splits.train.path.*this home folder"),
    ],
)
def test_what_is_no_number_is_refused(folder: Path, override: str, words: str) -> None:
    """A18, B11: booleans, octal and sexagesimal numbers, and 20 digits of a seed."""
    with pytest.raises(SpecError, match=words):
        _load(folder, MINIMAL, override)


def test_names_that_yaml_1_1_takes_for_booleans(folder: Path) -> None:
    """B10: a split called no."""
    text = "splits: {no: {format: extxyz, path: data.extxyz}}\nstore: {path: 'on'}\n"
    (folder / "s.yaml").write_text(text)
    assert list(load_spec(folder / "s.yaml").splits) == ["no"]


def test_the_place_of_a_store_is_taken_as_it_is(folder: Path) -> None:
    """A13: --out knows no comments, variables or home folders."""
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"store": {"path": "$NO_SUCH_PLACE"}}))
    for name in ("run #2.zarr", "a: b", "$HOME", "~", "010", "no", " x "):
        spec = load_spec(path, (), folder / name)
        assert spec.store.path == str(folder / name)
    path.write_text(yaml.safe_dump({"splits": MINIMAL["splits"]}))
    assert load_spec(path, (), folder / "s").store.path == str(folder / "s")


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
