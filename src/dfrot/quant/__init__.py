"""Integer grids, affine quantization, clipping, packing: tensors only."""
