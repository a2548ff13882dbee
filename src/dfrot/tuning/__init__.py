"""What is trained after rounding: everything continuous, towards the unquantized model's predictions."""
