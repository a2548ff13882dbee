"""Hadamard matrices, rotations, Procrustes: tensors only."""
