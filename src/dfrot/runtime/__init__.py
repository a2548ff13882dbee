"""The quantized model at work: linear layers, attention, KV cache. Reads checkpoints only, never fits anything."""
