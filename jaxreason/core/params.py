"""A parameter is described once; abstract shapes, shardings and initial values follow from it."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Describes one parameter: `shape`, logical `axes` (one name or None a dimension), `init`.

    A tree of specs is a model's whole description. It is a leaf for `jax.tree`, so the trees below
    have the structure of the parameters.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init
    dtype: Any = jnp.float32

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


def normal(stddev: float) -> Init:
    """Gaussian initial values with standard deviation `stddev`."""
    return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initial value of a scale."""
    return jnp.ones(shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initial value of a bias."""
    return jnp.zeros(shape, jnp.float32)


def path_name(path) -> str:
    """A parameter's name, for example `blocks/0/attn/q`."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def stack(specs, n: int):
    """Adds a leading `layers` axis of length `n`; each layer draws from a key of its own."""

    def one(spec: ParamSpec) -> ParamSpec:
        def init(key, shape):
            return jax.vmap(lambda k: spec.init(k, shape[1:]))(jax.random.split(key, n))

        return ParamSpec((n, *spec.shape), ("layers", *spec.axes), init, spec.dtype)

    return jax.tree.map(one, specs)


def abstract(specs, shardings=None):
    """The parameters as `jax.ShapeDtypeStruct`s: nothing is allocated."""
    if shardings is None:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
    return jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), specs, shardings
    )


def initialise(specs, key: jax.Array):
    """Draws the parameters; a parameter's key depends on its name, so adding one moves no other."""

    def one(path, spec):
        name_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        return spec.init(name_key, spec.shape).astype(spec.dtype)

    return jax.tree_util.tree_map_with_path(one, specs)


def count(specs) -> int:
    """Number of scalars in a tree of specs or of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(specs))
