"""Numbers about loaded models."""
