"""Student, adapters and normaliser of a run; refuses what a store cannot serve."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from kd_train.config import TrainConfig
from kd_train.strategies import REGISTRY, Strategy
from kd_train.strategies.base import Setting
from pipeline.documents import nearest
from pipeline.errors import SpecError
from pipeline.fields import FIELDS
from pipeline.models.network import Network
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import PRESETS, build_model
from pipeline.store.reader import FeatureStore, SplitReader


@dataclass(frozen=True)
class Learner:
    """The plain student, its training-only adapters, and the units it works in."""

    model_name: str
    student: Network
    strategies: tuple[Strategy, ...]
    adapters: nn.ModuleDict
    normalizer: Normalizer
    initial_digest: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Store fields that the strategies read, without repetition."""
        names = [name for s in self.strategies for name in s.fields]
        return tuple(dict.fromkeys(names))


def make_learner(config: TrainConfig, store: FeatureStore) -> Learner:
    """Build the student from its seed, then the adapters from a stream of their own.

    Raises
    ------
    SpecError
        The preset is unknown, or a strategy needs what store or student lack.
    """
    preset = config.student.preset
    if preset not in PRESETS:
        raise SpecError(f"Unknown student {preset!r}{nearest(preset, PRESETS)}.")
    split = chosen_split(store, config.train_split)
    name, hyperparameters = PRESETS[preset]
    torch.manual_seed(config.seed)
    student = build_model(name, hyperparameters | config.student.hyperparameters)
    normalizer = store_normalizer(store, config.train_split)
    setting = Setting(
        student_name=preset,
        student_widths=student.widths,
        teacher_widths=stored_widths(split),
        normalizer=normalizer,
        loss=config.loss,
        seed=config.seed,
    )
    strategies = tuple(REGISTRY[s](setting) for s in config.strategies)
    adapters = {s.name: s.adapter for s in strategies if s.adapter is not None}
    return Learner(
        name,
        student,
        strategies,
        nn.ModuleDict(adapters),
        normalizer,
        weights_digest(student),
    )


def chosen_split(store: FeatureStore, name: str) -> SplitReader:
    """Split ``name`` of the store; SpecError where there is none."""
    if name not in store.splits:
        known = ", ".join(store.splits)
        raise SpecError(f"The store has no split {name!r} (known: {known}).")
    return store.splits[name]


def stored_widths(split: SplitReader) -> dict[str, int]:
    """Width of every field a split holds; 0 for fields without channels."""
    return {
        name: split.arrays[field.path].shape[-1] if None in field.shape else 0
        for name, field in FIELDS.items()
        if field.path in split.arrays
    }


def store_normalizer(store: FeatureStore, split: str) -> Normalizer:
    """The teacher's normaliser, or that of the split's labels where no teacher ran.

    Baseline and distilled students of one store thus work in the same units.
    """
    teacher = store.attributes["teacher"]
    if teacher is not None:
        return Normalizer.from_dict(teacher["normalizer"])
    return Normalizer.from_dict(store.attributes["label_statistics"][split])


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters, to show that two runs started alike."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
