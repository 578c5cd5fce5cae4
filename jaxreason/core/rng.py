"""Randomness: keys are split by name and never stored mutated."""

import zlib

import jax


def base_key(seed: int) -> jax.Array:
    """The run's key, from which every other follows."""
    return jax.random.key(seed)


def named(key: jax.Array, name: str) -> jax.Array:
    """The key for one purpose; adding a purpose moves no other."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
