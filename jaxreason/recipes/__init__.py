"""Recipes compose the rooms into runs; each opens with its story in a few lines."""
