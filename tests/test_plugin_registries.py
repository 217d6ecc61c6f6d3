"""Plug-ins that are broken, taken twice, or named as something built in."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.config.sections import LossConfig, StudentConfig
from kd_train.config.train_config import TrainConfig
from kd_train.strategies import load_strategy
from kd_train.strategies.base import Setting
from kd_train.strategies.n2n import NodeToNode
from kd_train.trainer.objective import Objective
from kd_train.trainer.students import find_student
from pipeline.datasets.registry import format_of_suffix, load_reader
from pipeline.errors import SpecError
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import build_model
from pipeline.spec.sections import TeacherSpec
from pipeline.teachers.registry import load_potential
from tests.plugin_packages import install

Install = Callable[..., None]
STRATEGY = """
from kd_train.strategies import Strategy
class Good(Strategy):
    name, fields, default_weight = "good", ("node_features",), 2
    def counts(self, batch): ...
    def totals(self, output, batch): ...
class Other(Good):
    name = "other"
class Strange(Good):
    name, fields = "strange", ("charges",)
class Fieldless(Good):
    name, fields = "fieldless", "node_features"
class Negative(Good):
    name, default_weight = "negative", -1.0
class Loss(Good):
    name = "loss"
"""
READER = """
from pipeline.datasets.numbered import NumberedDataset
class Good(NumberedDataset):
    format, suffixes = "good", (".good",)
class Text(Good):
    format, suffixes = "text", ".good"
class Twin(Good):
    format = "twin"
"""
STUDENT = """
from pipeline.models.network import Network
from pipeline.models.students import StudentPreset
class Bare(Network):
    def __init__(self, width=3):
        super().__init__()
Good, Class = StudentPreset(Bare), StudentPreset(dict)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install packages for one test: module text, group, then its entry points."""

    def add(module: str, text: str, group: str, *points: str) -> None:
        lines = "\n".join([f"[{group}]", *points])
        folder = install(tmp_path / module, f"pkg-{module}", {module: text}, lines)
        monkeypatch.syspath_prepend(folder)

    load_strategy.cache_clear()
    load_reader.cache_clear()
    yield add
    load_strategy.cache_clear()
    load_reader.cache_clear()


def test_strategies_that_break_the_contract_are_refused(installed: Install) -> None:
    points = [
        "good=s1:Good",
        "named=s1:Other",
        "strange=s1:Strange",
        "text=s1:STRATEGY",
    ]
    points += ["fieldless=s1:Fieldless", "negative=s1:Negative", "loss=s1:Loss"]
    installed("s1", STRATEGY + "STRATEGY = 1", "kd_train.strategies", *points)
    assert TrainConfig(strategy="good+n2n").strategies == ("good", "n2n")
    assert load_strategy("good").default_weight == 2
    for name, words in {
        "named": "has name = 'other', not its entry point's",
        "strange": "reads the field 'charges', which no store has",
        "text": "is not a subclass of kd_train.strategies.Strategy",
        "fieldless": "needs fields, a tuple",
        "negative": "has default_weight = -1.0",
        "loss": "needs another name",
    }.items():
        with pytest.raises(SpecError, match=f"strategy '{name}' of the package pkg-s1"):
            load_strategy(name)
        with pytest.raises(SpecError, match=words):
            load_strategy(name)


def test_readers_that_break_the_contract_are_refused(installed: Install) -> None:
    points = ["good=r1:Good", "text=r1:Text", "named=r1:Twin", "none=r1:int"]
    installed("r1", READER + "int = int", "pipeline.datasets", *points)
    assert load_reader("good").suffixes == (".good",)
    for name, words in {
        "text": r"has suffixes = '.good', not a tuple",
        "named": "has format = 'twin', not its entry point's",
        "none": "is not a subclass of pipeline.datasets.base.IndexedDataset",
    }.items():
        with pytest.raises(SpecError, match=words):
            load_reader(name)


def test_a_suffix_of_two_plugins_tells_no_format(installed: Install) -> None:
    installed("r2", READER, "pipeline.datasets", "good=r2:Good")
    assert format_of_suffix(".good", plugins=True) == "good"
    assert format_of_suffix(".npz", plugins=True) is None
    installed("r3", READER, "pipeline.datasets", "twin=r3:Twin")
    assert format_of_suffix(".good", plugins=True) is None


def test_students_that_break_the_contract_are_refused(installed: Install) -> None:
    points = ["good=n1:Good", "class=n1:Class", "bare=n1:Bare"]
    installed("n1", STUDENT, "kd_train.students", *points)
    assert find_student(StudentConfig(preset="good")) == ("good", {})
    assert find_student(StudentConfig(model="good")) == ("good", {})
    with pytest.raises(SpecError, match="does not set the attribute 'graph_rule'"):
        build_model("good", {})
    with pytest.raises(SpecError, match=r"refuses its hyperparameters \(.*'depth'"):
        build_model("good", {"depth": 1})
    with pytest.raises(SpecError, match="has a model that is not a subclass"):
        find_student(StudentConfig(preset="class"))
    with pytest.raises(SpecError, match="'bare' of the package pkg-n1 is not a"):
        find_student(StudentConfig(preset="bare"))
    with pytest.raises(SpecError, match=r"Unknown student 'godo', .* 'good'"):
        find_student(StudentConfig(preset="godo"))
    with pytest.raises(SpecError, match=r"Unknown network 'pain', .* 'painn'"):
        find_student(StudentConfig(model="pain"))


LOADERS: dict[str, tuple[str, str, Callable[[str], object]]] = {
    "kd_train.strategies": ("strategy", "n2n", load_strategy),
    "kd_train.students": (
        "student",
        "painn-small",
        lambda name: find_student(StudentConfig(preset=name)),
    ),
    "pipeline.datasets": ("dataset format", "npz", load_reader),
    "pipeline.teachers": (
        "teacher",
        "schnet",
        lambda name: load_potential(TeacherSpec(model=name)),
    ),
}


@pytest.mark.parametrize("group", LOADERS)
def test_broken_shadowing_and_repeated_names_are_refused(
    installed: Install, group: str
) -> None:
    noun, built_in, load = LOADERS[group]
    points = ["broken=absent_module:X", "gone=p1:Gone", "two=p1:one"]
    installed("p1", "one = 1", group, *points, f"{built_in}=p1:one")
    for name, words in {
        "broken": "No module named 'absent_module'",
        "gone": "'Gone'",
    }.items():
        sentence = f"The {noun} '{name}' of the package pkg-p1 cannot be imported"
        with pytest.raises(SpecError, match=f"{sentence} .*{words}.*uninstall"):
            load(name)
    with pytest.raises(SpecError, match=f"pkg-p1 brings the {noun} '{built_in}', but"):
        load(built_in)
    installed("p2", "one = 2", group, "two=p2:one")
    with pytest.raises(SpecError, match=r"'two' has 2 entry points .*pkg-p1, pkg-p2"):
        load("two")


def test_sums_and_counts_need_the_shape_of_the_part_weights() -> None:
    class Wrong(NodeToNode):
        name = "wrong"

        def counts(self, batch: Data) -> Tensor:
            return super().counts(batch).reshape(())

    widths = {"node_features": 3}
    setting = Setting("a student", widths, widths, Normalizer(), LossConfig(), 0)
    objective = Objective(nn.ModuleDict(), [Wrong(setting)], "float32")
    with pytest.raises(SpecError, match=r"'wrong' gives .* of shape \(\); .* \(1,\)"):
        objective.counts(Data(node_features=torch.zeros(2, 3)))
