"""`none`: no rotation. What the others are measured against."""

from dfrot.methods.context import Context
from dfrot.transform.sites import Transforms


def none(context: Context) -> Transforms:
    return Transforms()
