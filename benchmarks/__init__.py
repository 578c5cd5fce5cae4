"""Measurements behind the numbers in the documents; each is a command."""
