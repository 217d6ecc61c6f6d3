"""Talks to `store_rival.py`, which needs an environment of its own."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from stores.data import Samples
from stores.reading import Rounds
from stores.table import cost_cells, print_table
from stores.timing import Cost

SCRIPT = Path(__file__).parents[1] / "store_rival.py"
NAME = "nvalchemi-toolkit"
# Batches a round, so that a round takes a minute at most.
MODES = {"default": 4, "tuned": 64}
PHASE = "warm, later epochs"


class Rival:
    """The rival's process with its store in a folder; use as a context."""

    def __init__(self, python: Path, folder: Path, samples: Samples) -> None:
        (folder / "rival").mkdir()
        self._samples = samples
        self._process = subprocess.Popen(
            [python, SCRIPT, folder / "rival", str(len(samples))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._version = self._ask(do="version")["version"]

    def __enter__(self) -> "Rival":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def print_write(self, base: Sequence[Cost]) -> None:
        """Write once, check, and print beside the last round of np.memmap."""
        reply = self._ask(do="write")
        cost = self._cost(reply)
        kept = ", ".join(self._ask(do="check")["dtypes"])
        cells = cost_cells([cost], base[-1:])
        row = [f"{NAME} {self._version}", *cells, f"{reply['ratio']:.3f}"]
        head = ["writing", "samples/s", "MB/s", "CPU s", "x base", "x raw", "files"]
        legend = f"x base: np.memmap's last round, not paired; it keeps {kept}"
        print_table(
            "the rival's writing", head, [[*row, f"{reply['files']:,}"]], legend
        )

    def add_round(self, rounds: Rounds) -> None:
        """Read in every mode and add the costs to a phase of the warm round."""
        for mode, batches in MODES.items():
            cost = self._cost(self._ask(do="read", mode=mode, batches=batches))
            name = f"{NAME}, {mode}"
            rounds.phases[PHASE].setdefault(name, []).append(cost)

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        # Its libraries print notes of their own.
        line = next(line for line in self._process.stdout if line.startswith("{"))
        answer: dict[str, Any] = json.loads(line)
        return answer

    @staticmethod
    def _cost(reply: dict[str, Any]) -> Cost:
        return Cost(reply["wall"], reply["cpu"], reply["samples"], reply["bytes"])
