from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dfrot
from dfrot.cli.flags import parse_size
from dfrot.evaluation.record import model_size
from dfrot.models.source import open_source
from dfrot.pipeline.estimate import Estimate, free_disk
from dfrot.system.errors import SetupError, UserError
from dfrot.system.memory import available_memory
from dfrot.training.teacher import LOGITS
from tests.tiny_models import write_tiny_model

Tiny = Callable[[str], Path]


def planned(path: Path, memory: int | None = None, **words: Any) -> Estimate:
    return Estimate.of(open_source(str(path)), dfrot.Recipe.parse(**words), memory)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("llama", {"method": "none"}),  # stays tied
        ("llama", {"method": "quarot", "spec": "w3g16a4kv4"}),
        ("phi3", {"method": "none", "spec": "w16a4kv16"}),
        ("qwen3", {"method": "duquant", "preset": "duquant"}),
        ("mistral", {"method": "duquant", "base": "quarot", "permutations": 2, "block": 16}),
        ("opt", {"method": "quarot"}),  # learned positions
        ("phi", {"method": "quarot"}),  # a bias of the head
        ("gpt_neox", {"method": "quarot"}),  # and one that the last norm's becomes
        ("qwen2", {"method": "quarot", "mean_keys": True}),
    ],
)
def test_the_size_of_the_checkpoint_is_known_before_it_is_made(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str, words: dict[str, Any]
) -> None:
    words |= {"weights": "rtn", "calib": str(text_file), "calib_tokens": 64}
    expected = planned(tiny(architecture), **words)
    made = dfrot.quantize(tiny(architecture), dfrot.Recipe.parse(**words), tmp_path / "out").path
    assert expected.checkpoint == model_size(made)["weight_bytes"]


def test_sizes_are_those_counted_by_hand(tiny: Tiny) -> None:
    plan = planned(tiny("llama"), method="none", weights="gptq", calib_tokens=96, calib_seq_len=32)
    attention = 2 * 48 * 48 + 2 * 24 * 48  # q and o, k and v: four heads of 12 channels, two of them for keys
    assert plan.block_weights == attention + 3 * 48 * 80
    biases, norms = 2 * 48 + 2 * 24, 2 * 48
    assert (plan.blocks, plan.block_bytes) == (2, 4 * (plan.block_weights + biases + norms))
    assert plan.states == 96 * (48 + 48) * 4  # three sequences: the residual stream and the heads' outputs
    assert planned(tiny("llama"), method="none", weights="rtn").states == 0


def test_choosing_gamma_takes_the_head_and_a_stream_for_each(tmp_path: Path) -> None:
    words: dict[str, Any] = {"method": "rangerot", "weights": "rtn", "tune": "none", "spec": "w4a4kv16"}
    words |= {"calib_tokens": 64, "calib_seq_len": 64}
    wide = write_tiny_model("llama", tmp_path, vocab_size=1 << 17)
    chosen = planned(wide, **words).resident
    assert chosen >= 1.1 * (460_000_000 + 4 * 48 * (1 << 17) + 4 * 4 * LOGITS)
    assert planned(wide, **words, gamma=10.0).resident < chosen


def test_what_stays_unpacked_is_counted_as_wide_as_this_processor_multiplies(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    narrow = planned(tiny("llama"), tune="biases").tuning
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert planned(tiny("llama"), tune="biases").tuning.integers == 2 * narrow.integers


def test_states_are_spilled_when_the_budget_does_not_hold_them(tiny: Tiny) -> None:
    plan = planned(tiny("llama"), weights="gptq", tune="none")
    assert plan.budget > 0
    assert replace(plan, budget=plan.resident + plan.states).offloads is False
    offloaded = replace(plan, budget=plan.resident + plan.states - 1)
    assert offloaded.offloads is True
    assert offloaded.tight
    assert not replace(plan, budget=2 * plan.memory).tight
    assert (offloaded.memory, offloaded.disk) == (plan.resident, plan.checkpoint + plan.states)


def test_more_text_and_finer_fitting_need_more_memory(tiny: Tiny) -> None:
    few, many = (planned(tiny("llama"), weights="gptq", calib_tokens=tokens) for tokens in (2048, 65536))
    assert few.memory < many.memory
    rtn, gptq = (planned(tiny("llama"), weights=weights) for weights in ("rtn", "gptq"))
    assert rtn.memory < gptq.memory


def test_measuring_what_the_cache_costs_is_planned(tiny: Tiny, tmp_path: Path) -> None:
    path = write_tiny_model("llama", tmp_path / "model", vocab_size=65536)
    words: dict[str, Any] = {"method": "quarot", "tune": "none", "dtype": "float32"}
    words |= {"weights": "gptq", "calib_tokens": 64, "calib_seq_len": 32}
    without, measured, chosen = (
        planned(path, **words, **more)
        for more in ({"spec": "w4a4kv16"}, {"spec": "w4a4kv4"}, {"spec": "w4a4kv4", "kv_bits_by_block": 6.0})
    )
    streams, head, logits = 3 * 32 * 48, 2 * 65536 * 48, 4 * LOGITS  # in float32; the head as it is stored, too
    assert without.resident < measured.resident > 1.1 * 4 * (streams + head + logits)
    assert chosen.resident - measured.resident == pytest.approx(1.1 * 4 * 2 * 32 * 48, abs=1)


@pytest.mark.parametrize("width", [1024, 2048])
def test_gptq_has_room_for_the_hessian_and_its_factorisation(tmp_path: Path, width: int) -> None:
    """Alive at once: the Hessian in float32, a damped copy of it in float64, and the Cholesky factor of that copy."""
    model = write_tiny_model("llama", tmp_path / "model", intermediate_size=width)
    words: dict[str, Any] = {"method": "none", "calib_tokens": 64, "calib_seq_len": 32}
    rtn, gptq = (planned(model, weights=weights, **words) for weights in ("rtn", "gptq"))
    assert gptq.resident - rtn.resident >= (4 + 8 + 8) * width**2


def test_what_does_not_fit_is_refused_before_anything_is_made(tiny: Tiny, tmp_path: Path) -> None:
    recipe = dfrot.Recipe.parse("none", "rtn")
    with pytest.raises(UserError, match=r"the budget is 0\.00 GB\. Give a larger --memory"):
        dfrot.quantize(tiny("llama"), recipe, tmp_path / "out", memory=10**6)
    plan = replace(planned(tiny("llama"), method="none", weights="rtn"), checkpoint=10**18)
    with pytest.raises(SetupError, match=r"1000000000\.00 GB for the checkpoint; its disk has"):
        plan.require_room(tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_the_check_of_the_source_is_planned_and_left_out_where_it_does_not_fit(tiny: Tiny, tmp_path: Path) -> None:
    source, recipe = open_source(str(tiny("llama"))), dfrot.Recipe.parse("none", "rtn")
    plans = {check: Estimate.of(source, recipe, None, check_source=check) for check in ("never", "auto", "always")}
    needed = plans["always"].check
    assert plans["auto"].check == needed > 2 * sum(tensor.nbytes for tensor in source.stored.values())
    assert plans["never"].check == 0
    assert Estimate.of(source, recipe, needed - 1).check == 0
    with pytest.raises(UserError, match="--check-source always needs"):
        replace(plans["always"], budget=needed - 1, resident=0).require_room(tmp_path)


def test_what_is_replaced_counts_as_free(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(bytes(10**6))
    assert free_disk(tmp_path) - free_disk(tmp_path / "not" / "made") == pytest.approx(10**6, abs=10**8)


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("6GiB", 6 * 2**30), ("512 mb", 512 * 10**6), ("1.5g", 15 * 10**8)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "0GB", "-1GB", "8 GBit", "8i", "8"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="such as 8GB, 6GiB or 512MB"):
        parse_size(text)


def test_the_machine_has_memory() -> None:
    assert available_memory() > 10**8
