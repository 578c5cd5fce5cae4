"""What a model's forward gives, and what objectives, routers and exits read."""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class Outputs:
    """One forward's results.

    `final` [B,T,D] is the residual stream after the final norm, `captured` maps a layer number to
    the residual stream [B,T,D] there (0 is the embedding, k is after block k), `unembed` [D,V] is
    the matrix that turns `final` into logits (by chunks: they are never held whole), `soft_cap`
    bounds logits as `cap * tanh(logits / cap)`, `aux` holds what layers returned besides, with a
    leading layer axis. `cache` is the updated key-value cache of a decoding forward. `kernels` says
    for which platform's compiler the products with `unembed` are written (`xla` or `cpu`). `depth`
    holds what a wrap around the layers returned (nn.layer_wrap), with a leading layer axis.
    """

    final: jax.Array
    captured: dict[int, jax.Array]
    unembed: jax.Array | None = None
    soft_cap: float | None = flax.struct.field(pytree_node=False, default=None)
    kernels: str = flax.struct.field(pytree_node=False, default="xla")
    aux: Any = None
    cache: Any = None
    depth: Any = None
