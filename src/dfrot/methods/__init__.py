"""One file per paper. A method looks at a model and returns the rotations."""

from typing import Any

from dfrot.methods.dfrot import DFRot
from dfrot.methods.duquant import DuQuant
from dfrot.methods.learned import Learned
from dfrot.methods.method import Method, NoRotation
from dfrot.methods.quarot import QuaRot
from dfrot.methods.rangerot import RangeRot

_KINDS: tuple[type[Method], ...] = (NoRotation, QuaRot, DFRot, RangeRot, Learned, DuQuant)
METHODS = {kind.name: kind for kind in _KINDS}


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """The names under which papers compare rotations (none, RO, RH, …), each with its method and options."""
    return {
        word: (name, dict(options))
        for name, kind in METHODS.items()
        for word, options in (kind.variants or {name: {}}).items()
    }


# Those whose rotations one sample of text shows; the others have scales too, and learn them from a whole text.
ROTATIONS = {word: of for word, of in variants().items() if not METHODS[of[0]].reads_all_text}
