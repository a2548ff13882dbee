"""GGUF files as models to start from. Importing it is what makes them known."""

from dfrot.gguf.reader import found
from dfrot.models.pending import FORMATS

if found not in FORMATS:
    FORMATS.append(found)
