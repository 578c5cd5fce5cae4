"""cuDNN's fused attention on GPU, through `jax.nn.dot_product_attention`.

Segments go in as a bias [B,1,T,S] in the queries' precision (2 S bytes a query, shared by the
heads; nothing differentiates through it). cuDNN's packed rows would need none, but JAX offers them
in no public function. Rows in order are causal to cuDNN too, which then skips the upper triangle;
where the queries are cut along T it does not know their place, and the bias alone says what is
seen, at twice the work.
"""

import jax
import jax.numpy as jnp

from jaxreason.core.errors import UserError
from jaxreason.nn.kernels.per_device import per_device, sequence_parts
from jaxreason.nn.mask import Mask, pad_rows

# Widest head on every GPU with these kernels (Hopper takes 256, but a machine without a GPU
# compiles for both).
MAX_WIDTH = 128


def refusal(dtype, head_width: int, soft_cap: float | None) -> str:
    """Why cuDNN has no kernel for such heads, and what to set; empty where it has one."""
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return (
            f"takes bfloat16 and float16, the queries are {jnp.dtype(dtype).name}; set "
            "compute_dtype to bfloat16, or model.attention to blocked"
        )
    if soft_cap is not None:
        return f"has no soft cap (got {soft_cap}); set model.attention to blocked"
    if head_width % 8 or head_width > MAX_WIDTH:
        return (
            f"takes heads whose width is a multiple of 8 up to {MAX_WIDTH}, got {head_width}; set "
            "model.attention to blocked"
        )
    return ""


def attention(
    q_bthk: jax.Array,
    k_bsgk: jax.Array,
    v_bsgk: jax.Array,
    mask: Mask,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention [B,T,H,K]; raises UserError for what cuDNN cannot do (see `refusal`)."""
    why = refusal(q_bthk.dtype, q_bthk.shape[-1], soft_cap)
    if why:
        raise UserError(f"the cudnn attention {why}")
    t, s = q_bthk.shape[1], k_bsgk.shape[1]
    # A bias in training needs even lengths. First of all: what is cut is the padded row.
    if t % 2 or s % 2:
        mask = mask.longer(t % 2, s % 2)
        q_bthk, k_bsgk, v_bsgk = (pad_rows(x, x.shape[1] % 2) for x in (q_bthk, k_bsgk, v_bsgk))
    causal = mask.in_row_order and sequence_parts(q_bthk.shape[1]) == 1
    window = mask.window if causal else None

    def run(q, k, v, mask, _):
        return jax.nn.dot_product_attention(
            q, k, v,
            mask=_seen(mask, causal)[:, None],
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )  # fmt: skip

    return per_device(run, q_bthk, k_bsgk, v_bsgk, mask)[:, :t]


def _seen(mask: Mask, causal: bool) -> jax.Array:
    """Boolean [B,T,S]; where the kernel knows time by itself, the segments alone."""
    if causal:
        return mask.q_segments[:, :, None] == mask.kv_segments[:, None, :]
    return mask.allowed()
