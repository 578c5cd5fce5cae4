"""Grouped-query attention behind one function: the definition, and the kernels of each platform.

| backend | where | memory a layer | what it refuses |
|---|---|---|---|
| reference | anywhere | scores [B,H,T,S], float32 | nothing |
| cpu | XLA's CPU compiler | probabilities [B,H,T,S] | a soft cap |
| blocked | anywhere | one block of scores a head | nothing |
| splash | TPU (JAX's Pallas kernel) | one block of scores a head | rows that are not in order |
| cudnn | GPU (cuDNN's fused kernel) | a bias [B,1,T,S] | float32, a soft cap, heads of odd widths |

All honour segments and windows. On a mesh with a sequence axis the queries stay cut along T, and
the keys and values of a row are gathered: 2 S G K numbers a row and layer each way, forward and
(where the backward pass computes again) once more, and their gradients summed back into pieces.
What lies over T is cut T/n a device; the last piece sees the most keys, so that causal attention
takes up to (2n - 1)/n of its balanced time there.
"""

import jax
import jax.numpy as jnp

from jaxreason.core.errors import UserError, nearest
from jaxreason.core.mesh import shard
from jaxreason.nn.kernels import blocked, cpu, cudnn, splash
from jaxreason.nn.mask import Mask, make_mask

__all__ = ["BACKENDS", "Mask", "attention", "check_platform", "choose_backend", "make_mask"]
__all__ += ["reference_attention"]

BACKENDS = ("reference", "cpu", "blocked", "splash", "cudnn")
# Rows of this many tokens and more go by blocks on CPU. That is slower, 2.7 to 4.4 times at 1024
# to 4096 tokens (bfloat16, on a machine busy with other work), but a layer of 9 heads, 64 wide,
# then holds 69 MB for a row of 4096, forward and backward, where the cpu form holds 1208 MB; at
# 2048 tokens 62 and 302 MB.
CPU_BLOCKED_FROM = 4096


def choose_backend(
    platform: str,
    *,
    head_width: int,
    soft_cap: float | None = None,
    dtype=None,
    seq_len: int | None = None,
) -> str:
    """What `auto` means on a platform (`tpu`, `gpu` or `cuda`, `cpu`).

    TPU: splash, which takes any shape. GPU: cudnn for half-precision queries without a soft cap
    whose heads it has a kernel for, else blocked (so also where `dtype` is None, not known). CPU:
    its own form for short rows, blocked from CPU_BLOCKED_FROM tokens, reference with a soft cap.
    """
    if platform == "tpu":
        return "splash"
    if platform in ("gpu", "cuda"):
        fits = dtype is not None and not cudnn.refusal(dtype, head_width, soft_cap)
        return "cudnn" if fits else "blocked"
    if platform != "cpu":
        return "blocked"
    if seq_len is not None and seq_len >= CPU_BLOCKED_FROM:
        return "blocked"
    return "cpu" if soft_cap is None else "reference"


def check_platform(backend: str, platform: str) -> None:
    """Raises UserError where a backend is a kernel of another platform than the one named."""
    home = {"splash": ("tpu",), "cudnn": ("gpu", "cuda")}.get(backend, (platform,))
    if platform not in home:
        raise UserError(
            f"model.attention is {backend}, a kernel of {home[0]}, and this runs on {platform}; "
            "set it to auto, blocked or reference"
        )


def reference_attention(
    q_bthk: jax.Array,
    k_bsgk: jax.Array,
    v_bsgk: jax.Array,
    mask_bts: jax.Array,
    *,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention from its definition, softmax in float32; the yardstick of every other backend."""
    b, t, h, d = q_bthk.shape
    groups = k_bsgk.shape[2]
    q = (q_bthk * d**-0.5).reshape(b, t, groups, h // groups, d)
    logits = jnp.einsum("btgrk,bsgk->bgrts", q, k_bsgk, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(mask_bts[:, None, None], logits, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(logits, axis=-1).astype(v_bsgk.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", probs, v_bsgk).reshape(b, t, h, d)


def attention(
    q_bthk: jax.Array,
    k_bsgk: jax.Array,
    v_bsgk: jax.Array,
    mask: Mask,
    *,
    soft_cap: float | None = None,
    backend: str,
) -> jax.Array:
    """Attention of queries [B,T,H,K] to keys and values [B,S,G,K], H a multiple of G.

    A query sees the keys of its own segment at positions not after its own. A row without any such
    key (padding) gets finite numbers that must not be read. Returns [B,T,H,K].
    """
    if backend not in BACKENDS:
        raise UserError(
            f"attention backend is {backend!r}; expected one of {', '.join(BACKENDS)}"
            f"{nearest(backend, BACKENDS)}"
        )
    if backend in ("blocked", "splash", "cudnn"):
        kernel = {"blocked": blocked, "splash": splash, "cudnn": cudnn}[backend]
        return kernel.attention(q_bthk, k_bsgk, v_bsgk, mask, soft_cap=soft_cap)
    # The keys of a row whole, at one place: otherwise XLA gathers them once for every use.
    k_bsgk, v_bsgk = (shard(x, "batch", None, "kv_heads", None) for x in (k_bsgk, v_bsgk))
    if backend == "cpu":
        if soft_cap is not None or mask.bias is None:
            raise UserError(
                "the cpu attention needs its own mask and has no soft cap; use reference"
            )
        return cpu.attention(q_bthk, k_bsgk, v_bsgk, mask.bias)
    return reference_attention(q_bthk, k_bsgk, v_bsgk, mask.allowed(), soft_cap=soft_cap)
