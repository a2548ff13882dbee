"""`none`: no rotation, the baseline of all methods."""

from dataclasses import dataclass

from dfrot.methods.method import Fit, FitContext, Look, Method
from dfrot.transform.transforms import Transforms


@dataclass(frozen=True)
class NoRotation(Method):
    """Quantize the model unrotated."""

    name = "none"
    look = Look("#D55E00", "circle", "solid")

    def fit(self, on: FitContext) -> Fit:
        return Fit(Transforms(), {})
