"""JAX's splash attention on TPU: a Pallas kernel that skips the blocks a causal row never sees.

Departures from how it is called elsewhere: rows of any length (padded to whole blocks with a
segment of their own), any head width, fewer key heads than devices (repeated), and queries cut
along T (the kernel's table of blocks is cut with them, so that it knows each part's place).
"""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.sharding import NamedSharding, PartitionSpec

from jaxreason.core.errors import UserError
from jaxreason.nn.kernels.per_device import per_device, sequence_parts
from jaxreason.nn.mask import Mask, pad_rows
from jaxreason.nn.stack import ATTENTION

# Rows of scores a block: MaxText's sa_block_* are all 512, for v5e and v5p alike, and its backward
# kernels are two, one for dq and one for dk, dv (sa_use_fused_bwd_kernel: false; base.yml of
# 0.2.5). The fused one writes a partial dq for each block of keys, in the queries' precision.
BLOCK = 512
# The kernel's lanes: a block is a multiple of it.
LANES = 128


def attention(
    q_bthk: jax.Array,
    k_btgk: jax.Array,
    v_btgk: jax.Array,
    mask: Mask,
    *,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention inside segments: [B,T,H,K]; `interpret` runs the kernel without a TPU.

    Raises UserError for a mask whose rows are not in order: the kernel compares columns, not
    positions. Scores, sums and the product with the values are float32 inside.
    """
    if not mask.in_row_order:
        raise UserError(
            "the splash attention sees rows as they lie, and these queries and keys have "
            "positions of their own (a cache); set model.attention to blocked or reference"
        )
    t, width = q_bthk.shape[1], q_bthk.shape[3]
    # What is cut is the padded row. The tokens added to fill a block see each other: a softmax over
    # nothing would be 0/0.
    parts = sequence_parts(t + -t % LANES)
    extra = -t % (parts * LANES)
    q, k, v = (pad_rows(x, extra) for x in (q_bthk * width**-0.5, k_btgk, v_btgk))
    mask = mask.longer(extra, extra) if extra else mask
    kernel = _make(t + extra, parts, mask.window, soft_cap, interpret)

    def run(q, k, v, mask, kernel):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        segments = kernel_lib.SegmentIds(mask.q_segments, mask.kv_segments)
        return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)

    def cut(mesh, seq):
        return kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, seq)))

    return per_device(run, q, k, v, mask, kernel, cut)[:, :t]


def _make(length: int, parts: int, window: int | None, soft_cap, interpret: bool):
    """The kernel of a row of `length` tokens whose queries are cut into `parts`."""
    shape = (length, length)
    if window is None:
        seen = mask_lib.CausalMask(shape)
    else:
        seen = mask_lib.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    q, kv = block(length // parts), block(length)
    sizes = kernel_lib.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    # One mask, which the kernel takes for every head.
    return kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([seen]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )


def block(length: int) -> int:
    """The largest block up to BLOCK that divides a `length` in whole lanes."""
    return next(b for b in range(BLOCK, 0, -LANES) if length % b == 0)
