"""YAML as users write it: anchors, merges, underscores, tabs, halves of characters."""

from pathlib import Path

import pytest

from kd_train.config.train_config import TrainConfig
from pipeline.errors import SpecError
from pipeline.spec.plain_yaml import parse_yaml
from pipeline.spec.yaml_model import apply_overrides, read_yaml, validate

LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]" for i in range(1, 12)]
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("b: &b {lr: 1}\nc: {<<: *b, lr: 3}", {"b": {"lr": 1}, "c": {"lr": 3}}),
        # The earlier of a list counts, however the keys are spelled.
        ("c: {<<: [{rate: 1, eps: 3}, {rate: 2}]}", {"c": {"rate": 1, "eps": 3}}),
        # What is merged elsewhere has a merge of its own, and is made only later.
        (
            "a: {b: {c: &c {<<: {rate: 1}, rate: 2}}}\nz: {<<: *c}",
            {"a": {"b": {"c": {"rate": 2}}}, "z": {"rate": 2}},
        ),
    ],
)
def test_merges(text: str, value: object) -> None:
    """A17: an overridden key is not there twice, and the right one counts."""
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {<<: {k: 1}, <<: {k: 2}}", "key '<<' is in lines 1 and 1"),
        ("a: {<<: 3}", "line 1, column 9: << merges mappings only"),
        ("a: &a [*a]", "an alias stands inside what it stands for"),
        ("a: &a {<<: *a}", "an alias stands inside what it stands for"),
        (LAUGHS, "its aliases stand for too much"),
        ("? [a]\n: b", "a list or map cannot be a key"),
        ("a:\t1", "line 1, column 3: .*use spaces"),
        ("a: x: y", "line 1, column 5: .*in quotes"),
        ("a: @x", "line 1, column 4: .*in quotes"),
        ('a: "\\ud800"', "half a character"),
        ("a: !!bool yes", "yes is not a readable boolean"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=rf"c\.yaml.*{words}") as error:
        read_yaml(path)
    assert "unicode string" not in str(error.value)


@pytest.mark.parametrize("text", ["1_", "1__0", "1_e5", "1._5"])
def test_underscores_stand_between_digits(text: str) -> None:
    """A18: other text is no number."""
    assert parse_yaml(f"a: {text}") == {"a": text}
    assert parse_yaml("a: 1_000.2_5") == {"a": 1000.25}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compile=on", "compile: must be true or false, found 'on'"),
        ("compile=1", "compile: must be true or false, found 1"),
        ("optimizer.amsgrad='true'", "amsgrad: must be true or false"),
        ("optimizer=", "found nothing .null.; leave the key out for its default"),
        ("student=schnet", "student: must be a map of keys, found 'schnet'"),
        ("schedule.milestones=5", "milestones: must be a list, found 5"),
        (f"steps={'9' * 4000}", "9{200}…[.]$"),
    ],
)
def test_values_of_the_wrong_kind(override: str, words: str) -> None:
    """A18: `yes`, `on` and 1 are no booleans; sentences name the kind that is."""
    document: dict[str, object] = {}
    apply_overrides(document, [override])
    with pytest.raises(SpecError, match=words):
        validate(TrainConfig, document, "c.yaml")


@pytest.mark.parametrize("override", [".a=1", "a.=1", "a..b=1"])
def test_empty_keys_are_refused(override: str) -> None:
    with pytest.raises(SpecError, match=r"must look like key\.subkey=value"):
        apply_overrides({}, [override])


@pytest.mark.parametrize("text", ["[" * 3000, "\udcff", '"a": 1', '"\\ud800"'])
def test_values_of_flags_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SpecError, match=r"^--set 'k=.{,400}$"):
        apply_overrides({}, [f"k={text}"])
