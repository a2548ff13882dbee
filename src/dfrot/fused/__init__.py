"""Decoder blocks in few calls, where the kernels can: faster, and nothing else. Importing it is what turns it on."""

from dfrot.fused.block import fuse_block_
from dfrot.runtime.install import BLOCK_HOOKS

if fuse_block_ not in BLOCK_HOOKS:
    BLOCK_HOOKS.append(fuse_block_)
