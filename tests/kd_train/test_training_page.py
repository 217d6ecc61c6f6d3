"""docs/training.md names every setting, and nothing that is none."""

import re
from collections.abc import Iterator
from pathlib import Path

from kd_train.config.train_config import TrainConfig
from pipeline.spec.yaml_model import ClosedModel

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def _keys(model: type[ClosedModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, ClosedModel):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_setting_is_explained() -> None:
    named = set(re.findall(r"`([a-z0-9_.]+)(?:=[^`]*)?`", PAGE.read_text()))
    keys = set(_keys(TrainConfig))
    assert keys - named == set()
    sections = {key.split(".")[0] for key in keys if "." in key}
    dotted = {name for name in named if name.split(".")[0] in sections and "." in name}
    groups = {key.rsplit(".", 1)[0] for key in keys if "." in key}
    # Hyperparameters are free: those of the model.
    free = {name for name in dotted if name.startswith("student.hyperparameters.")}
    assert dotted - keys - groups - free - {"student.safetensors"} == set()
