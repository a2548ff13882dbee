"""Which device `auto` is."""

import importlib.util


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
