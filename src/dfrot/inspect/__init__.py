"""Why a model is hard to quantize, in numbers."""
