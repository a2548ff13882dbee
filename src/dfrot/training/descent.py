"""Adam on what is trained, with the learning rate and the step chosen on held-out text.

Short descents from the start choose by what the rates are multiplied: 0.3 and 1 are tried, and then the next factor on
the side of the better one, as long as it gets better. Then comes the descent that counts, with a cosine decay. It is
measured now and then, and its best step is kept. The start itself is the first candidate, so the outcome is never worse
than it on held-out text.

Everything that the rest of a run depends on is in `state`: a run that continues from there equals one that was never
interrupted, to the bit on one machine.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.training.trained import Trained, TrainedIntegers, TrainedRotation

FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0)
FIRST_FACTORS = (0.3, 1.0)
BETAS, EPS = (0.9, 0.98), 1e-12  # a second moment that forgets in 50 steps: there are few. Gradients are tiny
WARM_UP = 8  # steps until the rate is full: Adam's first steps have the full size whatever their gradient
PROBE = 12  # steps of a descent that chooses the rate
MEASUREMENTS = 8  # of the descent that counts
PIECE = 1 << 22  # numbers that Adam moves at a time, so that what lies between is small
_PARTS = ("values", "first", "second", "best")

Moving = Trained | TrainedIntegers | TrainedRotation


def _flat(trained: Iterable[Moving]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One vector of all parameters, one of their gradients, which they share, one of rates, and one of bounds."""
    parameters = [(each.parameter, each.rate, each.bound) for each in trained if each.parameter is not None]
    values = torch.cat([parameter.detach().flatten() for parameter, _, _ in parameters])
    gradients, rates, bounds, at = torch.zeros_like(values), torch.zeros_like(values), torch.empty_like(values), 0
    for parameter, rate, bound in parameters:
        part = slice(at, at := at + parameter.numel())
        parameter.data = values[part].view_as(parameter)
        parameter.grad = gradients[part].view_as(parameter)
        rates[part], bounds[part] = rate or 0.0, bound
    return values, gradients, rates, bounds


class Descent:
    """Training in steps that can be interrupted anywhere.

    Args:
        trained: whose parameters move.
        loss: of a step: adds the gradients of that step's loss, which it returns.
        measure: the loss on held-out text.
        steps: of the descent that counts.
        processes: that each have a part of the gradients.
    """

    def __init__(
        self,
        trained: Iterable[Moving],
        loss: Callable[[int], float],
        measure: Callable[[], float],
        steps: int,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self._values, self._gradients, self._rates, self._bounds = _flat(trained)
        self._first, self._second = torch.zeros_like(self._values), torch.zeros_like(self._values)
        self._best = self._values.clone()
        self._loss, self._measure, self.steps, self._processes = loss, measure, steps, processes
        self._probe = min(steps, PROBE)
        self._every = max(1, steps // MEASUREMENTS)
        self.step = 0  # how many steps of the descent at hand are done
        self.losses: list[float] = []  # of the descent that counts
        self.held: dict[str, float] = {}  # its number of steps → loss on held-out text
        self.probes: dict[str, float] = {}  # factor → the same after a short descent

    @property
    def total(self) -> int:
        """Steps of all descents, if no more factors than those at hand are tried."""
        return max(len(FIRST_FACTORS) + 1, len(self.probes) + self.probing) * self._probe + self.steps

    @property
    def probing(self) -> bool:
        """Whether a factor is still to be tried."""
        return self._untried is not None

    @property
    def done(self) -> bool:
        return not self.probing and self.step == self.steps

    @property
    def factor(self) -> float:
        """By which the rates of the descent at hand are multiplied."""
        untried = self._untried
        return self._best_factor if untried is None else untried

    @property
    def _best_factor(self) -> float:
        return min(map(float, self.probes), key=lambda factor: self.probes[str(factor)])

    @property
    def _untried(self) -> float | None:
        """The factor to try next; None if those beside the best one have been tried."""
        tried = {float(factor) for factor in self.probes}
        if left := [factor for factor in FIRST_FACTORS if factor not in tried]:
            return left[0]
        at = FACTORS.index(self._best_factor)
        beside = FACTORS[max(0, at - 1) : at + 2]
        return next((factor for factor in beside if factor not in tried), None)

    def remaining(self) -> Iterator[int]:
        """Go on, one step at a time, to the end; yields the steps done in all after each, and once before the first."""
        if not self.held:
            self.held["0"] = self._held_out()
        yield len(self.probes) * self._probe + self.step
        while not self.done:
            self._advance()
            yield len(self.probes) * self._probe + self.step
        self._values.copy_(self._best)

    def _advance(self) -> None:
        probing, factor = self.probing, self.factor
        self._gradients.zero_()
        loss = self._loss(self.step)
        self._processes.all_reduce_sum(self._gradients)
        rate = factor * min(1.0, (self.step + 1) / WARM_UP)
        if not probing:
            rate *= 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
            self.losses.append(loss)
        self.step += 1
        self._adam(rate)
        if probing and self.step == self._probe:
            self.probes[str(factor)] = self._held_out()
            self.step = 0
            for tensor in (self._first, self._second, self._values):
                tensor.zero_()
        elif not probing and (self.step % self._every == 0 or self.step == self.steps):
            found = self._held_out()
            if found < min(self.held.values()):
                self._best.copy_(self._values)
            self.held[str(self.step)] = found

    def _held_out(self) -> float:
        found = self._measure()
        return found if math.isfinite(found) else sys.float_info.max  # JSON has no infinity

    def _adam(self, rate: float) -> None:
        flat = self._values, self._gradients, self._first, self._second, self._rates, self._bounds
        for values, gradients, firsts, seconds, rates, bounds in zip(
            *(each.split(PIECE) for each in flat), strict=True
        ):
            gradient = torch.nan_to_num_(gradients, 0.0, 0.0, 0.0)  # one wild window must not spoil everything
            first = firsts.lerp_(gradient, 1 - BETAS[0]) / (1 - BETAS[0] ** self.step)
            second = seconds.lerp_(gradient.square(), 1 - BETAS[1]) / (1 - BETAS[1] ** self.step)
            values.sub_(rate * rates * first / (second.sqrt() + EPS)).clamp_(max=bounds)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON and tensors from which `restore` goes on."""
        names = ("step", "losses", "held", "probes")
        return {name: getattr(self, name) for name in names}, {part: getattr(self, f"_{part}") for part in _PARTS}

    def notes(self) -> dict[str, Any]:
        """What is worth keeping of a finished run, as JSON."""
        kept = min(self.held, key=lambda step: self.held[step])
        found = {"parameters": len(self._values), "factor": self.factor, "kept_step": int(kept)}
        return {**found, "held_kl": self.held, "probes": self.probes, "losses": self.losses}

    def restore(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, value in record.items():
            setattr(self, name, value)
        for part, tensor in tensors.items():
            getattr(self, f"_{part}").copy_(tensor)
