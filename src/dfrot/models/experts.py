"""Mixtures of experts, each expert with linear layers of its own.

transformers keeps all experts of a block in two tensors of three dimensions, which it makes of the layers that files
have. Here the layers stay layers: so they are folded, rounded, packed and computed like those of any other model.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dfrot.models.graph import Config, ffn_width

ROUTER, EXPERTS = "gate", "experts"
_FEW = 8  # channels and experts of what is tried out with numbers


class Expert(nn.Module):
    """(act(x W_gᵀ) ⊙ x W_uᵀ) W_dᵀ."""

    def __init__(self, hidden: int, width: int, act: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.act_fn = ACT2FN[act]

    def inner(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch width"]:
        """What down_proj reads."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        return self.down_proj(self.inner(x))


class MixtureOfExperts(nn.Module):
    """Σ pₑ(x) Eₑ(x) over the `chosen` experts of which p = softmax(x W_rᵀ) is largest.

    Args:
        normalized: whether their p are divided by their sum.

    Attributes:
        everywhere: is added to every p: with any but 0 all experts compute all tokens, as a proof of all of them needs.
    """

    def __init__(self, hidden: int, width: int, count: int, chosen: int, normalized: bool, act: str) -> None:
        super().__init__()
        self.chosen, self.normalized, self.everywhere = chosen, normalized, 0.0
        self.gate = nn.Linear(hidden, count, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, width, act) for _ in range(count))

    def shares(
        self, x: Float[Tensor, "*batch hidden"]
    ) -> tuple[Float[Tensor, "*batch chosen"], Int[Tensor, "*batch chosen"]]:
        """p of the chosen experts, and which these are."""
        logits = self.gate(x)
        p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        largest, experts = p.topk(self.chosen, -1)
        if self.normalized:
            largest = largest / largest.sum(-1, keepdim=True)
        return largest.to(x.dtype), experts

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        p, experts = self.shares(x)
        if self.everywhere or x.is_meta:
            of_all = torch.zeros(*x.shape[:-1], len(self.experts), dtype=x.dtype, device=x.device)
            of_all = of_all.scatter(-1, experts, p) + self.everywhere
            return sum(of_all[..., e, None] * expert(x) for e, expert in enumerate(self.experts))
        rows, p, experts = (each.flatten(0, -2) for each in (x, p, experts))
        y = torch.zeros_like(rows)
        for e in experts.unique().tolist():
            tokens, place = torch.where(experts == e)
            y.index_add_(0, tokens, self.experts[e](rows[tokens]) * p[tokens, place, None])
        return y.view_as(x)


def recognized(module: nn.Module) -> bool:
    """Whether a module of transformers consists of a router and experts in tensors of three dimensions, alone."""
    children = {name: dict(child.named_parameters()) for name, child in module.named_children()}
    return (
        {name: set(tensors) for name, tensors in children.items() if tensors}
        == {ROUTER: {"weight"}, EXPERTS: {"gate_up_proj", "down_proj"}}
        and children[ROUTER]["weight"].ndim == 2
        and all(tensor.ndim == 3 for tensor in children[EXPERTS].values())
    )


def use_experts_(model: nn.Module, config: Config) -> None:
    """Replace transformers' mixtures by `MixtureOfExperts`, on the meta device.

    Raises:
        ValueError: one of them computes something else; the text names it, as the end of a sentence.
    """
    for name, module in [*model.named_modules()]:
        if recognized(module):
            model.set_submodule(name, _like(name, module, config))


def _like(name: str, theirs: Any, config: Config) -> MixtureOfExperts:
    """A mixture that computes what transformers' does, as it is found out with a few channels."""
    router, experts, act = theirs.gate, theirs.experts, str(getattr(config, "hidden_act", None))
    chosen, drawn = getattr(router, "top_k", 0), torch.Generator("cpu").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.rand(shape, generator=drawn, dtype=torch.float32, device="cpu") - 0.5

    count = max(chosen, _FEW)
    x, of_router = numbers(5, _FEW), 4 * numbers(count, _FEW)
    gate_up, down = numbers(count, 2 * _FEW, _FEW), numbers(count, _FEW, _FEW)
    few_router, few_experts = copy.deepcopy(router), copy.deepcopy(experts)
    few_router.weight, few_router.hidden_dim, few_router.num_experts = nn.Parameter(of_router), _FEW, count
    few_experts.gate_up_proj, few_experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    few_experts.num_experts = count
    for normalized in (True, False) if act in ACT2FN else ():
        with torch.device("cpu"):
            ours = MixtureOfExperts(_FEW, _FEW, count, chosen, normalized, act)
        ours.gate.weight.data = of_router
        for expert, both, last in zip(ours.experts, gate_up, down, strict=True):
            gate, up = both.chunk(2)
            for layer, weight in ((expert.gate_proj, gate), (expert.up_proj, up), (expert.down_proj, last)):
                layer.weight.data = weight  # type: ignore[union-attr]
        with torch.no_grad():
            try:
                _, p, which = few_router(x)
                expected = few_experts(x, which, p)
                same = bool(torch.isclose(ours(x), expected, rtol=1e-4, atol=1e-5).all())
            except Exception:  # there is no end to what a router may expect
                same = False
        if same:
            with torch.device("meta"):
                return MixtureOfExperts(
                    config.hidden_size, ffn_width(config), len(router.weight), chosen, normalized, act
                )
    raise ValueError(f"'{name}' is a {type(theirs).__name__}, which is no softmax over experts")
