"""What is trained after rounding, towards the unquantized model's predictions."""
