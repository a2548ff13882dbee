"""One paper a file. A method looks at a model and a recipe and returns the rotations."""

from collections.abc import Callable

from dfrot.methods.dfrot import dfrot
from dfrot.methods.duquant import duquant
from dfrot.methods.method import Context
from dfrot.methods.none import none
from dfrot.methods.quarot import quarot
from dfrot.transform.transforms import Transforms

METHODS: dict[str, Callable[[Context], Transforms]] = {
    "none": none,
    "quarot": quarot,
    "dfrot": dfrot,
    "duquant": duquant,
}
