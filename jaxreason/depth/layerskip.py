"""LayerSkip: layer dropout and a loss at every exit (Elhoushi et al., arXiv 2404.16710).

    x_(l+1) = x_l + M(p_(l,t)) f_l(x_l),  M = 0 with probability p, for each sample      (1) paper
    p_(l,t) = S(t) D(l) p_max                                                            (2) paper
    D(l)    = exp(l ln2 / (L-1)) - 1             0 at the first layer, 1 at the last     (3) paper
    S(t)    = 1, or exp(t ln2 / (T-1)) - 1 for pretraining from scratch                  (4) paper
    J(t)    = sum_l e~(t,l) J_CE(g(x_(l+1)), Y)  g: the model's own final norm and head  (5) paper
    e~(t,l) = C(t,l) e(l) / sum_i C(t,i) e(i)                                            (6) paper
    e(l)    = e_scale sum_(i<=l) i  below the last layer;  e(L-1) = L-1 + e_scale sum_(i<=L-2) i

The official code is torchtune's (modules/early_exit_loss, modules/layer_dropout; facebookresearch's
LayerSkip repository refers to it). Its D(l) is the paper's; it has no S(t), and other e(l): `scale`
names both. Its state "after layer l" is the one that enters the layer (modules/transformer), which
leaves the model's real output without a loss; that is not offered. The layers that run in
generation are the first E, for prompt and completion [paper, 4.2]. Here are the settings and the
schedules; the forward and the loss are `depth.exits`.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.core.errors import UserError
from jaxreason.depth.decision import Scope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSkipRecipe:
    """How LayerSkip trains; the values are the paper's for fine-tuning on code (section 5)."""

    dropout: float = 0.1
    """p_max, the dropout rate of the last layer. Paper: 0.1; 0.2 for a task and for 7B from
    scratch. A dropped row is computed and not taken: dropout saves no time."""
    e_scale: float = 1.0
    """Weight of the exits below the last layer, 0 to 1; 0 has none. Paper: 1.0 in fine-tuning, 0.1
    or 0.2 in pretraining."""
    scale: Literal["paper", "uniform", "linear", "sum"] = "paper"
    """e(l): the paper's; or the official code's 1, l + 1 or the sum of i + 1 over the enabled
    i <= l, each times e_scale below the last layer. The official config has `sum`, and its command
    that stands for the paper has `linear`."""
    curriculum: Literal["rotational", "gradual", "gradual_official", "none"] = "rotational"
    """C(t,l): every `interval`-th layer, one further at each step; or one more layer every T/2L
    steps, from the last down (paper: for a task). `gradual_official` is one interval and one step
    later, as in the official code. `none` has all exits at all steps."""
    interval: int = 16
    """R of the rotational curriculum: ceil(L/R) exits a step. Paper: 8 to 39."""
    gradual_share: float = 0.5
    """Part of the steps after which a gradual curriculum has all exits (1/2 in the paper and in the
    official code)."""
    last_layer: Literal["always", "curriculum"] = "always"
    """Whether the model's own output is learned at every step (official code), or takes turns like
    every other exit, which is the rotational equation as it stands (reconstructed: the paper says
    neither). With `scale=paper` the first layer's e is 0: its turn alone is a step of no loss."""

    def validate(self) -> None:
        """Raises UserError for values outside their range."""
        for name, least, most in (("dropout", 0, 1), ("e_scale", 0, 1)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"{name} is {getattr(self, name)}; expected {least} to {most}")
        if self.interval < 1:
            raise UserError(f"interval is {self.interval}; expected 1 or more layers")
        if not 0 < self.gradual_share <= 1:
            raise UserError(f"gradual_share is {self.gradual_share}; expected above 0, at most 1")
        if self.e_scale == 0 and self.last_layer == "curriculum":
            raise UserError(
                "e_scale is 0 with last_layer curriculum, whose steps without the last layer would "
                "learn nothing; set last_layer to always"
            )

    def check(self, num_layers: int) -> None:
        """Raises UserError where a model of `num_layers` does not fit."""
        if self.curriculum == "rotational" and self.interval > num_layers:
            raise UserError(
                f"interval is {self.interval}, the model has {num_layers} layers; expected 1 to "
                f"{num_layers}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSkip(LayerSkipRecipe):
    """The first layers, for every input, of a model that learned to be left early.

    S(t) is 1, as in the paper for models that were trained before.
    """

    kept: int = 0
    """Layers that run: E, the first ones."""
    scope: Scope = "everywhere"
    """Where the others are skipped; the prompt too, as nothing above E is needed (reconstructed).
    Under decode_only the prompt's last token is read by all layers, and so the first new token
    drawn; all else is the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSkipPretraining(LayerSkipRecipe):
    """LayerSkip for all weights; the values are the paper's for 1.5B from scratch, 24 layers."""

    e_scale: float = 0.2
    """Weight of the exits below the last layer, 0 to 1; 0 has none. Paper: 0.2; 0.1 or 0.2 where
    pretraining goes on."""
    interval: int = 23
    """R of the rotational curriculum: ceil(L/R) exits a step. Paper: 23 of 24 layers, 31 of 32; 8
    where pretraining goes on."""
    over_time: Literal["exponential", "constant"] = "exponential"
    """S(t): exponential from scratch, constant where pretraining goes on (both: paper)."""


def dropout_rates(p_max: float, num_layers: int) -> np.ndarray:
    """D(l) p_max of each layer, [L] float64; p_max for a model of one layer (official code)."""
    if num_layers == 1:
        return np.full(1, p_max)
    return (np.exp2(np.arange(num_layers) / (num_layers - 1)) - 1) * p_max


def time_scale(steps: int, step: Any) -> jax.Array:
    """S_exp(t) at `step` of `steps`, float32: 0 at the first, 1 at the last."""
    return jnp.exp2(jnp.asarray(step, jnp.float32) / max(steps - 1, 1)) - 1


def enabled(cfg: LayerSkipRecipe, num_layers: int, steps: int, step: Any) -> jax.Array:
    """C(t,l), bool [L]: the layers whose exit is learned at `step` of `steps`, from 0.

    Rotational: the layers (k R + t) mod L, as a list that is rolled by one a step (official code).
    """
    layer = jnp.arange(num_layers)
    match cfg.curriculum:
        case "rotational":
            on = (layer - step) % num_layers % cfg.interval == 0
        case "none":
            on = jnp.ones(num_layers, bool)
        case _:
            late = int(cfg.curriculum == "gradual_official")
            waits = num_layers - 1 - np.arange(num_layers) + late
            # A step's border is exact where it is whole, whatever the rounding of the share.
            begin = np.ceil(waits * cfg.gradual_share * steps / num_layers - 1e-9).astype(int)
            on = step >= jnp.asarray(begin + late)
    return on | (layer == num_layers - 1) if cfg.last_layer == "always" else on


def loss_scales(cfg: LayerSkipRecipe, num_layers: int, steps: int, step: Any) -> jax.Array:
    """e~(t,l), float32 [L], of sum 1; all 0 where no enabled layer has a weight."""
    on = enabled(cfg, num_layers, steps, step).astype(jnp.float32)
    number = np.arange(num_layers)
    below = np.where(number < num_layers - 1, cfg.e_scale, 1.0)
    match cfg.scale:
        case "paper":
            weight = cfg.e_scale * np.cumsum(number)
            before = cfg.e_scale * number[:-1].sum()
            # A model of one layer has one exit, of any weight.
            weight[-1] = num_layers - 1 + before if num_layers > 1 else 1.0
        case "uniform":
            weight = below
        case "linear":
            weight = (number + 1) * below
        case "sum":
            weight = jnp.cumsum((number + 1) * on) * below
    weight = on * jnp.asarray(weight, jnp.float32)
    return weight / jnp.maximum(jnp.sum(weight), 1e-30)


@functools.lru_cache
def exits_a_step(cfg: LayerSkipRecipe, num_layers: int, steps: int) -> float:
    """Mean number of exits below the last layer whose loss a step computes."""
    if num_layers == 1:
        return 0.0
    of_step = jax.vmap(lambda step: loss_scales(cfg, num_layers, steps, step)[:-1] > 0)
    return float(np.asarray(of_step(jnp.arange(steps))).sum()) / steps


def front(num_layers: int, kept: int) -> tuple[bool, ...]:
    """Whether each layer runs when the first `kept` do.

    Raises:
      UserError: `kept` is not 1 to `num_layers`.
    """
    if not 1 <= kept <= num_layers:
        raise UserError(f"kept is {kept}; expected 1 to {num_layers} (all)")
    return tuple(layer < kept for layer in range(num_layers))
