"""Training by the KL divergence from the unquantized model: the teacher, the descent, what can move."""
