"""Running a stack's layers otherwise than one after the other: skipped, gated, watched.

A method that decides over layers wraps them; the layers know nothing of it. Skipping is real where
`jax.lax.cond` has a scalar predicate: under `vmap` it would become a select, which computes both
sides, so the code here is written batched.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# run(x [B,T,D], cache_l) -> (x, cache_l, routed): the layer as it is.
Run = Callable[[jax.Array, Any], tuple[jax.Array, Any, Any]]


@dataclasses.dataclass(frozen=True)
class LayerWrap:
    """What runs in place of each layer.

    `apply(run, x [B,T,D], cache_l, extra_l) -> (x, cache_l, routed, aux)`, where `run` is the layer
    itself, `cache_l` its part of a key-value cache (nothing without one), `routed` what its router
    of experts did (nothing without one; of the structure that `run` returns), `extra_l` the layer's
    slice of `per_layer`, whose leaves have a leading layer axis. `aux`, a pytree of arrays, comes
    back stacked over layers as `Outputs.depth`.
    """

    apply: Callable[[Run, jax.Array, Any, Any], tuple[jax.Array, Any, Any, Any]]
    per_layer: Any


def run_or_skip(keep: jax.Array, run: Run, x: jax.Array, cache: Any) -> tuple[jax.Array, Any, Any]:
    """The layer where `keep` (bool[]) says so, else nothing: x and cache come back as they were.

    A skipped layer's `routed` is zeros.
    """

    def skip(x, cache):
        routed = jax.eval_shape(run, x, cache)[2]
        return x, cache, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), routed)

    return jax.lax.cond(keep, run, skip, x, cache)


def run_rows(
    keep_b: jax.Array, run: Run, x: jax.Array, cache: Any, any_row: jax.Array | None = None
) -> tuple[jax.Array, Any, Any]:
    """The layer for the rows that `keep_b` [B] names; it costs nothing where none does.

    Where one does, all rows are computed and the others keep their `x`. The cache gets the new
    entries of all rows: who skipped is to be counted by `KVCache.advance`. `any_row` is
    `any(keep_b)`, where the caller has it for all layers already.
    """

    def run_kept(x, cache):
        new, cache, routed = run(x, cache)
        # Of one row, it is that row that runs.
        return new if len(keep_b) == 1 else jnp.where(keep_b[:, None, None], new, x), cache, routed

    keep = jnp.any(keep_b) if any_row is None else any_row
    return run_or_skip(keep, run_kept, x, cache)
