"""jaxreason: train reasoning language models that learn earlier and think less, in JAX."""

__version__ = "0.1.0"
