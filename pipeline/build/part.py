"""Which blocks of a planned store one of several jobs fills."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import SpecError


@dataclass(frozen=True)
class BuildPart:
    """One of ``of`` shares of a store's blocks; numbered from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "BuildPart":
        """The part that ``text``, such as ``3/32``, names.

        Raises
        ------
        SpecError
            It does not look like that, or there is no such part.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise SpecError(
                f"--part {text!r} must look like 3/32, the third of 32 parts, with "
                "parts numbered from 1"
            )
        return cls(int(found[1]), int(found[2]))

    def blocks(self, n_blocks: Mapping[str, int]) -> dict[str, range]:
        """Blocks of this part by split, for splits of ``n_blocks`` each.

        The blocks of all splits, one split after the other, are cut into ``of`` runs.
        Over all parts every block appears once, and parts differ by one block at most;
        where there are more parts than blocks, some are empty.
        """
        total = sum(n_blocks.values())
        start = (self.number - 1) * total // self.of
        stop = self.number * total // self.of
        chosen = {}
        first = 0
        for split, count in n_blocks.items():
            chosen[split] = range(
                min(max(start - first, 0), count), min(max(stop - first, 0), count)
            )
            first += count
        return chosen
