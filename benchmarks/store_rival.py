"""nvalchemi-toolkit on the same samples, through its public interface.

    VENV/bin/python benchmarks/store_rival.py FOLDER N_SAMPLES

Started by `store.py --rival-python`. Reads a JSON object a line, answers with one.
It writes as its labelling does: 32 samples a call, first ``write``, then ``append``,
without a configuration. *default* reads with validation and its default window of two
batches, *tuned* without and with sixteen, as its guide on performance says.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvalchemi.data import AtomicData, Batch
from nvalchemi.data.datapipes import AtomicDataZarrReader, DataLoader, Dataset
from nvalchemi.data.datapipes.backends.zarr import AtomicDataZarrWriter
from stores.data import Arrays, Indices, Samples, columns, shuffled_batches
from stores.timing import Stopwatch, files_of

BATCH = 32
FIELDS = ("node_features", "vector_features")
MODES = {
    "default": {"skip_validation": False, "prefetch_factor": 2},
    "tuned": {"skip_validation": True, "prefetch_factor": 16},
}


class Order:
    """Sampler of a fixed order."""

    def __init__(self, batches: list[Indices]) -> None:
        self._order = np.concatenate(batches).tolist()

    def __iter__(self) -> Any:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


def as_batch(indices: Indices, part: Arrays, samples: Samples) -> Batch:
    """Its batch of structures with the features added, as a teacher's scorer does."""
    counts = samples.n_atoms[indices].tolist()
    rows = {
        path: torch.from_numpy(a) for path, a in part.items() if "labels" not in path
    }
    split = {path: values.split(counts) for path, values in rows.items()}
    data = [
        AtomicData(
            positions=position.float(),
            atomic_numbers=number.long(),
            energy=torch.tensor([[energy]], dtype=torch.float32),
        )
        for position, number, energy in zip(
            split["structures/positions"],
            split["structures/atomic_numbers"],
            part["labels/energy"].tolist(),
            strict=True,
        )
    ]
    batch = Batch.from_data_list(data)
    for name in FIELDS:
        batch.add_key(name, list(split[f"features/{name}"]), level="node")
    return batch


def write(store: Path, samples: Samples) -> dict[str, Any]:
    """Label: making the samples and its batches is not counted."""
    writer = AtomicDataZarrWriter(store)
    batches = (as_batch(i, part, samples) for i, part in samples.parts(BATCH))
    watch = Stopwatch()
    for number, batch in enumerate(watch.outside(batches)):
        (writer.append if number else writer.write)(batch)
    os.sync()
    watch.pause()
    files = files_of(store)
    size = sum(file.stat().st_blocks * 512 for file in files)
    return {
        **cost(watch, len(samples), samples.n_bytes),
        "files": len(files),
        "ratio": size / samples.n_bytes,
    }


def read(store: Path, samples: Samples, mode: str, n_batches: int) -> dict[str, Any]:
    """Read shuffled batches; opening the store is not counted."""
    batches = shuffled_batches(len(samples), BATCH, n_batches, seed=n_batches)
    loader = open_loader(store, batches, **MODES[mode])
    watch = Stopwatch()
    count = sum(batch.num_graphs for batch in loader)
    watch.pause()
    return cost(watch, count, sum(samples.bytes_of(batch) for batch in batches))


def check(store: Path, samples: Samples) -> dict[str, Any]:
    """Compare features with the samples; says the dtypes of its tuned reads."""
    batches = shuffled_batches(len(samples), BATCH, 4, seed=99)
    kept = set()
    for indices, batch in zip(
        batches, open_loader(store, batches, **MODES["tuned"]), strict=True
    ):
        expected = samples.take(indices)
        for name in FIELDS:
            found = getattr(batch, name)
            kept.add(f"{name} as {str(found.dtype).removeprefix('torch.')}")
            rows = found.numpy().astype(np.float16)
            np.testing.assert_array_equal(rows, expected[f"features/{name}"])
    return {"dtypes": sorted(kept)}


def open_loader(
    store: Path, batches: list[Indices], skip_validation: bool, prefetch_factor: int
) -> DataLoader:
    """Loader as in its guides."""
    reader = AtomicDataZarrReader(store)
    dataset = Dataset(reader, device="cpu", skip_validation=skip_validation)
    return DataLoader(
        dataset,
        batch_size=BATCH,
        sampler=Order(batches),
        prefetch_factor=prefetch_factor,
    )


def cost(watch: Stopwatch, count: int, n_bytes: int) -> dict[str, Any]:
    """Measured seconds and what was moved in them."""
    return {"wall": watch.wall, "cpu": watch.cpu, "samples": count, "bytes": n_bytes}


def answer(question: dict[str, Any], store: Path, samples: Samples) -> dict[str, Any]:
    """What a question asks for."""
    match question["do"]:
        case "version":
            return {"version": version("nvalchemi-toolkit")}
        case "write":
            return write(store, samples)
        case "check":
            return check(store, samples)
        case _:
            return read(store, samples, question["mode"], question["batches"])


def main() -> None:
    """Answer until the input ends."""
    store = Path(sys.argv[1]) / "store.zarr"
    samples = Samples(int(sys.argv[2]), columns())
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), store, samples)), flush=True)


if __name__ == "__main__":
    main()
