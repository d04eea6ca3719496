"""Recipes as annotated YAML; `diffalign recipes list` shows them."""
