"""Stores that several jobs fill: shares of the blocks, and the three commands."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.build.part import BuildPart
from pipeline.cli.main import main
from pipeline.errors import SpecError
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import StoreWriter
from tests.commands import refusal, run_command


def _done(store: Path) -> dict[str, list[int]]:
    """Blocks that are written, by split."""
    writer = StoreWriter(store)
    return {
        name: sorted(set(range(index.n_blocks)) - set(writer.pending_blocks(name)))
        for name, index in writer.splits.items()
    }


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), of=st.integers(1, 50)
)
def test_parts_cover_every_block_once_and_evenly(sizes: list[int], of: int) -> None:
    n_blocks = {f"split{i}": size for i, size in enumerate(sizes)}
    shares = [
        [
            (split, block)
            for split, blocks in BuildPart(number, of).blocks(n_blocks).items()
            for block in blocks
        ]
        for number in range(1, of + 1)
    ]
    everything = [(split, b) for split, count in n_blocks.items() for b in range(count)]
    assert [item for share in shares for item in share] == everything
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_a_part_is_written_as_people_count() -> None:
    assert BuildPart.parse("3/32") == BuildPart(3, 32)
    for text in ("0/4", "5/4", "1/0", "3", "a/b", "-1/4", "1/4/2", "", "١/٢"):
        with pytest.raises(SpecError, match="3/32"):
            BuildPart.parse(text)


def test_parts_in_any_order_make_the_store_that_one_job_makes(
    small_spec: Path, small_store: FeatureStore, tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    common = (small_spec, "--out", store, "--device", "cpu")
    planned = run_command(main, ["plan", *common])
    assert planned.exit_code == 0
    assert f"{small_store.splits['train'].n_blocks} of train" in planned.stdout
    assert _done(store) == {"train": [], "val": []}

    for number in (2, 3, 1, 2):
        done = run_command(main, ["build", *common, "--part", f"{number}/3"])
        assert done.exit_code == 0
        assert "is not sealed" in done.stdout
        if number == 2:
            sizes = {n: s.n_blocks for n, s in small_store.splits.items()}
            mine = BuildPart(2, 3).blocks(sizes)
            assert all(
                set(mine[name]) <= set(has) for name, has in _done(store).items()
            )
    assert not StoreWriter(store).sealed
    assert "complete and sealed" in run_command(main, ["seal", store]).stdout
    assert run_command(main, ["seal", store]).exit_code == 0
    assert run_command(main, ["verify", store]).exit_code == 0
    assert run_command(main, ["build", *common, "--part", "1/3"]).exit_code == 0

    reference = small_store.path
    files = {f.relative_to(reference) for f in reference.rglob("*") if f.is_file()}
    assert files == {f.relative_to(store) for f in store.rglob("*") if f.is_file()}
    # The root says where the store was made, and a digest covers the root.
    for file in files - {Path("zarr.json"), Path("digests/c/0")}:
        assert (reference / file).read_bytes() == (store / file).read_bytes(), file


def test_a_part_touches_its_own_blocks_alone(small_spec: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    common = (small_spec, "--out", store, "--device", "cpu")
    run_command(main, ["plan", *common])
    run_command(main, ["build", *common, "--part", "1/2"])
    first = _done(store)
    n_blocks = {name: s.n_blocks for name, s in StoreWriter(store).splits.items()}
    mine = BuildPart(1, 2).blocks(n_blocks)
    assert first == {name: list(blocks) for name, blocks in mine.items()}
    # Damage outside of a part is left to whoever has that part.
    damaged = store / "train/features/node_features/c/0/0"
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    run_command(main, ["build", *common, "--part", "2/2"])
    assert 0 in _done(store)["train"]
    assert "was discarded" in refusal(main, ["seal", store])
    assert 0 not in _done(store)["train"]
    run_command(main, ["build", *common, "--part", "1/2"])
    assert run_command(main, ["seal", store]).exit_code == 0
    assert run_command(main, ["verify", store]).exit_code == 0


def test_refusals(small_spec: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    common = (small_spec, "--out", store, "--device", "cpu")
    part = ("--part", "1/2")
    assert "kd-cache plan SPEC" in refusal(main, ["build", *common, *part])
    assert "3/32" in refusal(main, ["build", *common, "--part", "3/2"])
    for more in (("--blocks", "0:1"), ("--done-file", tmp_path / "r.json")):
        refused = run_command(main, ["build", *common, *part, *more])
        assert refused.exit_code == 2
        assert more[0] in refused.stderr
    run_command(main, ["plan", *common, "--workers", 1])
    other = ("--set", "store.seed=5")
    assert "another spec" in refusal(main, ["build", *common, *part, *other])
    run_command(main, ["build", *common, *part])
    assert "lacks block" in refusal(main, ["seal", store])
    assert "not a feature store" in refusal(main, ["seal", tmp_path / "none.zarr"])


def test_the_table_of_fields_agrees_with_the_description(
    small_store: FeatureStore,
) -> None:
    table = run_command(main, ["info", small_store.path, "--csv"]).stdout.splitlines()
    told = json.loads(run_command(main, ["info", small_store.path, "--json"]).stdout)
    names = table[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in table[1:]]
    assert {(row["split"], row["field"]) for row in rows} == {
        (name, path)
        for name, split in told["splits"].items()
        for path in split["fields"]
    }
    row = next(r for r in rows if r["field"] == "features/vector_features")
    atoms = int(row["atoms"])
    assert row["shape"] == "N×3×16"
    assert int(row["bytes"]) == atoms * 3 * 16 * 4
