"""What a model is: architectures as tables, checkpoints as sources of one decoder block at a time."""
