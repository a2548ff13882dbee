"""The two files of an inspection: `inspect` writes them and `report` reads them, both by these types.

inspect.json holds `Stats`. inspect.safetensors holds what is too large for JSON:

    error/<rotation>     float (norms, tokens)     relative error of every token
    massive              uint8 (norms, tokens)     1 where a token has massive activations
    surface/<rotation>   float (tokens, channels)  |x R| of the first tokens at one norm
"""

from typing import Any, TypedDict

SCHEMA = 2
STATS_FILE, TENSORS_FILE = "inspect.json", "inspect.safetensors"


class MassiveToken(TypedDict):
    block: int
    norm: str
    position: int
    token: str
    token_id: int
    channel: int
    peak_over_rms: float


class Channel(TypedDict):
    channel: int
    value: float


class NormChannels(TypedDict):
    """The largest |x̂| that each channel has in any token: the median of the channels, and the largest of them."""

    median: float
    largest: list[Channel]


class TokenErrors(TypedDict):
    """Mean relative errors; null where there are no such tokens."""

    ordinary: float | None
    massive: float | None


class LayerErrors(TypedDict):
    block: int
    layer: str
    error: dict[str, float]


class Stats(TypedDict):
    """What rotations do to the norm outputs of one model on one sequence. `norms` and `rotations` give the order."""

    schema: int
    model: str  # as the user called it
    conditions: dict[str, Any]
    tokens: list[str]
    norms: list[str]  # "0.input_layernorm", …
    massive: list[MassiveToken]
    channels: list[NormChannels]  # by norm
    rotations: list[str]
    kurtosis: dict[str, list[float]]  # excess kurtosis, by rotation and norm
    error: dict[str, TokenErrors]  # by rotation
    weights: list[LayerErrors]
    kv: dict[str, dict[str, list[float]]]  # relative errors: keys and values → plain and rotated → by block
    surface: str  # the norm that the surfaces show
    sensitivity: dict[str, list[float]]  # KL in nats with one block's norm outputs quantized, by rotation and block
