"""`none`: no rotation. What the others are measured against."""

from dfrot.methods.method import Context
from dfrot.transform.transforms import Transforms


def none(context: Context) -> Transforms:
    return Transforms()
