"""A model by many recipes: trials, their table, published numbers."""
