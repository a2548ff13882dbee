"""quantize(): the recipe, what it will take, and the loop over decoder blocks."""
