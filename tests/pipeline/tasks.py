"""What tests let worker processes do; it imports little, so that these start fast."""

import os
import signal
from pathlib import Path

from pipeline.errors import DataError


def refuse_seven(number: int) -> int:
    """The square of ``number``, unless it is 7."""
    if number == 7:
        raise DataError("Number 7 is refused.")
    return number * number


def die_at_seven(folder: Path, deaths: int, number: int) -> int:
    """Kill this process at number 7 for so many times; ``folder`` counts them."""
    if number == 7 and (died := len(list(folder.iterdir()))) < deaths:
        (folder / str(died)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number
