"""FiRST: a router a layer reads the prompt and decides whether the layer runs (arXiv 2410.12513).

    r_l(t) = sigmoid(w_l . h_l(t) + b_l)        router, one number a layer and token
    p_l    = mean over the prompt of r_l(t)     statistic of a sequence; decisions: depth.decision
    stage 1, routers alone:  h <- g B_l(h) + (1 - g) h,  g from r_l or p_l, or drawn;  loss
             L_CE + alpha mean(p) + lambda mean(p (1 - p)) + rate_weight (mean p - rho)^2
    stage 2, adapters alone: the layers run that the decision keeps, as in generation

The abstract gives the idea (a router a layer, a choice a sequence made from the prompt, adapters
trained after); reviews give two stages and two coefficients, lambda 0.01. No equation could be
read: each field below that says `reconstructed` is ours.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.core.objective import Batch, Objective
from jaxreason.core.outputs import Outputs
from jaxreason.core.params import ParamSpec
from jaxreason.depth import segments
from jaxreason.depth.decision import (
    Decision,
    Scope,
    Skipper,
    decide_layers,
    keep_probability,
    over_threshold,
)
from jaxreason.nn.layer_wrap import LayerWrap

NEEDS = ("tokens", "targets", "loss_weights", "segment_ids", "prompt_mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstConfig:
    """Routers, how they are trained, and how their word is taken."""

    scope: Scope = "decode_only"
    """`decode_only`: the prompt runs every layer, the completion those that were decided.
    `everywhere`: the prompt skips too, a layer being decided before it runs (reconstructed; the
    abstract fits both)."""
    decision: Decision = Decision()
    """From statistics to layers."""
    gate: Literal["sequence", "token"] = "sequence"
    """Stage 1 mixes a layer in by the sequence's p_l or by each token's own r_l (reconstructed)."""
    form: Literal["soft", "straight_through", "explore"] = "soft"
    """Stage 1 mixes by probabilities; or by hard decisions with the gradient of the probabilities;
    or every layer runs but those, drawn by sequence, whose gate is uniform in (0, 1): its gradient,
    which the probability gets, is on average what the layer is worth, and not the slope at a layer
    that runs (reconstructed; the reviews speak of probabilistic skipping)."""
    explore: float = 0.25
    """Under `explore`: the share of gates that are drawn (reconstructed)."""
    alpha: float = 0.1
    """Weight of the mean keep probability (the paper has an alpha; value reconstructed)."""
    reg_weight: float = 0.01
    """The paper's lambda: weight of the regulariser."""
    regulariser: Literal["binary", "l2"] = "binary"
    """What lambda weighs: mean of p (1 - p), or the squared norm of all w (reconstructed)."""
    rate_weight: float = 0.0
    """Weight of (mean p - rate_target)^2, which holds the share of kept layers (reconstructed)."""
    rate_target: float = 0.75
    """rho: share of the layers that are not always kept which shall run (reconstructed)."""
    rate_over: Literal["sequence", "batch"] = "sequence"
    """What shall keep that share: each sequence, or a (micro-)batch on average (reconstructed)."""
    penalty_tokens: Literal["prompt", "valid"] = "prompt"
    """Tokens whose r_l the penalties average: those that decide, or all (reconstructed)."""
    init_bias: float = 4.0
    """First b: sigmoid(4) = 0.98, so that training starts near the full model (reconstructed)."""
    init_std: float = 0.0
    """Standard deviation of the first w (reconstructed)."""
    init_order: Literal["equal", "influence", "cost"] = "equal"
    """First b of the layers: `init_bias` for all, or spread about it by the rank of their block
    influence, or of what skipping each alone costs on training batches (depth.skip_cost), so that
    training starts at that peer's set and learns to leave it (reconstructed)."""
    init_spread: float = 1.0
    """Under an order: how far above and below `init_bias` the first b lie (reconstructed)."""

    def validate(self) -> None:
        """Raises UserError for values outside their range."""
        for name in ("alpha", "reg_weight", "rate_weight", "init_std", "init_spread"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= self.rate_target <= 1:
            raise UserError(f"rate_target is {self.rate_target}; expected a share from 0 to 1")
        if not 0 < self.explore <= 1:
            raise UserError(f"explore is {self.explore}; expected a share above 0, at most 1")
        if (self.form, self.gate) == ("explore", "token"):
            raise UserError("form is explore with gate token; its draws are a sequence's, set gate")
        if (self.decision.rule, self.gate, self.form) == ("top", "token", "straight_through"):
            raise UserError(
                "decision.rule is top with gate token and form straight_through, whose gates are "
                "each token's own threshold; set gate to sequence, or form to soft"
            )


@flax.struct.dataclass
class Gates:
    """What the routers did in a training forward, by layer, row and segment (slot 0 is padding).

    `p` [L,B,S]: the statistic over the prompt; `mean` [L,B,S]: r over the tokens that penalties
    average; `keep` [L,B,S] bool: the decision; `norm` [L]: the squared norm of w.
    """

    p: jax.Array
    mean: jax.Array
    keep: jax.Array
    norm: jax.Array


def specs(cfg: FirstConfig, num_layers: int, d_model: int) -> dict[str, ParamSpec]:
    """The routers: `w` [L,D] and `b` [L], with which every layer is kept at first."""

    def bias(key, shape):
        return jnp.full(shape, cfg.init_bias, jnp.float32)

    return {
        "w": ParamSpec((num_layers, d_model), ("layers", "embed"), P.normal(cfg.init_std)),
        "b": ParamSpec((num_layers,), ("layers",), bias),
    }


def ranked_bias(cfg: FirstConfig, worth: np.ndarray) -> np.ndarray:
    """First b [L] under an `init_order`: evenly spaced, in the order of the layers' worth [L]."""
    rank = np.argsort(np.argsort(worth, kind="stable"), kind="stable")
    even = 2.0 * rank / max(len(rank) - 1, 1) - 1.0
    return (cfg.init_bias + cfg.init_spread * even).astype(np.float32)


def skipper(cfg: FirstConfig, routers: dict[str, jax.Array]) -> Skipper:
    """What generation needs of trained routers."""
    return Skipper(routers, cfg.scope, cfg.decision)


def forward(
    cfg: FirstConfig,
    routers: dict[str, jax.Array],
    batch: Batch,
    run: Callable[[LayerWrap], Outputs],
    *,
    hard: bool,
    key: jax.Array | None = None,
) -> Outputs:
    """A training forward over packed segments: `run(wrap)` is the model's, which it wraps.

    `hard` runs the layers that generation would run (stage 2, and evaluation); otherwise the gates
    of stage 1, some of which `explore` draws with the step's `key`. `Outputs.depth` is `Gates`. The
    rule `top` needs all statistics before the first completion token meets a layer, as generation
    has them: one more forward, without gradient.
    """
    num_layers = routers["b"].shape[0]
    cfg.decision.check(num_layers, cfg.scope)
    given = None
    if cfg.decision.rule == "top" and (hard or cfg.form == "straight_through"):
        frozen = jax.lax.stop_gradient(routers)
        total, count = run(_reading_wrap(cfg, frozen, batch)).depth
        given = jax.lax.stop_gradient(decide_layers(cfg.decision, total, count))
    drawn = None
    if cfg.form == "explore" and not hard:
        drawn = explored_gates(cfg, key, batch, num_layers)
    return run(training_wrap(cfg, routers, batch, hard=hard, keep=given, drawn=drawn))


def explored_gates(cfg: FirstConfig, key: jax.Array | None, batch: Batch, num_layers: int):
    """Drawn gates [L,B,S] of `form="explore"`, 1 where a layer runs as ever.

    A segment's depend on the key, the layer and the segment's `example_id` alone, so that
    micro-batches draw what the whole batch draws.

    Raises:
      ValueError: there is no key, or the batch has no `example_id`.
    """
    if key is None or "example_id" not in batch:
        raise ValueError("form explore needs the step's key and the batch's example_id")
    example_bs = segments.of_batch(batch).largest(batch["example_id"])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, example_bs.reshape(-1))
    draw_2l = jax.vmap(lambda k: jax.random.uniform(k, (2, num_layers)))(keys)
    chance, gate = jnp.moveaxis(draw_2l.reshape(*example_bs.shape, 2, num_layers), (2, 3), (0, 1))
    return jnp.where(chance < cfg.explore, gate, 1.0)


def training_wrap(
    cfg: FirstConfig,
    routers: dict[str, jax.Array],
    batch: Batch,
    *,
    hard: bool,
    keep: jax.Array | None = None,
    drawn: jax.Array | None = None,
) -> LayerWrap:
    """Gated (stage 1) or hard (stage 2) layers over packed segments; `Outputs.depth` is `Gates`.

    `batch` has `segment_ids` and `prompt_mask` [B,T]. `keep` [L,B,S] bool gives the decisions where
    another forward made them, `drawn` [L,B,S] the gates of `form="explore"`. Every layer is
    computed for all tokens and selected by masks: what the tokens of a segment see is what they see
    in generation, since those that skip a layer are read, in that layer, only by tokens that skip
    it too.
    """
    where = segments.of_batch(batch)
    decision, scope = cfg.decision, cfg.scope

    def apply(run, x, cache, extra):
        w, b, always, given, tried = extra
        r = keep_probability(w, b, x, decision.normalise)
        total, count = where.sums(r, where.prompt)
        p = total / jnp.maximum(count, 1.0)
        own = over_threshold(decision, total, count, always)
        decided = own if keep is None else given
        mean = p if cfg.penalty_tokens == "prompt" else where.mean(r, where.valid)
        new, cache, routed = run(x, cache)
        runs_all = ~where.valid | (where.prompt if scope == "decode_only" else False)
        if hard:
            x = jnp.where((runs_all | where.spread(decided))[:, :, None], new, x)
        else:
            free = where.spread(always | (count == 0))
            gate = where.spread(p) if cfg.gate == "sequence" else r
            if cfg.form == "straight_through":
                by_token = r >= decision.threshold
                forced = where.spread(decided) if cfg.gate == "sequence" else by_token
                gate = forced + (gate - jax.lax.stop_gradient(gate))
            elif cfg.form == "explore":
                through = jnp.where(tried < 1.0, p - jax.lax.stop_gradient(p), 0.0)
                gate = where.spread(tried + through)
            gate = jnp.where(runs_all | free, 1.0, gate)[:, :, None]
            mixed = gate * new.astype(jnp.float32) + (1.0 - gate) * x.astype(jnp.float32)
            # Unrolled, XLA would compute the sums of all layers below again in each: compiling 30
            # layers took 65 s of CPU time in place of 13.
            x = jax.lax.optimization_barrier(mixed.astype(x.dtype))
        return x, cache, routed, Gates(p, mean, decided, jnp.sum(w * w))

    num_layers = routers["b"].shape[0]
    always = jnp.asarray(decision.always(num_layers))
    none = jnp.zeros((num_layers, 0), bool)
    given = [none if values is None else values for values in (keep, drawn)]
    return LayerWrap(apply, (routers["w"], routers["b"], always, *given))


def _reading_wrap(cfg: FirstConfig, routers, batch: Batch) -> LayerWrap:
    """Every layer runs; the sums of the statistics come back."""
    where = segments.of_batch(batch)

    def apply(run, x, cache, extra):
        w, b = extra
        r = keep_probability(w, b, x, cfg.decision.normalise)
        x, cache, routed = run(x, cache)
        return x, cache, routed, where.sums(r, where.prompt)

    return LayerWrap(apply, (routers["w"], routers["b"]))


def penalties(cfg: FirstConfig, num_layers: int) -> Objective:
    """What stage 1 adds to the loss of the completions, and what both stages report.

    Terms: `keep` (weight alpha), `reg` (lambda), `rate`; means over the segments that have a
    prompt and over the layers that are not always kept, so that micro-batches add up exactly
    (`rate_over="batch"` is a micro-batch's own). Combine it with `lm.next_token`.

    Metrics: `depth/p` the mean statistic, `depth/kept_layers` a sequence (those always kept
    included), `depth/distance` the mean of min(p, 1 - p), how far gates are from hard, and
    `depth/keep_<layer>` each layer's share of sequences that keep it.
    """
    always = jnp.asarray(cfg.decision.always(num_layers))
    routed = (~always).astype(jnp.float32)
    routed = routed / jnp.maximum(jnp.sum(routed), 1.0)

    def denominators(batch):
        count = jnp.sum(segments.of_batch(batch).has_prompt(), dtype=jnp.float32)
        return {"keep": count, "reg": count, "rate": count}

    def terms(outputs, frozen, batch, aux_state, key, step):
        gates, has = outputs.depth, segments.of_batch(batch).has_prompt().astype(jnp.float32)
        count = jnp.sum(has)
        over_layers = lambda value: jnp.einsum("l,lbs->bs", routed, value)  # noqa: E731
        over = lambda value_bs: jnp.sum(value_bs * has)  # noqa: E731
        mean = over_layers(gates.mean)
        if cfg.regulariser == "binary":
            reg = over(over_layers(gates.mean * (1.0 - gates.mean)))
        else:
            reg = jnp.sum(gates.norm) * count
        if cfg.rate_over == "sequence":
            rate = over((mean - cfg.rate_target) ** 2)
        else:
            rate = count * (over(mean) / jnp.maximum(count, 1.0) - cfg.rate_target) ** 2
        keep = gates.keep
        if cfg.decision.rule == "top":  # Soft gates had to run before all layers had their say.
            keep = decide_layers(cfg.decision, gates.p, jnp.broadcast_to(has, gates.p.shape))
        kept_l = jnp.einsum("lbs,bs->l", keep.astype(jnp.float32), has)
        metrics = {
            "depth/p": (over(over_layers(gates.p)), count),
            "depth/kept_layers": (jnp.sum(kept_l), count),
            "depth/distance": (over(over_layers(jnp.minimum(gates.p, 1 - gates.p))), count),
            "depth/penalty": (
                cfg.alpha * over(mean) + cfg.reg_weight * reg + cfg.rate_weight * rate, count,
            ),
        }  # fmt: skip
        metrics |= {f"depth/keep_{l:02d}": (kept_l[l], count) for l in range(num_layers)}
        return {"keep": over(mean), "reg": reg, "rate": rate}, metrics, None

    return Objective(
        denominators=denominators,
        terms=terms,
        coefficients={
            "keep": optax.constant_schedule(cfg.alpha),
            "reg": optax.constant_schedule(cfg.reg_weight),
            "rate": optax.constant_schedule(cfg.rate_weight),
        },
        needs=NEEDS,
    )


def watched(cfg: FirstConfig, num_layers: int) -> Objective:
    """The metrics of `penalties` without its loss: for stage 2, whose routers do not move."""
    plain = penalties(cfg, num_layers)

    def terms(*args):
        _, metrics, update = plain.terms(*args)
        metrics.pop("depth/penalty")
        return {}, metrics, update

    return dataclasses.replace(
        plain, denominators=lambda batch: {}, terms=terms, coefficients={}
    )  # fmt: skip
