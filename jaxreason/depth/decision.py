"""From router statistics to the layers that run: one function for training and for generation.

    wrap = read_wrap(skipper, valid)      a prompt, or a piece of it, through the model
    reading += outputs.depth              what its tokens told the routers (pieces add up)
    keep = decide(skipper, reading)       bool [B,L], once a prompt
    keep_wrap(keep)                       every later token, and prompts under a set that is given

FiRST, arXiv 2410.12513. Its equations could not be read: everything here is reconstructed.
"""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from jaxreason.core.errors import UserError
from jaxreason.nn.layer_wrap import LayerWrap, run_rows

Scope = Literal["everywhere", "decode_only"]
SATURATED = 30.0  # sigmoid(30) is 1 in float32, sigmoid(-30) is 1e-13.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """How a prompt's statistics p [L] become the set of layers that run."""

    rule: Literal["threshold", "top"] = "threshold"
    """`threshold`: layers with p >= threshold. `top`: the `kept` layers of the largest p, the lower
    layer where two are equal; needs scope decode_only (reconstructed)."""
    threshold: float = 0.5
    """Least mean keep probability of a layer that runs (reconstructed)."""
    kept: int = 0
    """Layers that run under `top`, those always kept included."""
    always_keep: tuple[int, ...] = (0, -1)
    """Layers that always run; -1 is the last (reconstructed: the first and the last)."""
    normalise: bool = True
    """Whether routers read the stream divided by its root mean square, token by token, or as it is
    (reconstructed: in pretrained models a few tokens' streams are a hundred times longer)."""

    def always(self, num_layers: int) -> tuple[bool, ...]:
        """Whether each layer always runs; UserError for a layer that the model does not have."""
        for layer in self.always_keep:
            if not -num_layers <= layer < num_layers:
                raise UserError(
                    f"decision.always_keep names layer {layer}, the model has layers 0 to "
                    f"{num_layers - 1}; leave it out"
                )
        kept = {layer % num_layers for layer in self.always_keep}
        return tuple(layer in kept for layer in range(num_layers))

    def check(self, num_layers: int, scope: Scope) -> None:
        """Raises UserError where the rule cannot work on a model of `num_layers` layers."""
        least = max(1, sum(self.always(num_layers)))
        if self.rule == "top" and scope == "everywhere":
            raise UserError(
                "decision.rule is top with scope everywhere, where a layer is decided before later "
                "layers are read; use scope decode_only or rule threshold"
            )
        if self.rule == "top" and not least <= self.kept <= num_layers:
            raise UserError(
                f"decision.kept is {self.kept}; expected {least} (the layers always kept) to "
                f"{num_layers} (all of them)"
            )
        if not 0 <= self.threshold <= 1:
            raise UserError(
                f"decision.threshold is {self.threshold}; expected a probability, 0.5 for example"
            )


@flax.struct.dataclass
class Skipper:
    """Routers and how their word is taken: what generation needs to skip layers by prompt.

    `routers`: {"w": [L,D], "b": [L]} float32, layer l's keep probability at a token being
    `sigmoid(w_l . h + b_l)` of the residual stream h that enters it. `scope`: `decode_only` reads
    prompts with all layers and skips in later tokens; `everywhere` skips in the prompt as well,
    which equals a model without those layers. Pass it through `jit` as any pytree.
    """

    routers: dict[str, jax.Array]
    scope: Scope = flax.struct.field(pytree_node=False, default="decode_only")
    decision: Decision = flax.struct.field(pytree_node=False, default=Decision())

    @property
    def num_layers(self) -> int:
        """Layers of the model that it belongs to."""
        return self.routers["b"].shape[0]


@flax.struct.dataclass
class Reading:
    """What prompt tokens told the routers: sums that add up over the pieces of a prompt.

    `total` [L,B] float32: the keep probabilities summed over tokens; `count` [L,B] float32: tokens;
    `keep` [L,B] bool: the layers that did run, a decision under `everywhere`. In training B is
    (B, S), one entry a segment.
    """

    total: jax.Array
    count: jax.Array
    keep: jax.Array

    def __add__(self, other: "Reading") -> "Reading":
        """The reading of a prompt's next piece added to this one's (scope decode_only)."""
        both = self.keep & other.keep
        return Reading(self.total + other.total, self.count + other.count, both)

    @property
    def p(self) -> jax.Array:
        """Mean keep probability [L,B]; 0 where there was no token."""
        return self.total / jnp.maximum(self.count, 1.0)


def read_wrap(skipper: Skipper, valid_bt: jax.Array) -> LayerWrap:
    """What reads prompts: pass it to `decoder.forward(..., wrap=)`; `Outputs.depth` is a Reading.

    `valid_bt` [B,T] bool or 0/1 marks the tokens that are no padding (`segment_ids > 0`). Under
    `decode_only` every layer runs, and a prompt may come in pieces whose readings are added. Under
    `everywhere` a layer is decided from all of the prompt's tokens before it runs, so the prompt
    has to come in one piece; a layer that no row keeps costs nothing.
    """
    skipper.decision.check(skipper.num_layers, skipper.scope)
    valid = valid_bt.astype(bool)

    def apply(run, x, cache, extra):
        w, b, always = extra
        r = keep_probability(w, b, x, skipper.decision.normalise)
        total = jnp.sum(jnp.where(valid, r, 0.0), axis=1)
        count = jnp.sum(valid, axis=1, dtype=jnp.float32)
        if skipper.scope == "decode_only":
            x, cache, routed = run(x, cache)
            keep = jnp.ones(count.shape, bool)
        else:
            keep = over_threshold(skipper.decision, total, count, always)
            x, cache, routed = run_rows(keep, run, x, cache)
        return x, cache, routed, Reading(total, count, keep)

    always = jnp.asarray(skipper.decision.always(skipper.num_layers))
    return LayerWrap(apply, (skipper.routers["w"], skipper.routers["b"], always))


def decide(skipper: Skipper, reading: Reading) -> jax.Array:
    """The layers that run for each prompt's later tokens, bool [B,L].

    A prompt without a token keeps every layer. A sum that is not finite keeps its own layer under
    the rule threshold, and every layer under top, whose ranking it would spoil.
    """
    if skipper.scope == "everywhere":
        return reading.keep.T
    return decide_layers(skipper.decision, reading.total, reading.count).T


def keep_wrap(keep_bl: jax.Array) -> LayerWrap:
    """Runs the layers of `keep_bl` [B,L] bool for each row: a token loop, or a set that is given.

    One compiled program for all sets. A layer that no row keeps is not computed; one that some
    rows keep is computed for all, and the others' streams stay as they are (the union). Rows whose
    results nobody reads should be False throughout (`keep & active[:, None]`). `Outputs.depth` is
    [L] bool: the layers that were computed.
    """

    # Once for all layers: what stands between two conditionals is paid for at every layer.
    any_l = jax.lax.optimization_barrier(jnp.any(keep_bl, axis=0))

    def apply(run, x, cache, extra):
        keep_b, any_row = extra
        x, cache, routed = run_rows(keep_b, run, x, cache, any_row)
        return x, cache, routed, any_row

    return LayerWrap(apply, (keep_bl.T, any_l))


def static_routers(keep: tuple[bool, ...] | jax.Array, d_model: int) -> dict[str, jax.Array]:
    """Routers that keep the given set of layers whatever they read; for input-agnostic peers.

    Use them with `Decision(always_keep=())` and the threshold rule. A prompt without a token keeps
    every layer, as with any routers.
    """
    b = jnp.where(jnp.asarray(keep), SATURATED, -SATURATED).astype(jnp.float32)
    return {"w": jnp.zeros((len(keep), d_model), jnp.float32), "b": b}


def keep_probability(w: jax.Array, b: jax.Array, x_btd: jax.Array, normalise: bool) -> jax.Array:
    """One layer's router at every token, [B,T] float32: `sigmoid(w . h + b)`."""
    h = x_btd.astype(jnp.float32)
    score = jnp.einsum("btd,d->bt", h, w.astype(jnp.float32))
    if normalise:
        score = score * jax.lax.rsqrt(jnp.mean(h * h, axis=-1) + 1e-6)
    return jax.nn.sigmoid(score + b)


def over_threshold(decision: Decision, total, count, always) -> jax.Array:
    """The threshold rule; `always` is bool, of a shape that broadcasts explicitly or scalar."""
    p = total / jnp.maximum(count, 1.0)
    return (p >= decision.threshold) | always | (count == 0) | ~jnp.isfinite(total)


def decide_layers(decision: Decision, total: jax.Array, count: jax.Array) -> jax.Array:
    """Both rules on the sums of all layers, [L,...] -> bool [L,...]."""
    num_layers = total.shape[0]
    always = jnp.asarray(decision.always(num_layers)).reshape(-1, *[1] * (total.ndim - 1))
    always = jnp.broadcast_to(always, total.shape)
    if decision.rule == "threshold":
        return over_threshold(decision, total, count, always)
    score = jnp.where(always, jnp.inf, total / jnp.maximum(count, 1.0))
    # A layer's place among all, the largest first; sorting is stable, so the lower layer wins.
    place = jnp.argsort(jnp.argsort(-score, axis=0, stable=True), axis=0)
    degenerate = jnp.any((count == 0) | ~jnp.isfinite(total), axis=0, keepdims=True)
    return (place < decision.kept) | degenerate
