"""Which device `auto` is."""


def chosen_device(name: str, *, spread: bool = False) -> tuple[str, str | None]:
    """A device as torch, or accelerate if models are to be spread, takes it, and the GPU if nobody asked for one."""
    if name != "auto":
        return name, None
    import torch

    if not torch.cuda.is_available():
        return "cpu", None
    more = torch.cuda.device_count() - 1
    return "auto" if spread else "cuda", torch.cuda.get_device_name() + f" and {more} more" * (more > 0)
