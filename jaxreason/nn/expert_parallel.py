"""Experts on the devices of a mesh: tokens go to the devices of their experts and come back.

Each device routes its own tokens. A token is sent once to each device that has at least one of its
experts, with the numbers and weights of all of them, and the sum over that device's experts comes
back. So the buffer that can never drop a token has one row a token and device, whatever top_k is.
The products run over blocks of rows as long as there are any (a loop whose length is known only
when it runs), so that the room kept for the worst case is not computed.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxreason.core.mesh import AXES, PARAM_RULES, activation_spec, parts
from jaxreason.nn.mlp import silu_times

WEIGHTS = {
    "gate": ("expert", "embed", "mlp"),
    "up": ("expert", "embed", "mlp"),
    "down": ("expert", "mlp", "embed"),
}
# Rows of one block over those that a device has where all experts are used evenly.
_BLOCK = 1.25


def cuts(x_shape: tuple[int, ...]) -> bool:
    """Whether the mesh gives each of its devices tokens [B,T,...] of its own (tensor aside)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return False
    pieces = parts("batch", x_shape[0]) * parts("seq", x_shape[1])
    return pieces * mesh.shape["tensor"] == mesh.size


def room(tokens: int, devices: int, top_k: int, capacity_factor: float) -> int:
    """Tokens that a device may send to one of `devices`; 0 of `capacity_factor` is all of them."""
    if not capacity_factor:
        return tokens
    even = tokens * min(1.0, top_k / devices)
    return max(1, min(tokens, math.ceil(capacity_factor * even)))


def expert_parallel(
    p: dict[str, jax.Array],
    x_btd: jax.Array,
    weights_btk: jax.Array,
    experts_btk: jax.Array,
    kernels: str,
    capacity_factor: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """The experts' weighted sum [B,T,D], and how many of its experts each token lost, int32 [B,T].

    Call it where `cuts` says so. `p` holds `gate` and `up` [E,D,F] and `down` [E,F,D], cut as
    PARAM_RULES say. Tokens beyond the `room` are dropped, the last of a device's tokens first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    tokens = activation_spec("batch", "seq", None, shape=x_btd.shape)
    specs = {n: PARAM_RULES.spec(axes, p[n].shape, mesh) for n, axes in WEIGHTS.items()}
    local = functools.partial(
        _on_device, kernels, capacity_factor, mesh.shape["expert"], specs, tokens
    )
    return jax.shard_map(
        local,
        in_specs=(specs, tokens, tokens, tokens),
        out_specs=(tokens, PartitionSpec(*tokens[:2])),
    )({n: p[n] for n in WEIGHTS}, x_btd, weights_btk, experts_btk)


def _varying(tree, spec: PartitionSpec):
    """Values cut as `spec` says, as values that may differ between all devices.

    Where they were the same along an axis, their gradient is summed over it, here and once.
    """
    cut = {name for part in spec for name in ((part,) if isinstance(part, str) else part or ())}
    sizes = jax.sharding.get_abstract_mesh().shape
    rest = tuple(name for name in AXES if name not in cut and sizes[name] > 1)
    return jax.tree.map(lambda x: jax.lax.pcast(x, rest, to="varying"), tree)


def _on_device(
    kernels, capacity_factor, devices, specs, tokens, p, x_btd, weights_btk, experts_btk
):
    """One device's part: its tokens, its experts."""
    b, t, d = x_btd.shape
    n, k = b * t, experts_btk.shape[-1]
    p = {name: _varying(leaf, specs[name]) for name, leaf in p.items()}
    x, weights = _varying((x_btd.reshape(n, d), weights_btk.reshape(n, k)), tokens)
    experts = experts_btk.reshape(n, k)
    # The axes that cut the weights along D are gathered; those of the experts and of F stay.
    gathered = specs["gate"][_along("gate")]
    own = p["gate"].shape[0]
    if devices > 1:
        rows = room(n, devices, k, capacity_factor)
        plan = _plan(experts // own, devices, rows)
        to = functools.partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0)
        send = lambda y: to(_spread(y, plan)).reshape(devices * rows, -1)  # noqa: E731
        x, weights = send(x), send(weights)
        # 0 is a row without a token: it has no expert.
        experts = send(experts + 1) - 1 - own * jax.lax.axis_index("expert")
    order, sizes = _sorted(experts, own)
    block = min(-(-int(_BLOCK * n * k) // 8) * 8, order.size)
    y = _experts((kernels, gathered, block), p, x, weights, order, sizes).astype(x_btd.dtype)
    lost = jnp.zeros((n,), jnp.int32)
    if devices > 1:
        y = _collect(to(y.reshape(devices, rows, d)), plan)
        at = jnp.take_along_axis(plan.kept_nj, experts_btk.reshape(n, k) // own, axis=1)
        lost = jnp.sum(~at, axis=1, dtype=jnp.int32)
    y = y.astype(x_btd.dtype)
    if jax.lax.axis_size("tensor") > 1:  # Each of its devices has a part of the experts' width.
        y = jax.lax.psum(y, "tensor")
    return y.reshape(b, t, d), lost.reshape(b, t)


class Plan(NamedTuple):
    """Which token lies where in the buffers: `slot_nj` of token n for device j, and back."""

    slot_nj: jax.Array
    kept_nj: jax.Array
    token_jr: jax.Array
    filled_jr: jax.Array


def _plan(device_nk: jax.Array, devices: int, rows: int) -> Plan:
    """Gives each token a row for every device that has one of its experts, in their order."""
    n = device_nk.shape[0]
    goes = jnp.any(device_nk[:, :, None] == jnp.arange(devices)[None, None], axis=1)
    slot = jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1
    kept = goes & (slot < rows)
    token = jnp.sort(jnp.where(kept, jnp.arange(n)[:, None], n), axis=0)[:rows].T
    return Plan(slot, kept, jnp.minimum(token, n - 1), token < n)


# Two copies, each the gradient of the other: both read by number, and none adds up by number, as
# the gradient of an indexing would.


@jax.custom_vjp
def _spread(x_nd: jax.Array, plan: Plan) -> jax.Array:
    """Tokens [N,D] into the buffers [J,R,D], zero where there is none."""
    return jnp.where(plan.filled_jr[..., None], x_nd[plan.token_jr], 0)


@jax.custom_vjp
def _collect(y_jrd: jax.Array, plan: Plan) -> jax.Array:
    """Sums over the buffers [J,R,D] for each token [N,D], in float32."""
    slot = jnp.minimum(plan.slot_nj, y_jrd.shape[1] - 1)
    total = jnp.zeros((slot.shape[0], y_jrd.shape[2]), jnp.float32)
    for j in range(y_jrd.shape[0]):
        total += jnp.where(plan.kept_nj[:, j, None], y_jrd[j, slot[:, j]], 0)
    return total


_spread.defvjp(
    lambda x, plan: (_spread(x, plan), (plan, x[:0])),
    lambda saved, g: (_collect(g, saved[0]).astype(saved[1].dtype), None),
)
_collect.defvjp(
    lambda y, plan: (_collect(y, plan), (plan, y[:0])),
    lambda saved, g: (_spread(g.astype(saved[1].dtype), saved[0]), None),
)


def _sorted(experts_rk: jax.Array, own: int) -> tuple[jax.Array, jax.Array]:
    """The places (row * k + j) that have an expert of this device, by expert; how many of each.

    Behind them, up to the most that there can be, are places that have none.
    """
    rows, k = experts_rk.shape
    here = (experts_rk >= 0) & (experts_rk < own)
    keys = jnp.where(here, experts_rk, own).reshape(-1)
    order = jnp.argsort(keys, stable=True)[: rows * min(k, own)]
    sizes = jnp.sum(keys[:, None] == jnp.arange(own)[None], axis=0, dtype=jnp.int32)
    return order, sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(how, p, x_rd, weights_rk, order, sizes):
    """Float32 [R,D]: for each row, the weighted sum over its experts on this device.

    `how`: the kernels, the mesh axes that cut the weights along D, the rows of a block. Keeps its
    inputs for the gradient, the weights still cut, and makes the rest again.
    """
    p = _gather(p, how[1])

    def body(i, total):
        rows, places, valid, part = _block(how[2], i, order, sizes, weights_rk.shape[1])
        out = _products(how[0], p, x_rd[rows], weights_rk.reshape(-1)[places], valid, part)
        return total.at[rows].add(out.astype(jnp.float32))

    start = _varying(jnp.zeros(x_rd.shape, jnp.float32), PartitionSpec())
    return jax.lax.fori_loop(0, _blocks(how[2], sizes), body, start)


def _forward(how, p, x_rd, weights_rk, order, sizes):
    return _experts(how, p, x_rd, weights_rk, order, sizes), (p, x_rd, weights_rk, order, sizes)


def _backward(how, saved, g_rd):
    cut, x_rd, weights_rk, order, sizes = saved
    p, flat = _gather(cut, how[1]), weights_rk.reshape(-1)

    def body(i, grads):
        d_p, d_x, d_weights = grads
        rows, places, valid, part = _block(how[2], i, order, sizes, weights_rk.shape[1])
        run = lambda p, x, w: _products(how[0], p, x, w, valid, part)  # noqa: E731
        pull = jax.vjp(run, p, x_rd[rows], flat[places])[1]
        g_p, g_x, g_w = pull(g_rd[rows].astype(x_rd.dtype))
        d_p = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), d_p, g_p)
        # Places without an expert may stand twice: they add zeros.
        return d_p, d_x.at[rows].add(g_x.astype(jnp.float32)), d_weights.at[places].add(g_w)

    zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)  # noqa: E731
    start = _varying(zeros((p, x_rd, flat)), PartitionSpec())
    d_p, d_x, d_w = jax.lax.fori_loop(0, _blocks(how[2], sizes), body, start)
    d_p = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), _scatter(d_p, how[1]), cut)
    d_w = d_w.astype(flat.dtype).reshape(weights_rk.shape)
    return d_p, d_x.astype(x_rd.dtype), d_w, None, None


_experts.defvjp(_forward, _backward)


def _blocks(block: int, sizes: jax.Array) -> jax.Array:
    """How many blocks have a row at all."""
    return (jnp.sum(sizes) + block - 1) // block


def _block(block: int, i: jax.Array, order: jax.Array, sizes: jax.Array, k: int):
    """Block `i`: its rows and places, which of them count, and its rows of each expert."""
    first = i * block
    at = first + jnp.arange(block, dtype=jnp.int32)
    places = order[jnp.minimum(at, order.size - 1)]
    ends = jnp.cumsum(sizes)
    part = jnp.clip(ends - first, 0, block) - jnp.clip(ends - sizes - first, 0, block)
    return places // k, places, (at < ends[-1])[:, None], part


def _products(kernels: str, p, x_rd, weights_r, valid, sizes):
    """The experts on rows sorted by expert; zero in the rows that do not count."""
    # What a ragged product leaves behind its last group is not defined everywhere.
    gate, up = (
        jnp.where(valid, jax.lax.ragged_dot(x_rd, p[name], sizes), 0) for name in ("gate", "up")
    )
    hidden = silu_times(gate, up, kernels) * weights_r[:, None].astype(gate.dtype)
    return jnp.where(valid, jax.lax.ragged_dot(hidden, p["down"], sizes), 0)


def _along(name: str) -> int:
    return WEIGHTS[name].index("embed")


def _gather(p, names):
    """Weights whole along D."""
    if not names:
        return p
    gather = functools.partial(jax.lax.all_gather, axis_name=names, tiled=True)
    return {name: gather(leaf, axis=_along(name)) for name, leaf in p.items()}


def _scatter(grads, names):
    """Their gradients summed over the axes that cut D, each device with its part."""
    if not names:
        return grads
    add = functools.partial(jax.lax.psum_scatter, axis_name=names, tiled=True)
    return {name: add(leaf, scatter_dimension=_along(name)) for name, leaf in grads.items()}
