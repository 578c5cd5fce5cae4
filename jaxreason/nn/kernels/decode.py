"""Products and attention of a token loop on CPU, where every weight is read once a token.

What they obey, as measured on two cores with AMX (docs/log.md):
- A weight lies [out, in] and is the product's LEFT side. XLA's library then streams it as it lies
  and packs only the few activations: 22 to 36 GB/s, where `x @ w` gives 8 to 18.
- One row alone takes a slow loop in bfloat16 (4 GB/s), so it goes as four equal rows. In float32
  that loop is fast but runs on one core; in PIECES independent pieces it runs on both.
- Nothing here needs oneDNN, so the compiled programs can be kept on disk.
- Keys and values lie [B,G,S,K]; scores are rounded to the queries' dtype, as in `cpu.attention`.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

# Rows that one row is repeated to in bfloat16; 2, 4 and 8 run alike, 1 runs in a scalar loop.
ROWS = 4
# Up to so many rows the weight is the left side; beyond, transposing the result costs more.
FEW = 64
# XLA runs ready operations on several threads only where more than eight of them wait.
PIECES = 12


@flax.struct.dataclass
class OutIn:
    """A weight stored for a token loop: [out, in], in one piece or cut along `out`.

    `out` is the shape of the outputs, whose product is the number of rows of all pieces.
    """

    pieces: tuple[jax.Array, ...]
    out: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def astype(self, dtype) -> "OutIn":
        """The same weight in another dtype."""
        return OutIn(tuple(p.astype(dtype) for p in self.pieces), self.out)


def pieces_for(dtype, rows: int) -> int:
    """How many pieces the weights should lie in for a loop over `rows` rows at a time."""
    return PIECES if rows == 1 and jnp.dtype(dtype) == jnp.float32 else 1


def out_in(*weights: jax.Array, inputs: int = 1, pieces: int = 1) -> OutIn:
    """Weights [in..., out...] of the same input, side by side in one OutIn.

    `inputs` is how many axes of each are inputs. Several weights must agree in all outputs but the
    first, along which they are joined.
    """
    if len(weights) == 1:
        out = weights[0].shape[inputs:]
    else:
        rest = weights[0].shape[inputs + 1 :]
        out = (sum(w.shape[inputs] for w in weights), *rest)
    flat = [w.reshape(math.prod(w.shape[:inputs]), -1).T for w in weights]
    joined = flat[0] if len(flat) == 1 else jnp.concatenate(flat)
    return from_rows(joined, out, pieces)


def from_rows(w_oi: jax.Array, out: tuple[int, ...], pieces: int = 1) -> OutIn:
    """An OutIn of a matrix [out, in] that lies so already, such as an embedding to be tied."""
    rows = w_oi.shape[0]
    size = -(-rows // pieces)
    cut = tuple(w_oi[i : i + size] for i in range(0, rows, size)) if pieces > 1 else (w_oi,)
    return OutIn(cut, tuple(out))


def product(x: jax.Array, w: OutIn, dtype=None, *, inputs: int = 1) -> jax.Array:
    """`x` [..., in] times `w`: [..., *w.out], summed in float32, in `dtype` (None: that of x).

    The last `inputs` axes of `x` are the inputs; those before them may be any.
    """
    width = w.pieces[0].shape[1]
    lead = x.shape[:-inputs]
    if math.prod(x.shape[-inputs:]) != width:
        raise ValueError(f"an input of shape {x.shape} has no last axes of {width} features")
    rows = x.reshape(-1, width)
    dtype = dtype or x.dtype
    parts = [_rows_times(rows, piece, dtype) for piece in w.pieces]
    y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    return y.reshape(*lead, *w.out)


def _rows_times(x_ni, w_oi, dtype):
    n = x_ni.shape[0]
    if n > FEW or (n == 1 and x_ni.dtype == jnp.float32):
        return jax.lax.dot_general(
            x_ni, w_oi, (((1,), (1,)), ((), ())), preferred_element_type=dtype
        )
    wide = jnp.broadcast_to(x_ni, (ROWS, x_ni.shape[1])) if n == 1 else x_ni
    y_on = jax.lax.dot_general(w_oi, wide, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    if n == 1:
        return y_on[:, :1].T
    # Behind a barrier: XLA would undo the transposition by changing the product's sides.
    return jax.lax.optimization_barrier(y_on).T


def prepare_block(p: dict, pieces: int = 1) -> dict:
    """One block's parameters with its products as OutIn; what is not a known product stays.

    `attn` gets `qkv` for q, k and v; `mlp` gets `gate_up` for gate and up where both are there. The
    experts of a mixture and all norms and biases stay as they are.
    """
    attn = {name: leaf for name, leaf in p["attn"].items() if name not in ("q", "k", "v")}
    attn["qkv"] = out_in(*(p["attn"][name] for name in ("q", "k", "v")), pieces=pieces)
    attn["o"] = out_in(p["attn"]["o"], inputs=2, pieces=pieces)
    mlp = dict(p["mlp"])
    if "router" not in mlp:
        if "gate" in mlp:
            both = (mlp.pop("gate"), mlp.pop("up"))
            mlp["gate_up"] = out_in(*both, pieces=pieces)
        else:
            mlp["up"] = out_in(mlp["up"], pieces=pieces)
        mlp["down"] = out_in(mlp["down"], pieces=pieces)
    return {**p, "attn": attn, "mlp": mlp}


def prepare(params: dict, *, tied: bool, dtype, rows: int) -> dict:
    """A decoder's parameters for a token loop over `rows` rows; call it once, outside the loop.

    `blocks` must be a tuple of one tree a layer, already in `dtype`. The unembedding becomes an
    OutIn [V,E] named `unembed`; where it is tied, it and `embed` are one array in `dtype`.
    """
    pieces = pieces_for(dtype, rows)
    blocks = tuple(prepare_block(p, pieces) for p in params["blocks"])
    embed = params["embed"].astype(dtype)
    if tied:
        unembed = from_rows(embed, embed.shape[:1], pieces)
    else:
        unembed = out_in(params["unembed"].astype(dtype), pieces=pieces)
    return {**params, "blocks": blocks, "embed": embed, "unembed": unembed}


def split_heads(y: jax.Array, heads: int, kv_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values from the output [..., H+2G, K] of `qkv`."""
    ends = (heads, heads + kv_heads)
    return y[..., : ends[0], :], y[..., ends[0] : ends[1], :], y[..., ends[1] :, :]


def append(
    k_bgsk: jax.Array, v_bgsk: jax.Array, k_bgk: jax.Array, v_bgk: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes one token's keys and values [B,G,K] at each row's `lengths` [B], in place in a loop.

    A row whose length is the capacity writes nothing.
    """
    rows = jnp.arange(k_bgsk.shape[0])
    k = k_bgsk.at[rows, :, lengths].set(k_bgk.astype(k_bgsk.dtype), mode="drop")
    v = v_bgsk.at[rows, :, lengths].set(v_bgk.astype(v_bgsk.dtype), mode="drop")
    # Behind a barrier where B is 1: XLA would write twice, once for the attention without the batch
    # axis, and copy the whole cache for it.
    return jax.lax.optimization_barrier((k, v)) if len(lengths) == 1 else (k, v)


def attend(
    q_bhk: jax.Array,
    k_bgsk: jax.Array,
    v_bgsk: jax.Array,
    bias_bs: jax.Array,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention of one token a row under an additive float32 `bias` [B,S]; returns [B,H,K].

    The softmax is in float32 of scores in q's dtype; it is divided by its sum after the values.
    """
    b, h, d = q_bhk.shape
    groups = k_bgsk.shape[1]
    q = (q_bhk * jnp.asarray(d**-0.5, q_bhk.dtype)).reshape(b, groups, h // groups, d)
    keys, values = k_bgsk.astype(q.dtype), v_bgsk.astype(q.dtype)
    # Behind a barrier: asked for float32 scores, the product costs 8 % more a step at 32 rows.
    scores = jax.lax.optimization_barrier(jnp.einsum("bgrk,bgsk->bgrs", q, keys))
    scores = scores.astype(jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = scores + bias_bs[:, None, None, :]
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    o = jax.lax.optimization_barrier(jnp.einsum("bgrs,bgsk->bgrk", weights.astype(q.dtype), values))
    return (o.astype(jnp.float32) / total).astype(q.dtype).reshape(b, h, d)


def best(logits_bv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most likely token [B] int32 (the first of equals) and its log-probability [B].

    Two plain reductions: `argmax` carries pairs, which the compiler does not vectorise.
    """
    logits = logits_bv.astype(jnp.float32)
    top = logits.max(axis=-1, keepdims=True)
    words = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    token = jnp.where(logits == top, words, logits.shape[-1] - 1).min(axis=-1)
    return token, -jnp.log(jnp.exp(logits - top).sum(axis=-1))
