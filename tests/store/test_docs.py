"""The Python of docs/store.md runs as it stands, on another store."""

import re
from pathlib import Path

from pipeline.store.reader import FeatureStore

PAGE = Path(__file__).parents[2] / "docs" / "store.md"


def test_the_examples_run(small_store: FeatureStore, capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("caches/demo.zarr", str(small_store.path)), names)
    said = capsys.readouterr().out
    assert f"{len(small_store.splits['train'])} " in said
    assert "'features/vector_features': (3, 16)" in said
    assert set(names["whole_block"]) == {"labels/energy"}
