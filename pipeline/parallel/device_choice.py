"""The choice of a device by name, without importing torch before it is needed."""

from typing import TYPE_CHECKING

from pipeline.errors import SpecError

if TYPE_CHECKING:
    import torch


def choose_device(name: str | None) -> "torch.device":
    """Return the device ``name``; by default a GPU if there is one, else the CPU.

    Raises
    ------
    SpecError
        This machine has no such device.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = "cpu or cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        # Not where tensors hold no numbers, as on "meta".
        torch.empty(1, device=device).fill_(0).item()
    except (RuntimeError, AssertionError):
        raise SpecError(
            f"--device {name!r} cannot be used on this machine; try {usable}."
        ) from None
    return device
