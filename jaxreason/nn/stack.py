"""Runs a stack of layers, scanned or unrolled, capturing the hidden states asked for."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxreason.core.errors import UserError

_policies = jax.checkpoint_policies
# What a kernel that computes attention names its output and log-sums.
ATTENTION = "attention"
# What a layer keeps for its backward pass; the rest is computed again.
REMAT = {
    "none": None,
    "full": _policies.nothing_saveable,
    "attention": _policies.save_only_these_names(ATTENTION),
    "dots": _policies.dots_saveable,
    "minimal": _policies.dots_with_no_batch_dims_saveable,
    "minimal_attention": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(ATTENTION)
    ),
}
Block = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


def run_stack(
    segments: Sequence[tuple[Block, int]],
    params: Sequence[Any],
    x: jax.Array,
    per_layer: Sequence[Any],
    *,
    capture: Sequence[int] = (),
    mode: str = "scan",
    remat: str = "none",
) -> tuple[jax.Array, dict[int, jax.Array], tuple[Any, ...]]:
    """Applies segments of `n` layers `block(params_l, x, per_layer_l) -> (x, aux_l)`.

    `params` and `per_layer` hold, a segment, a pytree with a leading layer axis; `params` may also
    be a tuple of one tree a layer, which runs unrolled in any mode. `capture` numbers
    the residual streams to return: 0 is the input, k the output of layer k. Captured states travel
    in a carry buffer of their own number, so all the other layers' are never held. Returns the
    last state, `{k: state}`, and a segment's `aux` stacked over its layers.
    """
    total = sum(n for _, n in segments)
    for layer in capture:
        if not 0 <= layer <= total:
            raise UserError(f"layer {layer} cannot be captured: the stack has layers 1 to {total}")
    if remat not in REMAT:
        raise UserError(f"remat is {remat!r}; expected one of {', '.join(REMAT)}")
    captured = {0: x} if 0 in capture else {}
    auxes, first = [], 0
    for (block, n), p, extra in zip(segments, params, per_layer, strict=True):
        scanned = mode == "scan" and not isinstance(p, tuple)
        if remat != "none":
            block = jax.checkpoint(block, policy=REMAT[remat], prevent_cse=not scanned)
        inside = [c for c in sorted(set(capture)) if first < c <= first + n]
        run = _scan if scanned else _unroll
        x, states, aux = run(block, p, x, extra, n, [c - first for c in inside])
        captured |= dict(zip(inside, states, strict=True))
        auxes.append(aux)
        first += n
    return x, captured, tuple(auxes)


def cut(layers, sizes: Sequence[int]) -> list:
    """A stacked tree, or a tuple of layers, as one for each segment of `sizes` layers."""
    if isinstance(layers, tuple) and len(sizes) > 1:
        return [layers[s] for s in _slices(sizes)]
    return cut_stacked(layers, sizes)


def cut_stacked(tree, sizes: Sequence[int]) -> list:
    """A tree with a leading layer axis as one for each segment of `sizes` layers."""
    if len(sizes) == 1:
        return [tree]
    return [jax.tree.map(lambda leaf, s=s: leaf[s], tree) for s in _slices(sizes)]


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = itertools.accumulate(sizes)
    return [slice(end - n, end) for end, n in zip(ends, sizes, strict=True)]


def unstack(tree, n: int) -> list:
    """A tree with a leading layer axis of length `n`, as `n` trees.

    Its gradient is one concatenation: that of indexing would pad every layer to the whole stack.
    """

    @jax.custom_vjp
    def split(leaf):
        return [leaf[i] for i in range(n)]

    split.defvjp(lambda leaf: (split(leaf), None), lambda _, parts: (jnp.stack(parts),))
    leaves, structure = jax.tree.flatten(tree)
    columns = [split(leaf) for leaf in leaves]
    return [jax.tree.unflatten(structure, [c[i] for c in columns]) for i in range(n)]


def _unroll(block, params, x, extra, n, capture):
    states, auxes = [], []
    layers = params if isinstance(params, tuple) else unstack(params, n)
    for i, (p, extra_l) in enumerate(zip(layers, unstack(extra, n), strict=True)):
        x, aux = block(p, x, extra_l)
        auxes.append(aux)
        if i + 1 in capture:
            states.append(x)
    return x, states, jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)


def _scan(block, params, x, extra, n, capture):
    # Layer i writes slot[i]; layers that nobody asked for share one spare slot at the end.
    slots = [capture.index(i + 1) if i + 1 in capture else len(capture) for i in range(n)]
    buffer = jnp.zeros((len(capture) + 1, *x.shape), x.dtype) if capture else None

    def body(carry, inputs):
        x, buffer = carry
        p, extra_l, slot = inputs
        x, aux = block(p, x, extra_l)
        if buffer is not None:
            buffer = jax.lax.dynamic_update_index_in_dim(buffer, x, slot, 0)
        return (x, buffer), aux

    (x, buffer), aux = jax.lax.scan(body, (x, buffer), (params, extra, jnp.asarray(slots)))
    return x, [buffer[i] for i in range(len(capture))] if buffer is not None else [], aux
