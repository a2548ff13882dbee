"""What tests/system/test_distributed.py starts twice with torchrun: one process's work."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dfrot
from dfrot.linalg.rotation import random_hadamard
from dfrot.methods.dfrot import DFRot
from dfrot.methods.massive import Sample
from dfrot.methods.rangerot import RangeRot
from dfrot.methods.refinement import PAPER_QUANTIZER
from dfrot.models.files import stored_tensors
from dfrot.rounding.stream import CalibrationStream, Hessian
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup

STEPS = 10


def refined(processes: ProcessGroup) -> dict[str, Tensor]:
    """A rotation from either method, in float64, and the objective along the way."""
    x = torch.randn(301, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:5, 7] = 100
    x /= x.square().mean(-1, keepdim=True).sqrt()
    sample = Sample(x, torch.arange(301) < 5, torch.ones(301, dtype=torch.float64))
    start = random_hadamard(32, torch.Generator().manual_seed(1))
    found = {}
    for name, method in {"descent": RangeRot(steps=STEPS), "procrustes": DFRot(steps=STEPS)}.items():
        rotation, log = method.refine(start, sample, PAPER_QUANTIZER, 10.0, processes)
        found[name] = rotation.as_matrix()
        found[f"{name}/objective"] = torch.tensor([entry["objective"] for entry in log], dtype=torch.float64)
    return found


def hessians(
    model: str, text: str, out: str, dtype: str, processes: ProcessGroup = SINGLE_PROCESS
) -> dict[str, Tensor]:
    """The Hessians of a run, in the order in which they were needed."""
    found: dict[str, Tensor] = {}
    original = CalibrationStream.hessian

    def watched(stream: CalibrationStream, index: int, block: nn.Module, linear: str) -> Hessian:
        hessian = original(stream, index, block, linear)
        found[f"{index}.{linear}"] = hessian.inputs.clone()
        return hessian

    words: dict[str, Any] = {"calib": text, "calib_tokens": 120, "calib_seq_len": 24}  # five sequences
    CalibrationStream.hessian = watched  # type: ignore[assignment, method-assign]
    try:
        dfrot.quantize(
            model, dfrot.Recipe.parse("quarot", "gptq", dtype=dtype, tune="none", **words), out, processes=processes
        )
    finally:
        CalibrationStream.hessian = original  # type: ignore[method-assign]
    return found


def tuned(model: str, text: str, out: str, processes: ProcessGroup = SINGLE_PROCESS) -> dict[str, Tensor]:
    """The losses of a tuned run in float64, and all tensors that it leaves."""
    words: dict[str, Any] = {"tune": "all", "tune_steps": 3, "tune_tokens": 48, "tune_seq_len": 16}  # 3 windows a step
    recipe = dfrot.Recipe.parse("quarot", "rtn", calib=text, dtype="float64", **words)
    notes = dfrot.quantize(model, recipe, out, processes=processes).notes["tuning"]
    losses = [*notes["losses"], *notes["held_kl"].values(), *notes["probes"].values()]
    tensors = {name: each.read() for name, each in stored_tensors(Path(out)).items()}
    return tensors | {"losses": torch.tensor(losses, dtype=torch.float64)}


if __name__ == "__main__":
    folder, model, text = sys.argv[1:]
    us = ProcessGroup.of()
    with us.joined("cpu"):
        everything = {"refined": refined(us)}
        for dtype in ("float64", "float32"):
            everything[dtype] = hessians(model, text, f"{folder}/{dtype}", dtype, us)
        everything["tuned"] = tuned(model, text, f"{folder}/tuned", us)
    if us.is_main:
        for name, tensors in everything.items():
            save_file(tensors, Path(folder) / f"{name}.safetensors")
