"""Cross-entropy and distillation by chunks of the sequence: float32 logits are never held whole."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxreason.core.mesh import PARAM_RULES, parts, shard
from jaxreason.nn.kernels import cpu
from jaxreason.nn.linear import linear

# Float32 logits held at once, in elements a device (256 MB), where no chunk is configured.
AUTO_ELEMENTS = 2**26


class TokenLoss(NamedTuple):
    """Sums over weighted tokens, float32: `loss` carries the gradient, the others are metrics."""

    loss: jax.Array
    nll: jax.Array
    z_squared: jax.Array
    correct: jax.Array


def _zero() -> TokenLoss:
    zero = jnp.float32(0)
    return TokenLoss(zero, zero, zero, zero)


def auto_chunk(shape: tuple[int, ...], vocab: int, chunk: int = 0) -> int:
    """Tokens a row of a [B,T] batch to treat at once: `chunk`, or the largest divisor that fits."""
    batch, time = shape
    if not chunk:
        chunk = max(1, AUTO_ELEMENTS // (batch * vocab))
    chunk = min(chunk, time)
    while time % chunk:
        chunk -= 1
    return chunk


def _cut(shape: tuple[int, ...], vocab: int, chunk: int) -> tuple[tuple[int, int], int]:
    """Into how many parts the mesh cuts the rows and the sequence, and the tokens of a chunk."""
    (b, t), (rows, seq) = shape, (parts("batch", shape[0]), parts("seq", shape[1]))
    return (rows, seq), auto_chunk((b // rows, t // seq), vocab // parts("vocab", vocab), chunk)


def _split(x: jax.Array, cut: tuple[int, int], chunk: int) -> jax.Array:
    """[B,T,...] -> [chunks, *cut, rows, chunk, ...]: a piece of every device's part a chunk.

    On one device the two axes of the cut are left out.
    """
    (b, t), (rows, seq), rest = x.shape[:2], cut, x.shape[2:]
    if rows * seq == 1:
        return jnp.moveaxis(x.reshape(b, t // chunk, chunk, *rest), 1, 0)
    x = x.reshape(rows, b // rows, seq, t // seq // chunk, chunk, *rest)
    x = jnp.moveaxis(x, (3, 0, 2), (0, 1, 2))
    return shard(x, None, "batch", "seq", *(None,) * (x.ndim - 3))


def _join(x: jax.Array, cut: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """The way back from `_split`."""
    if cut == (1, 1):
        return jnp.moveaxis(x, 0, 1).reshape(shape)
    return shard(jnp.moveaxis(x, (0, 1, 2), (3, 0, 2)).reshape(shape), "batch", "seq", None)


def _each(x_dv: jax.Array, cut: tuple[int, int]) -> jax.Array:
    """[D,V] -> [*cut,D,V]: one copy for each part of the batch, on the devices that hold it.

    Its gradient is summed over the devices once, at the end. That of the table itself, in a loop
    over chunks, would be summed over them in every turn.
    """
    if cut == (1, 1):
        return x_dv
    copies = jnp.broadcast_to(x_dv, (*cut, *x_dv.shape))
    return shard(copies, "batch", "seq", None, "vocab")


def _logits(hidden, unembed, soft_cap, kernels):
    if kernels == "cpu" and hidden.ndim == 3:
        # Asked for float32, XLA would leave AMX (see kernels/cpu.py).
        raw = cpu.linear(hidden, unembed).astype(jnp.float32)
    else:
        raw = jnp.einsum(
            "...btd,...dv->...btv", hidden, unembed, preferred_element_type=jnp.float32
        )
    return raw if soft_cap is None else soft_cap * jnp.tanh(raw / soft_cap)


def _at(logits, targets, kernels):
    """Each token's logit of its target."""
    if kernels == "cpu":
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # A sum of one value and zeros: fused with what reads the logits, and cut with the vocabulary,
    # where a gather would collect it.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)


def _chunk_sums(hidden, unembed, targets, weights, z_loss, soft_cap, kernels):
    logits = _logits(hidden, unembed, soft_cap, kernels)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_target = _at(logits, targets, kernels)
    nll = jnp.sum(weights * (log_z - at_target))
    z_squared = jnp.sum(weights * log_z**2)
    correct = jnp.sum(weights * (at_target >= logits.max(axis=-1)))
    return TokenLoss(nll + z_loss * z_squared, nll, z_squared, correct), (logits, log_z)


def _weighted_first(weights_bt: jax.Array, cut: tuple[int, int]) -> jax.Array | None:
    """[B,T]: the order that puts a row's weighted tokens before the others; None for a cut row."""
    return jnp.argsort(weights_bt == 0, axis=1, stable=True) if cut[1] == 1 else None


def _ordered(x: jax.Array, order_bt: jax.Array | None) -> jax.Array:
    """[B,T,...] with the tokens of every row in another order."""
    if order_bt is None:
        return x
    return jnp.take_along_axis(x, order_bt.reshape(*order_bt.shape, *(1,) * (x.ndim - 2)), axis=1)


def _part_of(time: int, chunk: int, n: int) -> int:
    """Tokens a row to treat at once: `chunk`, but an n-th of the row at most."""
    chunk = min(chunk, max(1, time // n))
    while time % chunk:
        chunk -= 1
    return chunk


def _plan(targets_bt, weights_bt, vocab: int, chunk: int, sparse: bool):
    """The cut, the chunk and the order of a batch's tokens."""
    cut, chunk = _cut(targets_bt.shape, vocab, chunk)
    order = _weighted_first(weights_bt, cut) if sparse else None
    if order is not None:
        chunk = _part_of(targets_bt.shape[1], chunk, 8)  # Most have no weight.
    return cut, chunk, order


def _few(hidden_btd: jax.Array, cut: tuple[int, int]) -> bool:
    """Whether a device has no more tokens than features: its logits fit where its table lies."""
    (b, t, d), (rows, seq) = hidden_btd.shape, cut
    return cut != (1, 1) and b // rows * (t // seq) <= d


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def cross_entropy(
    hidden_btd: jax.Array,
    unembed_dv: jax.Array,
    targets_bt: jax.Array,
    weights_bt: jax.Array,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk: int = 0,
    kernels: str = "xla",
    sparse: bool = False,
) -> TokenLoss:
    """Sum over tokens of `w * (logsumexp - logit[target] + z_loss * logsumexp^2)`, in nats.

    Only `.loss` may be differentiated, with respect to `hidden` and `unembed`: its gradient is
    computed chunk by chunk beside the forward, so no logits are kept and none is computed twice;
    none of a frozen `unembed` is computed. `sparse` is for batches in which most tokens have no
    weight: the others come first, and chunks without any are passed over (unless the mesh cuts the
    sequence, which makes it void).
    """
    cut, chunk, order = _plan(targets_bt, weights_bt, unembed_dv.shape[1], chunk, sparse)
    unembed = _each(unembed_dv, cut)

    def sums_of(xs):
        return _chunk_sums(xs[0], unembed, xs[1], xs[2], z_loss, soft_cap, kernels)[0]

    def body(total, xs):
        if order is None:
            sums = sums_of(xs)
        else:
            sums = jax.lax.cond(jnp.any(xs[2] != 0), sums_of, lambda _: _zero(), xs)
        return jax.tree.map(jnp.add, total, sums), None

    batch = (hidden_btd, targets_bt, weights_bt)
    xs = tuple(_split(_ordered(x, order), cut, chunk) for x in batch)
    return jax.lax.scan(body, _zero(), xs)[0]


def _forward(
    hidden_btd, unembed_dv, targets_bt, weights_bt, z_loss, soft_cap, size, kernels, sparse
):
    learned = unembed_dv.perturbed
    batch = tuple(x.value for x in (hidden_btd, targets_bt, weights_bt))
    hidden_btd, targets_bt, weights_bt = batch
    unembed_dv = unembed_dv.value
    cut, chunk, order = _plan(targets_bt, weights_bt, unembed_dv.shape[1], size, sparse)
    unembed = _each(unembed_dv, cut)
    # The gradients of few logits are kept instead of the table's float32 sum, which is then one
    # product behind the loop: the copy of the table is free by then.
    keep = learned and order is None and _few(hidden_btd, cut)
    if keep and not size:
        chunk = _part_of(targets_bt.shape[1] // cut[1], chunk, 4)

    def gradients_of(carry, xs):
        total, d_unembed = carry
        hidden, targets, weights = xs
        sums, (logits, log_z) = _chunk_sums(
            hidden, unembed, targets, weights, z_loss, soft_cap, kernels
        )
        # d(log_z - logit_y + z log_z^2) / d logits = p (1 + 2 z log_z) - onehot(y)
        d = jnp.exp(logits - log_z[..., None]) * (1 + 2 * z_loss * log_z)[..., None]
        d = d - jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)
        d = d * weights[..., None]
        if soft_cap is not None:
            d = d * (1 - (logits / soft_cap) ** 2)
        d = d.astype(hidden.dtype)
        if kernels == "cpu" and cut == (1, 1):
            d_hidden = linear(d, unembed.T, kernels)
            if learned:
                rows = hidden.reshape(-1, hidden.shape[-1])
                d_unembed += (rows.T @ d.reshape(-1, d.shape[-1])).astype(jnp.float32)
        else:
            d_hidden = jnp.einsum("...btv,...dv->...btd", d, unembed)
            if learned and not keep:
                d_unembed += jnp.einsum(
                    "...btd,...btv->...dv", hidden, d, preferred_element_type=jnp.float32
                )
        return (jax.tree.map(jnp.add, total, sums), d_unembed), (d_hidden, d if keep else None)

    def body(carry, xs):
        if order is None:
            return gradients_of(carry, xs)
        passed = lambda carry, xs: (carry, (jnp.zeros_like(xs[0]), None))  # noqa: E731
        return jax.lax.cond(jnp.any(xs[2] != 0), gradients_of, passed, carry, xs)

    xs = tuple(_split(_ordered(x, order), cut, chunk) for x in batch)
    summed = learned and not keep
    table = _each(jnp.zeros(unembed_dv.shape, jnp.float32), cut) if summed else None
    (sums, d_unembed), (d_hidden, d) = jax.lax.scan(body, (_zero(), table), xs)
    d_hidden = _join(d_hidden, cut, hidden_btd.shape)
    if order is not None:
        d_hidden = _ordered(d_hidden, jnp.argsort(order, axis=1))
    if d is not None:
        tokens = tuple(range(d.ndim - 1))
        d_unembed = jnp.tensordot(xs[0], d, (tokens, tokens), preferred_element_type=jnp.float32)
    elif d_unembed is not None and cut != (1, 1):
        d_unembed = d_unembed.sum((0, 1))
    if d_unembed is not None and cut != (1, 1):
        # Over the devices, to where the parameter's parts lie.
        d_unembed = shard(d_unembed, "embed", "vocab", rules=PARAM_RULES)
    return sums, (d_hidden, d_unembed, unembed_dv[:0])


def _backward(z_loss, soft_cap, chunk, kernels, sparse, saved, cotangent):
    d_hidden, d_unembed, like = saved
    g = cotangent.loss
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    # In float32: a denominator rounded to bfloat16 would weigh this term up to 0.4 % wrong.
    d_hidden = (d_hidden.astype(jnp.float32) * g).astype(d_hidden.dtype)
    d_unembed = None if d_unembed is None else (d_unembed * g).astype(like.dtype)
    return d_hidden, d_unembed, None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def distillation(
    hidden_btd: jax.Array,
    unembed_dv: jax.Array,
    teacher_hidden_bte: jax.Array,
    teacher_unembed_ev: jax.Array,
    weights_bt: jax.Array,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    chunk: int = 0,
    kernels: str = "xla",
) -> jax.Array:
    """Sum over tokens of `w * T^2 * KL(teacher || student)` over the vocabulary, in nats.

    Both vocabularies have the same order; where one table has more (padding) rows, the shorter
    length counts. Logits are recomputed a chunk at a time in the backward pass.
    """
    vocab = min(unembed_dv.shape[1], teacher_unembed_ev.shape[1])
    unembed_dv, teacher_unembed_ev = unembed_dv[:, :vocab], teacher_unembed_ev[:, :vocab]
    cut, chunk = _cut(weights_bt.shape, 2 * vocab, chunk)
    unembed_each, teacher_each = _each(unembed_dv, cut), _each(teacher_unembed_ev, cut)

    @jax.checkpoint
    def one(hidden, teacher, weights, unembed):
        log_q = jax.nn.log_softmax(_logits(hidden, unembed, soft_cap, kernels) / temperature)
        teacher_logits = _logits(teacher, teacher_each, teacher_soft_cap, kernels)
        log_p = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_logits / temperature))
        return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    def body(total, xs):
        return total + one(*xs, unembed_each), None

    xs = tuple(_split(x, cut, chunk) for x in (hidden_btd, teacher_hidden_bte, weights_bt))
    return temperature**2 * jax.lax.scan(body, jnp.float32(0), xs)[0]
