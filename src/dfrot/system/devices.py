"""Which device `auto` is, and how much memory a device has."""

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def chosen_device(name: str, *, spread: bool = False) -> tuple[str, str | None]:
    """A device for torch, and the GPU if nobody asked for one.

    Args:
        name: as the user gave it.
        spread: whether a model can be spread over GPUs and the CPU, which takes accelerate: then `auto` stays `auto`.
    """
    if name != "auto":
        return name, None
    import torch

    if not torch.cuda.is_available():
        return "cpu", None
    more = torch.cuda.device_count() - 1
    can_spread = spread and importlib.util.find_spec("accelerate") is not None
    return "auto" if can_spread else "cuda", torch.cuda.get_device_name() + f" and {more} more" * (more > 0)


def memory_on(device: "torch.device", budget: int) -> int:
    """Bytes that may be taken on a device: on a GPU what is free there, on a CPU the budget."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else budget
