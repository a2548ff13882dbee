"""Rotations folded into weights, or left for the runtime."""
