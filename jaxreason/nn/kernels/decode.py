"""Products and attention of a token loop on CPU, where every weight is read once a token.

What they obey, as measured on two cores with AMX (docs/log.md):
- A weight lies [out, in] and is the product's LEFT side. XLA's library then streams it as it lies
  and packs only the few activations: 22 to 36 GB/s, where `x @ w` gives 8 to 18.
- One row alone takes a slow loop in bfloat16 (4 GB/s), so it goes as four equal rows. In float32
  that loop is fast but runs on one core; in PIECES independent pieces it runs on both.
- Nothing here needs oneDNN, so the compiled programs can be kept on disk.
- A float32 input is the sum of three bfloat16 ones (8 bits each), and a bfloat16 product summed in
  float32 drops nothing. So float32 weights that bfloat16 holds exactly, as those of a file in
  bfloat16, lie in bfloat16 and are read at half the bytes; the three parts are three of the four
  rows. What is left out of a product is below the rounding of its float32 sum.
- Keys and values lie [B,G,S,K]; scores are rounded to the queries' dtype, as in `cpu.attention`.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

# Rows that one row is repeated to in bfloat16; 2, 4 and 8 run alike, 1 runs in a scalar loop.
ROWS = 4
# A float32 number is the sum of so many bfloat16 ones.
PARTS = 3
# A decoder's weights that `prepare` lays out for products.
PRODUCTS = ("q", "k", "v", "o", "gate", "up", "down", "unembed")
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


def pieces_for(dtype, rows: int, narrow: bool = False) -> int:
    """How many pieces the weights should lie in for a loop over `rows` rows at a time."""
    return PIECES if rows == 1 and jnp.dtype(dtype) == jnp.float32 and not narrow else 1


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


def bfloat16_parts(x: jax.Array) -> tuple[jax.Array, ...]:
    """Three bfloat16 arrays that add up to the float32 `x`, largest first.

    Exactly, where `x` is finite and above 1e-30 in size; what is lost below is under 1e-38.
    """
    parts, rest = [], x
    for _ in range(PARTS):
        # Not two casts: the compiler may take a cast and its reverse for nothing.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return tuple(parts)


@functools.partial(jax.jit, static_argnames="tied")
def held_by_bfloat16(params: dict, *, tied: bool) -> jax.Array:
    """Whether a cast to bfloat16 would change no number of a decoder's weights of products.

    Norms, biases, and a table that is not also the unembedding need not be so.
    """
    same = [jnp.bool_(True)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = {getattr(key, "key", None) for key in path}
        if names & set(PRODUCTS) or (tied and "embed" in names):
            wide = leaf.astype(jnp.float32)
            rounded = jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
            same.append((rounded == wide).all())
    return jnp.stack(same).all()


def _wide_times(x_ni, w_oi, dtype):
    """`_rows_times` of float32 rows and a bfloat16 weight, as accurate as both in float32."""
    n = x_ni.shape[0]
    if PARTS * n > FEW:
        return _rows_times(x_ni, w_oi.astype(jnp.float32), dtype)
    rows = jnp.concatenate(bfloat16_parts(x_ni))
    rows = jnp.pad(rows, ((0, max(ROWS - PARTS * n, 0)), (0, 0)))
    y_on = jax.lax.dot_general(
        w_oi, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    first, second, third = jnp.split(jax.lax.optimization_barrier(y_on)[:, : PARTS * n], PARTS, 1)
    return (first + (second + third)).T.astype(dtype)


def _rows_times(x_ni, w_oi, dtype):
    n = x_ni.shape[0]
    if x_ni.dtype == jnp.float32 and w_oi.dtype == jnp.bfloat16:
        return _wide_times(x_ni, w_oi, dtype)
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


def prepare(params: dict, *, tied: bool, dtype, rows: int, narrow: bool = False) -> dict:
    """A decoder's parameters for a token loop over `rows` rows; call it once, outside the loop.

    `blocks` must be a tuple of one tree a layer, already in `dtype`. The unembedding becomes an
    OutIn [V,E] named `unembed`; where it is tied, it and `embed` are one array in `dtype`. With
    `narrow`, the products' weights lie in bfloat16 (`held_by_bfloat16` must be true).
    """
    pieces = pieces_for(dtype, rows, narrow)
    lies = jnp.bfloat16 if narrow else dtype
    blocks = tuple(prepare_block(p, pieces) for p in params["blocks"])
    if narrow:
        is_product = lambda leaf: isinstance(leaf, OutIn)  # noqa: E731
        lay = lambda leaf: leaf.astype(lies) if is_product(leaf) else leaf  # noqa: E731
        blocks = jax.tree.map(lay, blocks, is_leaf=is_product)
    if tied:
        embed = params["embed"].astype(lies)
        unembed = from_rows(embed, embed.shape[:1], pieces)
    else:
        embed = params["embed"].astype(dtype)
        unembed = out_in(params["unembed"].astype(lies), pieces=pieces)
    return {**params, "blocks": blocks, "embed": embed, "unembed": unembed}


def split_heads(y: jax.Array, heads: int, kv_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values from the output [..., H+2G, K] of `qkv`."""
    ends = (heads, heads + kv_heads)
    return y[..., : ends[0], :], y[..., ends[0] : ends[1], :], y[..., ends[1] :, :]


_AT_ROW_AND_TOKEN = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2), inserted_window_dims=(0, 2), scatter_dims_to_operand_dims=(0, 2)
)


def places(lengths_b: jax.Array) -> jax.Array:
    """Where each row's next token goes in a cache: its row and `lengths` [B], as int32 [B,2].

    Behind a barrier, so that a step makes it once and not in every layer.
    """
    rows = jnp.arange(len(lengths_b), dtype=jnp.int32)
    return jax.lax.optimization_barrier(jnp.stack([rows, lengths_b.astype(jnp.int32)], axis=1))


def append(
    k_bgsk: jax.Array, v_bgsk: jax.Array, k_bgk: jax.Array, v_bgk: jax.Array, places_b2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes one token's keys and values [B,G,K] at `places` [B,2], in place in a loop.

    A row whose length is the capacity writes nothing.
    """

    def put(to, new):
        return jax.lax.scatter(
            to, places_b2, new.astype(to.dtype), _AT_ROW_AND_TOKEN, indices_are_sorted=True,
            unique_indices=True, mode="drop",
        )  # fmt: skip

    k, v = put(k_bgsk, k_bgk), put(v_bgsk, v_bgk)
    # Behind a barrier where B is 1: XLA would write twice, once for the attention without the batch
    # axis, and copy the whole cache for it.
    return jax.lax.optimization_barrier((k, v)) if len(places_b2) == 1 else (k, v)


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
