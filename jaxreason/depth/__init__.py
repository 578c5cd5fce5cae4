"""Adaptive depth: methods that decide which layers run, each wrapped around a model as it is."""
