"""What users import, and the page that shows it."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.store.reader import FeatureStore
from tests.stores import STUDENTS

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


@pytest.mark.parametrize("package", ["pipeline", "kd_train", "pipeline.teachers"])
def test_public_names_are_there(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert {*module.__all__} <= {*dir(module)}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense


def test_versions_are_those_of_the_distribution() -> None:
    import kd_train
    import pipeline

    assert pipeline.__version__ == kd_train.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", pipeline.__version__)
    for package in (pipeline, kd_train):
        assert (Path(package.__file__).parent / "py.typed").exists()


def test_importing_the_packages_imports_no_torch() -> None:
    code = "import sys, pipeline, kd_train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_page_works(
    small_store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of docs/api.md, one block after the other, on a small store."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "caches").mkdir()
    (tmp_path / "caches" / "demo.zarr").symlink_to(small_store.path)
    sizes = STUDENTS["painn-small-demo"]
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) >= 4
    for block in blocks:
        # The networks and runs of the page are too large for a test.
        small = block.replace(
            '{"preset": "painn-small-demo"}',
            f'{{"preset": "painn-small-demo", "hyperparameters": {sizes}}}',
        )
        small = re.sub(r"steps=\d+", "steps=4, batch_size=8, eval_every=2", small)
        exec(compile(small, str(PAGE), "exec"), names)
    assert (tmp_path / "runs" / "v2v" / "student.safetensors").exists()
