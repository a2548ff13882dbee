"""Architectures without a table: one block is run without numbers, and what reads what becomes a proposal.

A proposal is the `ModelGraph` that someone would write for the architecture. It is proved as a table is: logits of the
source, read by it, are compared with those of transformers, and every fold of every block with the original. What does
not fit is refused, and the module that stands in the way is named.

A block has to have linear layers that read the residual stream, through norms that multiply by a gain, or without any;
attention, whose heads one layer reads; a feed-forward network, mostly with a gate, or experts, each of which is one;
maybe norms behind the two; and nothing else with parameters. Attention and the network may stand behind one another or
side by side. Either all norms of the stream subtract the mean, and then none stands behind a writer, or none does.
"""

import contextlib
import copy
import functools
import inspect
import json
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dfrot.models.experts import EXPERTS, ROUTER, MixtureOfExperts, use_experts_
from dfrot.models.graph import Config, ModelGraph, head_dim, kv_heads
from dfrot.models.stream import cache_name, position_embeddings
from dfrot.system.errors import UserError

_TOKENS = 3
_FIELDS = ("hidden_size", "num_attention_heads")
_FEW = 8  # channels of what is tried out with numbers


class _Call(NamedTuple):
    """What a module without children read and made."""

    name: str
    module: Any
    read: Tensor
    made: Tensor


class _Refusal(Exception):
    """Why there is no proposal, as the end of a sentence."""


def traced_graph(config: Config) -> ModelGraph:
    """A proposal for an architecture. Raises UserError, which names what is in the way, if there is none."""
    try:
        with torch.device("cpu"):  # it may be called where a model is being made on another
            return _of_record(json.dumps(config.to_dict(), sort_keys=True, default=str), config.model_type)
    except _Refusal as refusal:
        raise UserError(
            f"the architecture '{config.model_type}' has no table, and none could be found out: {refusal}. "
            "See 'A new architecture' in CONTRIBUTING.md; `dfrot models` lists those that are known."
        ) from None


@functools.lru_cache(maxsize=8)
def _of_record(record: str, model_type: str) -> ModelGraph:
    """The proposal for a config, which its JSON stands for."""
    try:
        config = AutoConfig.for_model(model_type, **{"num_hidden_layers": 1} | _of_one_layer(json.loads(record)))
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    except Exception as error:  # there is no end to the errors that a config can cause
        raise _Refusal(f"transformers makes no model of it ({error!r})") from error
    if missing := [name for name in _FIELDS if not hasattr(config, name)]:
        raise _Refusal(f"its config has no {missing[0]}")
    try:
        use_experts_(model, config)
    except ValueError as error:
        raise _Refusal(str(error)) from error
    names = {id(module): name for name, module in model.named_modules()}
    decoder: Any = model.base_model
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists or decoder is model:
        raise _Refusal("its model has no list of blocks")
    blocks, embedding = lists[0], model.get_input_embeddings()
    within = model.get_submodule(names[id(blocks)].rpartition(".")[0])  # the decoder, or a module of it
    rotary = next((module for name, module in within.named_children() if "rotary" in name), None)
    places = [each for each in within.children() if isinstance(each, nn.Embedding) and each is not embedding]
    if (rotary is None) != (len(places) == 1):
        raise _Refusal("its positions are neither RoPE's, computed once for all blocks, nor learned")
    final = [module for module in within.children() if _gains(module) == config.hidden_size]
    if len(final) != 1:
        without = [each for each in within.children() if "norm" in type(each).__name__.lower() and not _gains(each)]
        named = f": '{names[id(without[0])]}' is a {type(without[0]).__name__}, without gains" if without else ""
        raise _Refusal(f"its decoder has {len(final)} norms with gains behind the blocks{named}")
    known = {id(module) for module in (blocks, embedding, rotary, *places, *final)}
    for module in within.children():
        if id(module) not in known and next(module.parameters(), None) is not None:
            raise _Refusal(f"'{names[id(module)]}' is a {type(module).__name__} outside of the blocks")
    kind = _kind(final[0], names[id(final[0])])
    if capped := [
        name for name in ("attn_logit_softcapping", "final_logit_softcapping") if getattr(config, name, None)
    ]:
        raise _Refusal(f"its scores or logits are capped ({capped[0]})")
    if type(embedding) is not nn.Embedding and not hasattr(embedding, "scalar_embed_scale"):
        raise _Refusal(f"its embedding is a {type(embedding).__name__}")
    parts = _block_parts(blocks[0], rotary, config, kind)
    return ModelGraph(
        name=f"{type(model).__name__}, traced",
        embedding=names[id(embedding)],
        positions=names[id(places[0])] if places else "",
        decoder=names[id(decoder)],
        blocks=names[id(blocks)],
        rotary="" if rotary is None else names[id(rotary)],
        final_norm=names[id(final[0])],
        head=names[id(model.get_output_embeddings())],
        unit_gains=kind.adds_one,
        centred=kind.subtracts_mean,
        traced=True,
        **parts,
    )


def _of_one_layer(record: dict[str, Any]) -> dict[str, Any]:
    """A config's fields for one block: lists by block have their first entry alone."""
    layers = record.get("num_hidden_layers")
    cut = {name: value[:1] for name, value in record.items() if isinstance(value, list) and len(value) == layers}
    dropped = ("model_type", "num_hidden_layers", "dtype", "architectures", "transformers_version")
    return {name: value for name, value in (record | cut).items() if name not in dropped}


def _block_parts(block: nn.Module, rotary: Any, config: Config, kind: "_NormKind") -> dict[str, Any]:
    """What of the graph lies within a block."""
    for name, module in block.named_modules():
        if next(module.parameters(recurse=False), None) is not None and not (
            isinstance(module, nn.Linear) or _gains(module)
        ):
            raise _Refusal(f"'{name}' is a {type(module).__name__}, with weights of its own")
    calls = _calls(block, rotary, config)
    mixture = next((name for name, module in block.named_modules() if isinstance(module, MixtureOfExperts)), None)
    router = mixture and f"{mixture}.{ROUTER}"
    linears = {call.name: call for call in calls if isinstance(call.module, nn.Linear) and call.name != router}
    stages: dict[int, list[str]] = {}  # by the input that layers share
    for call in linears.values():
        stages.setdefault(id(call.read), []).append(call.name)
    experts = 0 if mixture is None else len(block.get_submodule(f"{mixture}.{EXPERTS}"))  # type: ignore[arg-type]
    sizes = [len(stage) for stage in stages.values()]
    groups = list(map(tuple, stages.values()))
    if sizes[1:] == [1, 1]:  # attention and the network read one norm
        within = groups[1][0].rpartition(".")[0] + "."
        groups.insert(2, tuple(name for name in groups[0] if not name.startswith(within)))
        groups[0] = tuple(name for name in groups[0] if name.startswith(within))
    elif sizes[1:2] != [1] or sizes[3:] != [1] * (experts or 1):
        raise _Refusal(f"{'; '.join(map(', '.join, stages.values()))} are not readers, a writer, readers and a writer")
    of_heads, (output,), of_ffn, (down,), *other_experts = groups
    norms: dict[str, tuple[str, ...]] = {}
    head_norms, norms_behind = [], []
    for norm in (call for call in calls if _gains(call.module)):
        if (of_norm := _kind(norm.module, norm.name)) != kind:
            raise _Refusal(f"the norm '{norm.name}' {of_norm}, and the last one {kind}")
        if kind.subtracts_mean and "." in norm.name:
            raise _Refusal(f"the norm '{norm.name}' of queries or keys subtracts a mean")
        if "." in norm.name:  # within attention
            head_norms.append(norm.name)
        elif any(linears[name].made is norm.read for name in (output, down)):
            norms_behind.append(norm.name)
        else:
            norms[norm.name] = tuple(name for name, call in linears.items() if call.read is norm.made)
    if kind.subtracts_mean and (norms_behind or experts):
        raise _Refusal(f"{(*norms_behind, mixture)[0]} stands where the mean that norms subtract cannot be taken out")
    if tuple(norms.values()) not in ((), (of_heads, of_ffn), (of_heads + of_ffn,)):
        raise _Refusal(f"{', '.join(norms)} are not norms before {', '.join(of_heads)} and before {', '.join(of_ffn)}")
    attention = output.rpartition(".")[0]
    queries = config.num_attention_heads * head_dim(config)
    values = kv_heads(config) * head_dim(config)
    return {
        "norms": norms,
        "unnormed": () if norms else (of_heads, of_ffn),
        "norms_behind": tuple(norms_behind),
        "writers": (output, down, *(name for (name,) in other_experts)),
        "attention": attention,
        **_head_layers(of_heads, linears, queries, values),
        "output": output,
        "up": _up(of_ffn[: 2 if experts else None], calls, linears, linears[down].module.in_features),
        "down": down,
        "router": router,
        "experts": experts,
        "head_norms": tuple(head_norms),
        "rope_in_halves": _turns_halves(block.get_submodule(attention), rotary, config),
    }


def _calls(block: nn.Module, rotary: Any, config: Config) -> list[_Call]:
    """What the modules of a block read and make, in the order in which they run."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: Any, words: Any, made: Any, name: str) -> None:
        read = next((each for each in (*args, *words.values()) if isinstance(each, Tensor)), None)
        if isinstance(read, Tensor) and isinstance(made, Tensor):
            calls.append(_Call(name, module, read, made))

    with torch.device("meta"), torch.no_grad(), contextlib.ExitStack() as hooks:
        for name, module in block.named_modules():
            if name and next(module.children(), None) is None and not isinstance(module, nn.Dropout):
                hook = functools.partial(note, name=name)
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        hidden, positions = torch.empty(1, _TOKENS, config.hidden_size), torch.arange(_TOKENS)[None]
        try:
            how: dict[str, Any] = {"position_ids": positions}
            if rotary is not None:
                embeddings = position_embeddings(type(rotary)(config=config), hidden, positions)
                how["position_embeddings"] = next(iter(embeddings.values()))
            block.eval()(hidden, attention_mask=None, **{cache_name(block): None}, **how)
        except Exception as error:  # whatever such a block expects
            raise _Refusal(f"its block does not run on a stream and positions alone ({error!r})") from error
    return calls


def _drawn() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _gains(module: nn.Module) -> int:
    """How many gains a module has that has nothing else but, maybe, biases for them; 0 if it is no such module."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.pop("weight", None)
    alike = weight is not None and weight.ndim == 1 and all(each.shape == weight.shape for each in parameters.values())
    return len(weight) if alike and weight is not None else 0


class _NormKind(NamedTuple):
    """How a norm differs from x / √(mean x² + ε) · weight."""

    adds_one: bool
    subtracts_mean: bool

    def __str__(self) -> str:
        factor, mean = "1 + its" if self.adds_one else "its", "a" if self.subtracts_mean else "no"
        return f"multiplies by {factor} weight and subtracts {mean} mean"


def _kind(norm: Any, name: str) -> _NormKind:
    """What a norm computes; _Refusal if that is of no kind. It is tried out with a few channels in place of all.

    A bias counts with a norm that subtracts the mean.
    """
    x, (weight,) = torch.rand(5, _FEW, generator=_drawn(), dtype=torch.float32).add_(0.5).tensor_split([4])
    made = copy.deepcopy(norm)
    for part, _ in list(made.named_parameters()):
        setattr(made, part, nn.Parameter(torch.full_like(weight, 0.25)))
    made.weight = nn.Parameter(weight)
    if isinstance(made, nn.LayerNorm):
        made.normalized_shape = tuple(weight.shape)
    found = torch.zeros_like(x)
    with torch.no_grad(), contextlib.suppress(Exception):  # there is no end to what else may be called a norm
        found = made(x)
    bias = getattr(made, "bias", None)
    for adds_one, gain in enumerate((weight, 1 + weight)):
        by_size = nn.functional.rms_norm(x, gain.shape, gain, 1e-6)
        without_mean = nn.functional.layer_norm(x, gain.shape, gain, bias, 1e-6)
        for subtracts_mean, expected in enumerate((by_size, without_mean)):
            if found.isclose(expected, rtol=1e-3).all():
                return _NormKind(bool(adds_one), bool(subtracts_mean))
    raise _Refusal(f"the norm '{name}' is a {type(norm).__name__}, which does more than to multiply by gains")


def _head_layers(readers: tuple[str, ...], linears: dict[str, _Call], queries: int, values: int) -> dict[str, Any]:
    """Which layers make keys and values, and where in a fused one: that follows from a name, and is proved with the
    rest."""
    rows = {name: linears[name].module.out_features for name in readers}
    if list(rows.values()) == [queries + 2 * values]:
        return {"key": None, "value": readers[0], "by_heads": readers[0].endswith("query_key_value")}
    found = {name.rpartition(".")[2][:1]: name for name in readers}
    if len(rows) != 3 or found.keys() != {"q", "k", "v"} or [rows[found[kind]] for kind in "kv"] != [values] * 2:
        raise _Refusal(f"{', '.join(readers)} are not layers of queries, keys and values")
    return {"key": found["k"], "value": found["v"]}


def _up(readers: tuple[str, ...], calls: list[_Call], linears: dict[str, _Call], channels: int) -> str | None:
    """The layer whose outputs the gate multiplies; None if there is no gate."""
    rows = [linears[name].module.out_features for name in readers]
    if rows == [channels]:
        return None
    if rows == [2 * channels]:
        return readers[0]
    gates = [name for name in readers if any(call.read is linears[name].made for call in calls)]
    if rows != [channels] * 2 or len(gates) != 1:
        raise _Refusal(f"{', '.join(readers)} are not a gate and what it multiplies")
    return next(name for name in readers if name not in gates)


def _turns_halves(attention: nn.Module, rotary: Any, config: Config) -> bool:
    """Whether RoPE turns all channels, j with j + half, in every block: as `runtime.key_bias` does it."""
    if (frequencies := getattr(rotary, "inv_freq", None)) is not None and 2 * len(frequencies) != head_dim(config):
        return False
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if turn is None or not all(getattr(config, "no_rope_layers", None) or [1]):
        return False
    drawn = torch.rand(1, 2, 3 * _FEW // 2, generator=_drawn(), dtype=torch.float32)
    x, angles = drawn[None, :, :, :_FEW], drawn[:, :, _FEW:]
    cos, sin = (torch.cat([each, each], -1) for each in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    expected = torch.cat([first, second], -1) * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    try:
        found = turn(x, x, cos, sin)[1]
    except Exception:  # another function of that name
        return False
    return bool(found.shape == expected.shape and found.isclose(expected, rtol=1e-5, atol=1e-5).all())


def table_of(graph: ModelGraph, model_type: str) -> str:
    """The row of `GRAPHS` that would make a proposal a known architecture."""
    defaults = {name: field.default for name, field in inspect.signature(ModelGraph).parameters.items()}
    given = {name: value for name, value in vars(graph).items() if value != defaults[name] and name != "traced"}
    words = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return f'"{model_type}": ModelGraph({words}),'
