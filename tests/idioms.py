"""Ways in which programs read a table, one to a line: what `test_reads.py` tries."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

# Columns, tables in a stack, and the shape of the ids.
D, F, IDS = 4, 3, (2, 3)


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters, by the name that a reading function takes them under."""
    return {
        # Tables.
        "t": (rows, D),
        "u": (rows, D),
        "v": (rows, D),
        "flat": (rows,),
        "pair": (rows, D, 2),
        "stack": (F, rows, D),
        "inner": (rows, F, D),
        "grid": (rows // 4, 4, D),
        "position": (1, rows, D),
        "turned": (D, rows),
        # Other parameters.
        "column": (rows, 1),
        "scale": (D,),
        "factor": (),
        "w": (D, D),
        "low": (2, D),
        "first": (1, D),
        "layers": (F, D, D),
        "kinds": (2, D),
    }


TABLES = {
    "t", "u", "v", "flat", "pair", "stack", "inner", "grid", "position", "turned"
}  # fmt: skip


class Idiom(NamedTuple):
    """A function of parameters and ids that reads rows.

    Args:
      read: from parameters, by their names in `shapes`, and the ids to what is read, a model's
        loss, or (either of them, auxiliary output).
      tolerance: of the gradients, relative to the largest entry of a leaf; 0 is to the bit, for
        sums of small integers.
      auto: whether "auto" takes the tables as such too; None if it may.
      rows: whether all tables have row gradients when they are named; None if one may be refused.
      memory: whether temporaries do not depend on V.
      mapped: whether the function can be tried under `jax.vmap` and in `jax.shard_map`.
    """

    read: Callable[..., Any]
    tolerance: float = 0.0
    auto: bool | None = True
    rows: bool | None = True
    memory: bool = True
    mapped: bool = True


near = functools.partial(Idiom, tolerance=1e-6)
# Read by static indices alone: no table to "auto".
static = functools.partial(Idiom, auto=False)
# Rows or dense, as long as it is right.
either = functools.partial(Idiom, auto=None, rows=None, memory=False)


def build(idiom: Idiom, rows: int) -> tuple[Any, Callable[..., Any]]:
    """Abstract parameters for tables of V rows, and a function of parameters and ids."""
    if isinstance(idiom.read, Module):
        return idiom.read.make(rows)
    names = inspect.signature(idiom.read).parameters
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in shapes(rows).items()
        if name in names
    }
    return params, lambda params, ids: idiom.read(**params, ids=ids)


class Module(NamedTuple):
    """What makes a `read` of Flax: from V to (abstract parameters, function of them and ids)."""

    make: Callable[[int], tuple[Any, Callable[..., Any]]]


# ---- helpers: what the lines below share ----


def scan(body: Any, init: Any, xs: Any, **kwargs: Any) -> Any:
    """What a scan carries out of it."""
    return lax.scan(body, init, xs, **kwargs)[0]


def total(read: Any) -> Any:
    return jnp.sum(read * (1 + read))


def norm(x: Any) -> Any:
    return jnp.linalg.norm(x, axis=-1, keepdims=True)


def layer_norm(x: Any) -> Any:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)


def iota(table: Any) -> Any:
    return jnp.arange(table.shape[0])


def one_hot(ids: Any, table: Any) -> Any:
    return jax.nn.one_hot(ids, table.shape[0])


def offsets(table: Any) -> Any:
    """Added to ids (..., F), they are those in a concatenation of F tables."""
    return jnp.arange(F) * table.shape[0]


def windows(t: Any, starts: Any, **kwargs: Any) -> Any:
    """Three rows each."""
    numbers = lax.GatherDimensionNumbers((1, 2), (), (0,))
    return lax.gather(t, starts[:, None], numbers, (3, D), **kwargs)


def rnn(t: Any, w: Any, ids: Any, **kwargs: Any) -> Any:
    """Sums over time: exact."""
    return scan(lambda h, i: (h + t[i] @ w, None), jnp.zeros((ids.shape[0], D)), ids.T, **kwargs)


def microbatches(t: Any, ids: Any, wrap: Any = lambda f: f, **kwargs: Any) -> Any:
    body = wrap(lambda sum_, i: (sum_ + total(t[i]), None))
    return scan(body, 0.0, ids, **kwargs)


def elman(t: Any, w: Any, ids: Any) -> Any:
    return scan(lambda h, i: (jnp.tanh(h @ w + t[i]), None), jnp.zeros((len(ids), D)), ids.T)


def lstm(t: Any, layers: Any, w: Any, ids: Any) -> Any:
    def cell(carry: Any, i: Any) -> Any:
        h, c = carry
        x = t[i]
        forget, new, out = (jax.nn.sigmoid(x @ k + h @ w) for k in layers)
        c = forget * c + new * jnp.tanh(x)
        return (out * jnp.tanh(c), c), None

    zeros = jnp.zeros((len(ids), D))
    return scan(cell, (zeros, zeros), ids.T)[0]


@jax.custom_jvp
def cubed(x: Any) -> Any:
    return x * x * x


cubed.defjvps(lambda tangent, out, x: 3 * x * x * tangent)


@jax.custom_vjp
def reversed_gradient(x: Any) -> Any:
    return x + 0.0


reversed_gradient.defvjp(lambda x: (x + 0.0, None), lambda _, g: (-g,))


@jax.custom_vjp
def own_lookup(table: Any, ids: Any) -> Any:
    return table[ids]


own_lookup.defvjp(
    lambda table, ids: (table[ids], (table, ids)),
    lambda saved, g: (jnp.zeros_like(saved[0]).at[saved[1]].add(g), None),
)


@jax.custom_gradient
def clipped_gradient(x: Any) -> Any:
    return x * 1.0, lambda g: jnp.clip(g, -1, 1)


def straight_through(x: Any) -> Any:
    return x + lax.stop_gradient(jnp.round(x / 2) * 2 - x)


def on_two_devices(body: Any, in_specs: Any, out_specs: Any, **kwargs: Any) -> Any:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **kwargs)


# ---- rows outside of control flow: those of `test_value_and_grad.py` are more ----

WHOLE_ROWS: dict[str, Any] = {
    "t[ids]": lambda t, ids: t[ids],
    "take": lambda t, ids: jnp.take(t, ids, axis=0),
    "take: ids outside are zeros": lambda t, ids: jnp.take(t, ids * 40, axis=0, fill_value=0),
    "t[ids]: a bag, summed": lambda t, ids: t[ids].sum(1),
    "t[ids]: a bag, weighted": lambda t, ids: jnp.einsum("bnd,bn->bd", t[ids], ids % 3 - 1.0),
    "t[id]: one id": lambda t, ids: t[ids[0, 0]],
    "flat[ids]: a bias each": lambda flat, ids: flat[ids],
    "pair[ids]: (V, a, b)": lambda pair, ids: pair[ids],
    "segment_sum of rows": lambda t, ids: jax.ops.segment_sum(t[ids[0]], ids[1] % 2, 2),
    "t[ids] beside a static row": lambda t, ids: t[ids] + t[0],
}

# ---- A: control flow ----

BODY_OF_TWO = lambda t, u: lambda c, i: (c + jnp.sum(t[i] * u[i[::-1]]), None)  # noqa: E731

CONTROL_FLOW: dict[str, Any] = {
    "scan: RNN": rnn,
    "scan: RNN with tanh": near(elman),
    "scan: LSTM": near(lstm),
    "scan: RNN, reverse": lambda t, w, ids: rnn(t, w, ids, reverse=True),
    "scan: RNN, unroll": lambda t, w, ids: rnn(t, w, ids, unroll=2),
    "scan: RNN, unroll all": lambda t, w, ids: rnn(t, w, ids, unroll=True),
    "scan: length 1": lambda t, w, ids: rnn(t, w, ids[:, :1]),
    "scan: length 0": Idiom(lambda t, w, ids: rnn(t, w, ids[:, :0]), auto=None),
    "scan: rows come out": lambda t, ids: lax.scan(lambda c, i: (c, t[i]), 0.0, ids)[1],
    "scan: a tree of rows comes out": lambda t, ids: lax.scan(
        lambda c, i: (c + 1, {"row": t[i], "twice": [2 * t[i], c]}), 0.0, ids
    )[1]["twice"][0],
    "scan: microbatches": microbatches,
    "scan: microbatches, remat": lambda t, ids: microbatches(t, ids, jax.checkpoint),
    "scan: microbatches, remat by a policy": lambda t, ids: microbatches(
        t, ids, functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    ),
    "scan: microbatches, jit": lambda t, ids: microbatches(t, ids, jax.jit),
    "scan: in scan": lambda t, ids: scan(
        lambda c, i: (scan(lambda c, j: (c + t[j], None), c, i), None), jnp.zeros(D), ids
    ),
    "scan: in scan, outer ids too": lambda t, ids: scan(
        lambda c, i: (scan(lambda c, j: (c + t[j] * t[i[0]], None), c, i), None), jnp.zeros(D), ids
    ),
    "scan: in checkpoint": lambda t, ids: jax.checkpoint(microbatches)(t, ids),
    "scan: in jit in scan": lambda t, ids: scan(
        lambda c, i: (c + jax.jit(microbatches)(t, i[:, None]), None), 0.0, ids
    ),
    "scan: under vmap": lambda t, ids: jax.vmap(
        lambda i: scan(lambda c, j: (c + t[j], None), jnp.zeros(D), i)
    )(ids),
    "scan: vmap in it": lambda t, ids: scan(
        lambda c, i: (c + jax.vmap(lambda j: t[j])(i), None), jnp.zeros((3, D)), ids
    ),
    "scan: the table carried unchanged": lambda t, ids: scan(
        lambda c, i: ((c[0], c[1] + c[0][i]), None), (t, jnp.zeros((3, D))), ids
    )[1],
    "scan: the table carried in a state": lambda t, w, ids: scan(
        lambda c, i: ({**c, "h": c["h"] + c["params"]["t"][i] @ c["params"]["w"]}, None),
        {"params": {"t": t, "w": w}, "h": jnp.zeros((3, D))},
        ids,
    )["h"],
    "scan: the table carried and closed over": lambda t, ids: scan(
        lambda c, i: ((c[0], c[1] + c[0][i] * t[i[::-1]]), None), (t, jnp.zeros((3, D))), ids
    )[1],
    "scan: read again after": lambda t, w, ids: rnn(t, w, ids) * t[ids[:, 0]],
    "scan: two reads": lambda t, ids: scan(
        lambda c, i: (c + jnp.sum(t[i] * t[i[0]]), None), 0.0, ids
    ),
    "scan: two tables": lambda t, u, ids: scan(BODY_OF_TWO(t, u), 0.0, ids),
    "scan: ids are carried": lambda t, ids: scan(
        lambda c, _: ((jnp.abs(c[0] * 7 + 1) % 50, c[1] + t[c[0]]), None),
        (ids, jnp.zeros((*ids.shape, D))),
        None,
        length=3,
    )[1],
    "scan: ids depend on rows": lambda t, ids: scan(
        lambda c, i: ((jnp.argmax(t[c[0]], -1) + i, c[1] + t[c[0]]), None),
        (ids[0], jnp.zeros((3, D))),
        ids,
    )[1],
    "scan: rows of a cast table": lambda t, ids: scan(
        lambda c, i: (c + t.astype(jnp.bfloat16)[i].astype(jnp.float32), None),
        jnp.zeros((3, D)),
        ids,
    ),
    "scan: table times scale in it": lambda t, scale, ids: scan(
        lambda c, i: (c + (t * scale)[i], None), jnp.zeros((3, D)), ids
    ),
    "scan: table times scale before it": lambda t, scale, ids: microbatches(t * scale, ids),
    "associative_scan of rows": lambda t, ids: lax.associative_scan(jnp.add, t[ids], axis=1),
    "cumsum of rows": lambda t, ids: jnp.cumsum(t[ids], axis=1),
    "map": lambda t, ids: lax.map(lambda i: t[i], ids),
    "map: batch_size": lambda t, ids: lax.map(lambda i: t[i], ids.ravel(), batch_size=2),
    "map: batch_size, a remainder": lambda t, ids: lax.map(
        lambda i: t[i], ids.ravel(), batch_size=4
    ),
    "fori_loop": lambda t, ids: lax.fori_loop(
        0, 3, lambda k, c: c + t[ids[:, k]], jnp.zeros((ids.shape[0], D))
    ),
    "fori_loop: rows of its counter": lambda t, ids: lax.fori_loop(
        0, 3, lambda k, c: c + t[k + ids[0]], jnp.zeros((3, D))
    ),
    "fori_loop: the table carried": lambda t, ids: lax.fori_loop(
        0, 3, lambda k, c: (c[0], c[1] + c[0][ids[:, k]]), (t, jnp.zeros((ids.shape[0], D)))
    )[1],
    "cond": lambda t, ids: lax.cond(ids[0, 0] > 5, lambda: t[ids], lambda: -t[ids[:, ::-1]]),
    "cond: an operand": lambda t, ids: lax.cond(
        ids[0, 0] > 5, lambda t: t[ids], lambda t: -t[ids] * 3, t
    ),
    "cond: a branch without read": lambda t, ids: lax.cond(
        ids[0, 0] > 5, lambda: t[ids], lambda: jnp.ones((*ids.shape, D))
    ),
    "cond: of other lengths": lambda t, ids: lax.cond(
        ids[0, 0] > 5, lambda: t[ids].sum((0, 1)), lambda: t[ids[0, 0]]
    ),
    "cond: another table each": lambda t, u, ids: lax.cond(
        ids[0, 0] > 5, lambda: t[ids], lambda: u[ids]
    ),
    "cond: which table": lambda t, u, ids: lax.cond(
        ids[0, 0] > 5, lambda t, u: t[ids], lambda t, u: u[ids] * t[ids[::-1]], t, u
    ),
    "cond: under vmap": lambda t, ids: jax.vmap(
        lambda i: lax.cond(i[0] > 5, lambda: t[i], lambda: -t[i[::-1]])
    )(ids),
    "cond: in checkpoint": lambda t, ids: jax.checkpoint(
        lambda t: lax.cond(ids[0, 0] > 5, lambda: t[ids], lambda: -t[ids])
    )(t),
    "cond: in scan": lambda t, ids: scan(
        lambda c, i: (c + lax.cond(i[0] > 5, lambda: t[i], lambda: t[i[::-1]] * 2), None),
        jnp.zeros((3, D)),
        ids,
    ),
    "cond: scan in it": lambda t, ids: lax.cond(
        ids[0, 0] > 5, lambda: microbatches(t, ids), lambda: total(t[ids[0]])
    ),
    "cond: in cond": lambda t, ids: lax.cond(
        ids[0, 0] > 5,
        lambda: lax.cond(ids[0, 1] > 5, lambda: t[ids[0]], lambda: t[ids[1]]),
        lambda: t[ids[0]] * 2,
    ),
    "switch": lambda t, ids: lax.switch(
        ids[0, 0] % 3, [lambda: jnp.zeros((*ids.shape, D)), lambda: t[ids], lambda: -t[ids]]
    ),
    "switch: a table each": lambda t, u, v, ids: lax.switch(
        ids[0, 0] % 3, [lambda i: t[i], lambda i: u[i], lambda i: v[i]], ids
    ),
    "switch: in scan": lambda t, ids: scan(
        lambda c, i: (c + lax.switch(i[0] % 2, [lambda: t[i], lambda: t[i + 1]]), None),
        jnp.zeros((3, D)),
        ids,
    ),
    "platform_dependent": lambda t, ids: lax.platform_dependent(
        t, ids, cpu=lambda t, ids: t[ids], default=lambda t, ids: jnp.take(t, ids, axis=0)
    ),
    "where of two reads": lambda t, ids: jnp.where(ids[..., None] > 5, t[ids], t[ids + 1]),
    "ids from a while_loop": lambda t, ids: t[
        lax.while_loop(lambda i: jnp.sum(i) < 60, lambda i: i + 7, ids)
    ],
    "ids from a walk over frozen rows": lambda t, ids: t[
        lax.fori_loop(0, 3, lambda _, i: jnp.argmax(lax.stop_gradient(t)[i], -1) + i, ids)
    ],
}

CUSTOM_DERIVATIVES: dict[str, Any] = {
    "custom_jvp of the table": lambda t, ids: cubed(t)[ids],
    "custom_jvp of rows": lambda t, ids: cubed(t[ids]),
    "custom_jvp of rows in scan": lambda t, ids: scan(
        lambda c, i: (c + cubed(t[i]), None), jnp.zeros((3, D)), ids
    ),
    "custom_vjp of rows": lambda t, ids: reversed_gradient(t[ids]),
    "custom_vjp of rows in scan": lambda t, ids: scan(
        lambda c, i: (c + reversed_gradient(t[i]), None), jnp.zeros((3, D)), ids
    ),
    "custom_vjp of rows in vmap": lambda t, ids: jax.vmap(
        lambda i: reversed_gradient(t[i]) * t[i[0]]
    )(ids),
    "custom_gradient of rows": lambda t, ids: clipped_gradient(t[ids]),
    "relu of the table": lambda t, ids: jax.nn.relu(t)[ids],
    "relu6 of rows": lambda t, ids: jax.nn.relu6(t[ids]),
    "silu of the table": near(lambda t, ids: jax.nn.silu(t)[ids]),
    "gelu of the table": near(lambda t, ids: jax.nn.gelu(t)[ids]),
    "softplus of the table": near(lambda t, ids: jax.nn.softplus(t)[ids]),
    "log_sigmoid of the table": near(lambda t, ids: jax.nn.log_sigmoid(t)[ids]),
    "logsumexp of rows": near(lambda t, ids: jax.nn.logsumexp(t, axis=1)[ids]),
    "softmax of rows": near(lambda t, ids: jax.nn.softmax(t, axis=1)[ids]),
    "logaddexp of two tables": near(lambda t, u, ids: jnp.logaddexp(t, u)[ids]),
}

# ---- B: what treats the rows apart, and masks of rows ----

ROW_FUNCTIONS: dict[str, Any] = {
    "(2 * t)[ids]": lambda t, ids: (2 * t)[ids],
    "(t * sqrt(d))[ids]": lambda t, ids: (t * jnp.sqrt(1.0 * D))[ids],
    "(t / 2 + 1)[ids]": lambda t, ids: (t / 2 + 1)[ids],
    "(t * factor)[ids]": lambda t, factor, ids: (t * factor)[ids],
    "(t * scale)[ids]": lambda t, scale, ids: (t * scale)[ids],
    "(t * scale)[ids]: missing ids": lambda t, scale, ids: jnp.take(
        t * scale, ids * 40, axis=0, fill_value=0
    ),
    "(t * scale)[ids] + t[ids]": lambda t, scale, ids: (t * scale)[ids] + t[ids],
    "(t * scale)[id]": lambda t, scale, ids: (t * scale)[ids[0, 0]],
    "(t * exp(scale))[ids]": near(lambda t, scale, ids: (t * jnp.exp(scale / 4))[ids]),
    "(t + bias)[ids]": lambda t, first, ids: (t + first)[ids],
    "(-t)[ids]": lambda t, ids: (-t)[ids],
    "(t ** 2)[ids]": lambda t, ids: (t**2)[ids],
    "abs(t)[ids]": lambda t, ids: jnp.abs(t)[ids],
    "tanh(t)[ids]": near(lambda t, ids: jnp.tanh(t)[ids]),
    "exp(t)[ids]": near(lambda t, ids: jnp.exp(t)[ids]),
    "clip(t)[ids]": lambda t, ids: jnp.clip(t, -2, 2)[ids],
    "maximum(t, factor)[ids]": lambda t, factor, ids: jnp.maximum(t, factor * 0.5)[ids],
    "t in bfloat16 and back": lambda t, ids: t.astype(jnp.bfloat16).astype(jnp.float32)[ids],
    "t scaled in bfloat16": lambda t, ids: (t.astype(jnp.bfloat16) * 2)[ids].astype(jnp.float32),
    "round(t), straight through": lambda t, ids: straight_through(t)[ids],
    "round(t) by a frozen scale": Idiom(
        lambda t, ids: (lambda s: t + lax.stop_gradient(jnp.round(t / s) * s - t))(
            jnp.max(jnp.abs(lax.stop_gradient(t)), axis=1, keepdims=True)
        )[ids],
        memory=False,
    ),
    "t / norm(t) of rows": near(lambda t, ids: (t / norm(t))[ids]),
    "t / maximum(norm(t), 1) of rows": near(lambda t, ids: (t / jnp.maximum(norm(t), 1))[ids]),
    "t with rows of a largest norm": near(
        lambda t, ids: (t * jnp.minimum(1.0, 3 / (norm(t) + 1e-7)))[ids]
    ),
    "t * rsqrt(sum of squares)": near(
        lambda t, ids: (t * lax.rsqrt(jnp.sum(t * t, 1, keepdims=True)))[ids]
    ),
    "t / max(t) of rows": near(lambda t, ids: (t / jnp.max(jnp.abs(t), 1, keepdims=True))[ids]),
    "t / sum(t) of rows": near(lambda t, ids: (t / (9 + jnp.sum(t, axis=1)[:, None]))[ids]),
    "t - mean(t) of rows": lambda t, ids: (t - jnp.mean(t, axis=1, keepdims=True))[ids],
    "layer norm of rows": near(lambda t, scale, ids: (layer_norm(t) * scale)[ids]),
    "standardize of rows": near(lambda t, ids: jax.nn.standardize(t)[ids], tolerance=1e-5),
    "weight norm": near(lambda t, flat, ids: (flat[:, None] * t / norm(t))[ids]),
    "softmax times scale": near(lambda t, scale, ids: (jax.nn.softmax(t) * scale)[ids]),
    "sum of columns": lambda t, ids: jnp.sum(t, axis=1)[ids],
    "(t * u).sum(1)[ids]": lambda t, u, ids: jnp.sum(t * u, axis=1)[ids],
    "vmap of a row function": near(lambda t, ids: jax.vmap(lambda r: r / jnp.sum(r**2))(t)[ids]),
    "jit of a row function": lambda t, scale, ids: jax.jit(lambda t: t * scale + 1)(t)[ids],
    "checkpoint of a row function": lambda t, scale, ids: jax.checkpoint(lambda t: t * scale + 1)(
        t
    )[ids],
    "cumsum of columns": lambda t, ids: jnp.cumsum(t, axis=1)[ids],
    "columns permuted": lambda t, ids: t[:, jnp.array([2, 0, 3, 1])][ids],
    "columns reversed": lambda t, ids: t[:, ::-1][ids],
    "columns repeated": lambda t, ids: jnp.tile(t, (1, 2))[ids],
    "columns of both": lambda t, u, ids: jnp.concatenate([t, u], axis=1)[ids],
    "columns padded": lambda t, ids: jnp.pad(t, ((0, 0), (0, 2)))[ids],
    "a column of ones": lambda t, ids: jnp.hstack([t, jnp.ones((len(t), 1))])[ids],
    "complex of two halves": lambda t, ids: (lambda z: z.real * z.imag)(
        lax.complex(t[:, :2], t[:, 2:])[ids]
    ),
    "complex of two tables": lambda t, u, ids: (lambda z: z.real + 2 * z.imag)((t + 1j * u)[ids]),
    "FFT of each row": near(lambda t, ids: jnp.fft.rfft(t, axis=1)[ids].real),
    "(t @ w)[ids]": lambda t, w, ids: (t @ w)[ids],
    "(t @ w.T + bias)[ids]": lambda t, w, first, ids: (t @ w.T + first)[ids],
    "(t @ w) read twice": lambda t, w, ids: (lambda x: x[ids] * x[ids[:, ::-1]])(t @ w),
    "einsum(t, layers)[ids]": lambda t, layers, ids: jnp.einsum("vd,fde->vfe", t, layers)[ids],
    "dense layers of the table": lambda t, w, first, ids: (jax.nn.relu(t @ w + first) @ w)[ids],
    "(t + column)[ids]": Idiom(lambda t, column, ids: (t + column)[ids], memory=False),
    "(t * column)[ids]": Idiom(lambda t, column, ids: (t * column)[ids], memory=False),
    "(t + flat[:, None])[ids]": lambda t, flat, ids: (t + flat[:, None])[ids],
    "(t * flat[:, None])[ids]": lambda t, flat, ids: (t * flat[:, None])[ids],
    "(t * frozen column)[ids]": lambda t, column, ids: (t * lax.stop_gradient(column))[ids],
    "(t / frequency)[ids]": lambda t, ids: (t / (1.0 + iota(t) % 4)[:, None])[ids],
    "a constant per row": Idiom(
        lambda t, ids: (t * np.resize([1, 2, 3], (len(t), 1)).astype(np.float32))[ids],
        memory=False,
    ),
    "dropout of rows": Idiom(
        lambda t, ids: (t * 2 * jax.random.bernoulli(jax.random.key(0), 0.5, (len(t), 1)))[ids],
        memory=False,
    ),
    "(t + u)[ids]: base and delta": lambda t, u, ids: (t + u)[ids],
    "(t + frozen column)[ids]": lambda t, column, ids: (t + lax.stop_gradient(column * 2))[ids],
    "(base + t @ low)[ids]": lambda t, u, low, ids: (u + t[:, :2] @ low)[ids],
    "(t * u)[ids]": lambda t, u, ids: (t * u)[ids],
    "(t - u)[ids] + t[ids]": lambda t, u, ids: (t - u)[ids] + t[ids],
    "maximum(t, u)[ids]": lambda t, u, ids: jnp.maximum(t, u + 0.5)[ids],
    "(t * factor + u * (1 - factor))[ids]": lambda t, u, factor, ids: (
        t * factor + u * (1 - factor)
    )[ids],
    "where(t > 0, t, u)[ids]": lambda t, u, ids: jnp.where(t > 0, t, u)[ids],
    "t + frozen t": lambda t, ids: (t - lax.stop_gradient(t) / 2)[ids],
}

ROW_MASKS: dict[str, Any] = {
    "where(arange(V) != 0, t, 0)": lambda t, ids: jnp.where(iota(t)[:, None] != 0, t, 0)[ids],
    "where(arange(V) == pad, 0, t)": lambda t, ids: jnp.where((iota(t) == 3)[:, None], 0.0, t)[ids],
    "where(arange(V) < n, t, u)": lambda t, u, ids: jnp.where(iota(t)[:, None] < 6, t, u)[ids],
    "where(arange(V) == 0, first, t)": lambda t, first, ids: jnp.where(
        iota(t)[:, None] == 0, first, t
    )[ids],
    "t * (arange(V) != 0)": lambda t, ids: (t * (iota(t) != 0)[:, None])[ids],
    "t.at[0].set(0)": lambda t, ids: t.at[0].set(0)[ids],
    "t.at[0].set(0), twice read": lambda t, ids: (lambda x: x[ids] * x[ids + 1])(t.at[0].set(0)),
    "t.at[-1].set(0)": lambda t, ids: t.at[-1].set(0)[ids],
    "t.at[0].mul(0)": lambda t, ids: t.at[0].mul(0)[ids],
    "t.at[0].multiply(2)": lambda t, ids: t.at[0].multiply(2)[ids],
    "t.at[0].add(scale)": lambda t, scale, ids: t.at[0].add(scale)[ids],
    "t.at[0].set(scale)": lambda t, scale, ids: t.at[0].set(scale)[ids],
    "t.at[:2].set(0)": lambda t, ids: t.at[:2].set(0)[ids],
    "t.at[:2].set(low)": lambda t, low, ids: t.at[:2].set(low)[ids],
    "t.at[[0, 3]].set(0)": lambda t, ids: t.at[jnp.array([0, 3])].set(0)[ids],
    "a mask before the scale": lambda t, scale, ids: (t.at[0].set(0) * scale)[ids],
    "concatenate [0, t]": lambda t, ids: jnp.concatenate([jnp.zeros((1, D)), t])[ids + 1],
    "concatenate [0, t], shifted": lambda t, ids: jnp.concatenate([jnp.zeros((1, D)), t])[ids],
    "concatenate [t, 0]": lambda t, ids: jnp.concatenate([t, jnp.zeros((1, D))])[ids],
    "concatenate [0, t, 0]": lambda t, ids: jnp.concatenate(
        [jnp.zeros((1, D)), t, jnp.zeros((2, D))]
    )[ids],
    "concatenate [0, t]: missing ids": lambda t, ids: jnp.take(
        jnp.concatenate([jnp.zeros((1, D)), t]), ids * 40, axis=0, fill_value=3
    ),
    "concatenate [first, t]": lambda t, first, ids: jnp.concatenate([first, t])[ids],
    "vstack [t, low]": lambda t, low, ids: jnp.vstack([t, low])[ids + 1],
    "concatenate [t, u]": lambda t, u, ids: jnp.concatenate([t, u])[ids * 2],
    "concatenate [t, u, v], offsets": lambda t, u, v, ids: jnp.concatenate([t, u, v])[
        ids + offsets(t)
    ],
    "concatenate [0, t] * scale": lambda t, scale, ids: (
        jnp.concatenate([jnp.zeros((1, D)), t]) * scale
    )[ids],
    "concatenate [t * scale, u]": lambda t, u, scale, ids: jnp.concatenate([t * scale, u])[ids * 2],
    "pad": lambda t, ids: jnp.pad(t, ((1, 0), (0, 0)))[ids],
    "pad by a value": lambda t, ids: jnp.pad(t, ((1, 2), (0, 0)), constant_values=3)[ids],
    "t[1:]": lambda t, ids: t[1:][ids],
    "t[:-1]": lambda t, ids: t[:-1][ids],
    "t[:n]": lambda t, ids: t[:70][ids],
    "t[1:] and a zero row": lambda t, ids: jnp.concatenate([jnp.zeros((1, D)), t[1:]])[ids],
    "t[::2]": lambda t, ids: t[::2][ids],
    "t[::-1]": lambda t, ids: t[::-1][ids],
    "flip": lambda t, ids: jnp.flip(t, 0)[ids],
    "roll": lambda t, ids: jnp.roll(t, 1, axis=0)[ids],
    "roll back": lambda t, ids: jnp.roll(t, -2, axis=0)[ids],
    "rows shuffled": Idiom(
        lambda t, ids: t[jax.random.permutation(jax.random.key(0), len(t))][ids], memory=False
    ),
    "rows in the order of their values": Idiom(
        lambda t, ids: t[jnp.argsort(t[:, 0])][ids], memory=False
    ),
    "split of the rows": lambda t, ids: (lambda a, b: a[ids] * b[ids])(*jnp.split(t, [50])),
}

# ---- C: parts of rows ----

PARTS: dict[str, Any] = {
    "t[ids, :k]": lambda t, ids: t[ids, :2],
    "t[ids, 1:]": lambda t, ids: t[ids, 1:],
    "t[ids, :k] and t[ids, k:]": lambda t, ids: t[ids, :2] * t[ids[:, ::-1], 2:],
    "t[:, :k][ids]": lambda t, ids: t[:, :2][ids],
    "t[:, 1:3][ids] in scan": lambda t, ids: scan(
        lambda c, i: (c + t[:, 1:3][i], None), jnp.zeros((3, 2)), ids
    ),
    "t[ids][:, :k]": lambda t, ids: t[ids][..., :2],
    "t[ids, 3]": lambda t, ids: t[ids, 3],
    "t[ids, -1]": lambda t, ids: t[ids, -1],
    "t[:, 3][ids]": lambda t, ids: t[:, 3][ids],
    "t[id, 3]": lambda t, ids: t[ids[0, 0], 3],
    "t[id, :k]": lambda t, ids: t[ids[0, 0], :2],
    "Q[s, a]": lambda t, ids: t[ids, ids % D],
    "Q[s, a]: vmap": lambda t, ids: jax.vmap(lambda s, a: t[s, a])(ids[0], ids[1] % D),
    "Q[s, a]: one": lambda t, ids: t[ids[0, 0], ids[0, 1] % D],
    "Q[s][a]: vmap": lambda t, ids: jax.vmap(lambda s, a: t[s][a])(ids[0], ids[1] % D),
    "Q[s].max()": lambda t, ids: t[ids].max(-1),
    "t[ids, cols]: pairs": lambda t, ids: t[ids[..., None], jnp.array([0, 2])],
    "t[ids][..., cols]": lambda t, ids: t[ids][..., jnp.array([0, 2, 2])],
    "t[:, cols][ids]": lambda t, ids: t[:, jnp.array([0, 2, 2])][ids],
    "t[ix_(ids, cols)]": lambda t, ids: t[jnp.ix_(ids[0], jnp.array([0, 2]))],
    "get a column, missing ids": lambda t, ids: t.at[ids * 40, 1].get(mode="fill", fill_value=0),
    "split of columns": lambda t, ids: (lambda a, b: a[ids] * b[ids])(*jnp.split(t, 2, axis=1)),
    "split of columns read": lambda t, ids: (lambda a, b: a * b)(*jnp.split(t[ids], 2, axis=-1)),
    "pair[ids, :, 0]": lambda pair, ids: pair[ids[:, 0], :, 0] * pair[ids[:, 1], :, 1],
    "pair[..., 0][ids]": lambda pair, ids: pair[..., 0][ids] * pair[..., 1][ids],
    "pair[ids, 1]": lambda pair, ids: pair[ids, 1],
    "pair[ids, 1, 0]": lambda pair, ids: pair[ids, 1, 0],
    "take_along_axis of rows": lambda t, ids: jnp.take_along_axis(
        t, jnp.broadcast_to(ids.reshape(-1, 1), (ids.size, D)), axis=0
    ),
    "take_along_axis of rows, a column": lambda t, ids: jnp.take_along_axis(
        t, ids.reshape(-1, 1), axis=0
    ),
    "take_along_axis: ids by column": lambda t, ids: jnp.take_along_axis(
        t, ids.reshape(-1, 1) + jnp.arange(D), axis=0
    ),
    "take_along_axis of columns read": lambda t, ids: jnp.take_along_axis(
        t[ids], ids[..., None] % D, axis=-1
    ),
    "take_along_axis of columns": lambda t, ids: jnp.take_along_axis(
        t, iota(t)[:, None] % D, axis=1
    )[ids],
    "a window": lambda t, ids: lax.dynamic_slice_in_dim(t, ids[0, 0], 3),
    "a window of columns": lambda t, ids: lax.dynamic_slice(t, (ids[0, 0], 1), (1, 2)),
    "a window at a dynamic column": lambda t, ids: lax.dynamic_slice(
        t, (ids[0, 0], ids[0, 1] % 3), (2, 2)
    ),
    "windows: vmap": lambda t, ids: jax.vmap(lambda i: lax.dynamic_slice_in_dim(t, i, 3))(ids[0]),
    "windows: in scan": lambda t, ids: scan(
        lambda c, i: (c + lax.dynamic_slice_in_dim(t, i, 3), None), jnp.zeros((3, D)), ids[0]
    ),
    "windows: gather": lambda t, ids: windows(t, jnp.abs(ids[0])),
    "windows: gather, clipped": lambda t, ids: windows(t, ids[0] * 40, mode="clip"),
    "windows: gather, not inside as promised": lambda t, ids: windows(
        t, ids[0] * 40, mode="promise_in_bounds"
    ),
    "windows: gather, filled": lambda t, ids: windows(t, ids[0] * 40, mode="fill", fill_value=0),
    "windows by ids": lambda t, ids: t[ids[..., None] + jnp.arange(-1, 2)],
    "dynamic_index_in_dim": lambda t, ids: lax.dynamic_index_in_dim(t, ids[0, 0]),
    "a static window": static(lambda t, ids: t[2:5] * (ids[0, 0] % 3)),
    # Gathers on old versions of JAX: this, and "t[None, :n]".
    "static rows, strided": Idiom(lambda t, ids: t[2:9:3] * (ids[0, 0] % 3), auto=None),
    "grid[y, x]": lambda grid, ids: grid[ids % 30, ids % 4],
    "grid[y, x]: corners": lambda grid, ids: sum(
        grid[ids % 29 + i, ids % 3 + j] * (i + 2 * j) for i in range(2) for j in range(2)
    ),
    "grid[y, x, :k]": lambda grid, ids: grid[ids % 30, ids % 4, :2],
    "relative positions": lambda t, ids: t[ids[0][:, None] - ids[0] + 50].transpose(2, 0, 1),
}

# ---- D: stacks of tables ----

STACKS: dict[str, Any] = {
    "stack[0, ids]": lambda stack, ids: stack[0, ids] * stack[2, ids],
    "stack[0][ids]": lambda stack, ids: stack[0][ids] * stack[2][ids],
    "stack[k][ids]: all tables": lambda stack, ids: sum(stack[k][ids[:, k]] for k in range(F)),
    "stack[k][ids]: dynamic": lambda stack, ids: stack[ids[0, 0] % F][ids],
    "stack[k, ids]: dynamic": lambda stack, ids: stack[ids[0, 0] % F, ids],
    "stack[ks, ids]": lambda stack, ids: stack[ids % F, ids],
    "stack[arange(F), ids]": lambda stack, ids: stack[jnp.arange(F), ids],
    "stack[arange(F)[:, None], ids]": lambda stack, ids: stack[jnp.arange(F)[:, None], ids.T],
    "stack[:, ids]": lambda stack, ids: stack[:, ids],
    "take(stack, axis=1)": lambda stack, ids: jnp.take(stack, ids, axis=1),
    "stack[:, id]": lambda stack, ids: stack[:, ids[0, 0]],
    "stack[k, ids, :c]": lambda stack, ids: stack[1, ids, :2],
    "vmap over tables and ids": lambda stack, ids: jax.vmap(lambda t, i: t[i], (0, 1))(stack, ids),
    "vmap over tables": lambda stack, ids: jax.vmap(lambda t: t[ids])(stack),
    "vmap of take": lambda stack, ids: jax.vmap(lambda t, i: jnp.take(t, i, axis=0), (0, 1), 1)(
        stack, ids
    ),
    "vmap of one id each": lambda stack, ids: jax.vmap(lambda t, i: t[i])(stack, ids[0]),
    "vmap over examples and tables": lambda stack, ids: jax.vmap(
        jax.vmap(lambda t, i: t[i]), (None, 0)
    )(stack, ids),
    "vmap over (V, F, D)": lambda inner, ids: jax.vmap(lambda t, i: t[i], (1, 1))(inner, ids),
    "vmap of a scaled table": lambda stack, layers, ids: jax.vmap(lambda t, w: (t @ w)[ids])(
        stack, layers
    ),
    "reshape (F V, D) with offsets": lambda stack, ids: stack.reshape(-1, D)[
        ids + offsets(stack[0])
    ],
    "inner[ids]": lambda inner, ids: inner[ids],
    "inner[ids, k]": lambda inner, ids: inner[ids, 1],
    "inner[ids, ks]": lambda inner, ids: inner[ids, ids % F],
    "inner[:, k][ids]": lambda inner, ids: inner[:, 1][ids],
    "swapaxes": lambda stack, ids: stack.swapaxes(0, 1)[ids],
    "transpose": lambda stack, ids: stack.transpose(1, 0, 2)[ids],
    "moveaxis": lambda inner, ids: jnp.moveaxis(inner, 1, 0)[1][ids],
    "unstack": lambda stack, ids: sum(t[ids] for t in jnp.split(stack, F)[0]),
    "take_along_axis": lambda stack, ids: jnp.take_along_axis(stack, ids.T[..., None], axis=1),
    "scan over tables": lambda stack, ids: scan(
        lambda c, t: (c + t[ids], None), jnp.zeros((*ids.shape, D)), stack
    ),
    "scan over tables and ids": lambda stack, ids: scan(
        lambda c, x: (c + x[0][x[1]], None), jnp.zeros((ids.shape[0], D)), (stack, ids.T)
    ),
    "scan over layers with a table": lambda stack, layers, ids: scan(
        lambda h, x: (h @ x[1] + x[0][ids], None), jnp.zeros((*ids.shape, D)), (stack, layers)
    ),
    "map over tables": lambda stack, ids: lax.map(lambda t: t[ids], stack),
    "fori_loop over tables": lambda stack, ids: lax.fori_loop(
        0, F, lambda k, c: c + stack[k][ids], jnp.zeros((*ids.shape, D))
    ),
    "(stack * scale)[k, ids]": lambda stack, scale, ids: (stack * scale)[1, ids],
    "a padding row in each": lambda stack, ids: stack.at[:, 0].set(0)[jnp.arange(F), ids],
    "stack of tables": lambda t, u, ids: jnp.stack([t, u])[ids % 2, ids],
    "stack of tables, vmap": lambda t, u, ids: jax.vmap(lambda t, i: t[i])(jnp.stack([t, u]), ids),
    "stack of tables, axis 1": lambda t, u, ids: jnp.stack([t, u], axis=1)[ids],
    "reshape (V, a, b)": lambda t, ids: t.reshape(-1, 2, 2)[ids],
    "reshape (V, a, b) to (V, D)": lambda pair, ids: pair.reshape(len(pair), -1)[ids],
    "reshape (V / k, k D)": lambda t, ids: t.reshape(-1, 2 * D)[ids // 2],
    "reshape (V / k, k, D)": lambda t, ids: t.reshape(-1, 2, D)[ids // 2, ids % 2],
    "reshape (V D,)": lambda t, ids: t.reshape(-1)[ids * D + 1],
    "reshape of a grid": lambda grid, ids: grid.reshape(-1, D)[ids],
    "reshape there and back": lambda t, ids: t.reshape(-1, 2, 2).reshape(t.shape)[ids],
    "heads of rows": lambda t, scale, ids: (t.reshape(-1, 2, 2) * scale.reshape(2, 2))[ids],
}

# ---- E: uses that carry no gradient ----

NO_GRADIENT: dict[str, Any] = {
    "aux: a sum": lambda t, ids: (t[ids], t.sum()),
    "aux: a norm": lambda t, ids: (t[ids], {"norm": jnp.linalg.norm(t), "n": 3}),
    "aux: nearest of the whole table": lambda t, ids: (t[ids], jnp.argmax(t[ids[0]] @ t.T, -1)),
    "aux: distance from another": lambda t, u, ids: (t[ids] * u[ids], jnp.mean((t - u) ** 2)),
    "aux: an average of the table": lambda t, column, ids: (
        t[ids],
        jnp.mean(0.9 * column + 0.1 * t),
    ),
    "debug.print": lambda t, ids: (jax.debug.print("{}", jnp.sum(t), ordered=False), t[ids])[1],
    "debug.callback": lambda t, ids: (jax.debug.callback(lambda x: None, jnp.max(t)), t[ids])[1],
    "debug.callback in scan": lambda t, ids: scan(
        lambda c, i: (c + t[i], jax.debug.callback(lambda x: None, jnp.max(t))),
        jnp.zeros((3, D)),
        ids,
    ),
    "isnan": lambda t, ids: jnp.where(jnp.isnan(t).any(), jnp.nan, t[ids]),
    "isfinite, cond": lambda t, ids: lax.cond(
        jnp.isfinite(t).all(), lambda: t[ids], lambda: jnp.zeros((*ids.shape, D))
    ),
    "argmax": lambda t, ids: t[ids] * (1 + jnp.argmax(t[:, 0]) % 2),
    "argmax gives the ids": lambda t, ids: t[jnp.argmax(t, axis=0)] * (ids[0, 0] % 3),
    "nearest row": lambda t, low, ids: (lambda nearest: t[nearest])(
        jnp.argmin(jnp.sum((low[:, None] - t) ** 2, -1), -1) + ids[0, 0]
    ),
    "a codebook, straight through": lambda t, w, ids: (
        lambda x: (
            x
            + lax.stop_gradient(t[jnp.argmax(x @ t.T, -1)] - x)
            + total(t[jnp.argmax(x @ t.T, -1)])
        )
    )(jnp.sum(w) + ids[..., None] % jnp.arange(1, 1 + D) - 1.0),
    "top_k gives the ids": lambda t, ids: t[lax.top_k(t[:, 0], 3)[1]] * (ids[0, 0] % 3),
    "comparisons": lambda t, ids: t[ids] * jnp.sum(t > 0).astype(jnp.float32) / 64,
    "count_nonzero": lambda t, ids: t[ids] * (jnp.count_nonzero(t) % 7),
    "sign": lambda t, ids: t[ids] * jnp.sign(t).sum(),
    "stop_gradient of a sum": lambda t, ids: t[ids] * lax.stop_gradient(jnp.sum(t) / 64),
    "sum of stop_gradient": lambda t, ids: t[ids] * jnp.sum(lax.stop_gradient(t)) / 64,
    "frozen logits": near(
        lambda t, ids: t[ids[0]] * jax.nn.softmax(lax.stop_gradient(t[ids[0]] @ t.T)).max()
    ),
    "shape only": lambda t, ids: t[ids] * t.shape[0],
    "zeros_like": lambda t, ids: t[ids] + jnp.zeros_like(t)[ids] + jnp.ones_like(t).sum() / 64,
    "result unused": lambda t, ids: (jnp.cumsum(t, axis=0), t[ids])[1],
    "a branch on the norm": lambda t, ids: lax.cond(
        jnp.sum(t * t) > 1.0, lambda: t[ids], lambda: 2 * t[ids]
    ),
}

# ---- F: views ----

VIEWS: dict[str, Any] = {
    "t[None][0, ids]": lambda t, ids: t[None][0, ids],
    "t[None][:, ids]": lambda t, ids: t[None][:, ids],
    "t[:, None][ids]": lambda t, ids: t[:, None][ids],
    "t[..., None][ids]": lambda t, ids: t[..., None][ids],
    "expand_dims and squeeze": lambda t, ids: jnp.squeeze(jnp.expand_dims(t, 0), 0)[ids],
    "t[None, :n] beside rows": lambda t, ids: t[None, :3] + t[ids],
    "t[None, :n]": Idiom(lambda t, ids: t[None, :3] * (ids[..., None] % 3), auto=None),
    "t[:n]": static(lambda t, ids: t[:3] * (ids[..., None] % 3)),
    "t[arange(n)]": Idiom(lambda t, ids: t[jnp.arange(3)] * (ids[..., None] % 3), auto=None),
    "t[arange(n) + start]": lambda t, ids: t[jnp.arange(3) + ids[0, 0]],
    "position[:, :n]": static(lambda position, ids: position[:, :3] * (ids[..., None] % 3)),
    "position[0, ids]": lambda position, ids: position[0, ids],
    "position[0][ids]": lambda position, ids: position[0][ids],
    "position[:, ids]": lambda position, ids: position[:, ids],
    "take(position, axis=1)": lambda position, ids: jnp.take(position, ids[0], axis=1),
    "position: a window": lambda position, ids: lax.dynamic_slice(
        position, (0, ids[0, 0], 0), (1, 3, D)
    ),
    "squeeze(position)": lambda position, ids: jnp.squeeze(position, 0)[ids],
    "broadcast_to": lambda t, ids: jnp.broadcast_to(t, (2, *t.shape))[ids[0] % 2, ids[0]],
    "broadcast_to, each read": lambda t, ids: jax.vmap(lambda t, i: t[i])(
        jnp.broadcast_to(t, (2, *t.shape)), ids
    ),
    "t.T[:, ids]": lambda t, ids: t.T[:, ids],
    "take(t.T, axis=1)": lambda t, ids: jnp.take(t.T, ids, axis=1),
    "t.T.T[ids]": lambda t, ids: t.T.T[ids],
    "(t.T * column)[:, ids]": lambda t, scale, ids: (t.T * scale[:, None])[:, ids],
    "rows with a named axis": lambda t, ids: jax.vmap(lambda col: col[ids], 1, -1)(t),
    "turned[:, ids]": either(lambda turned, ids: turned[:, ids]),
    "turned.T[ids]": either(lambda turned, ids: turned.T[ids]),
    "take(turned, axis=1)": either(lambda turned, ids: jnp.take(turned, ids, axis=1)),
    "take(turned, axis=-1)": either(lambda turned, ids: jnp.take(turned, ids, axis=-1)),
    "one_hot @ t": lambda t, ids: one_hot(ids, t) @ t,
    "one_hot @ t: missing ids": lambda t, ids: one_hot(ids * 40, t) @ t,
    "dot of one_hot": lambda t, ids: jnp.dot(one_hot(ids, t), t),
    "dot of ids == iota": lambda t, ids: jnp.dot(
        (ids[..., None] == lax.iota(jnp.int32, t.shape[0])).astype(t.dtype), t
    ),
    "dot of one_hot in bfloat16": lambda t, ids: jnp.dot(
        jax.nn.one_hot(ids, t.shape[0], dtype=jnp.bfloat16), t.astype(jnp.bfloat16)
    ).astype(jnp.float32),
    "einsum of one_hot": lambda t, ids: jnp.einsum("bsv,vd->bsd", one_hot(ids, t), t),
    "tensordot of one_hot": lambda t, ids: jnp.tensordot(one_hot(ids, t), t, 1),
    "matmul with scale of one_hot": either(lambda t, ids: (2 * one_hot(ids, t)) @ t),
    "bag of one_hot": either(lambda t, ids: one_hot(ids, t).sum(1) @ t),
    "vmap of one_hot @ t": lambda t, ids: jax.vmap(lambda i: one_hot(i, t) @ t)(ids),
}

# ---- bodies of shard_map in the function ----

SHARD_MAPS: dict[str, Any] = {
    "a replicated table": Idiom(
        lambda t, ids: on_two_devices(lambda t, i: t[i], (P(), P("d")), P("d"))(t, ids),
        mapped=False,
    ),
    "closed over": Idiom(
        lambda t, ids: on_two_devices(lambda i: t[i], P("d"), P("d"))(ids),
        mapped=False,
    ),
    "unchecked": Idiom(
        lambda t, ids: on_two_devices(lambda t, i: t[i], (P(), P("d")), P("d"), check_vma=False)(
            t, ids
        ),
        mapped=False,
    ),
    "a loss, summed": Idiom(
        lambda t, ids: on_two_devices(lambda t, i: lax.psum(total(t[i]), "d"), (P(), P("d")), P())(
            t, ids
        ),
        mapped=False,
    ),
    "scan in it": Idiom(
        lambda t, ids: on_two_devices(
            lambda t, i: lax.psum(microbatches(t, i), "d"), (P(), P("d")), P(), check_vma=False
        )(t, ids),
        mapped=False,
    ),
    "rows over devices": either(
        lambda t, ids: on_two_devices(
            lambda t, i: lax.psum(
                jnp.where(
                    (i[..., None] // len(t)) == lax.axis_index("d"),
                    t[(i - lax.axis_index("d") * len(t)).clip(0, len(t) - 1)],
                    0,
                ),
                "d",
            ),
            (P("d"), P()),
            P(),
        )(t, ids % t.shape[0]),
        mapped=False,
    ),
    "columns over devices": either(
        lambda t, ids: on_two_devices(lambda t, i: t[i], (P(None, "d"), P()), P(None, None, "d"))(
            t, ids
        ),
        mapped=False,
    ),
}

# ---- models ----


def sgns(t: Any, u: Any, ids: Any) -> Any:
    """Skip-gram with negative samples: Mikolov et al. (2013)."""
    centre, context = t[ids[:, 0]], u[ids[:, 1:]]
    logits = jnp.einsum("bd,bkd->bk", centre, context)
    return -jnp.sum(jax.nn.log_sigmoid(logits * jnp.array([1.0, -1.0])))


def cbow(t: Any, u: Any, ids: Any) -> Any:
    context = jnp.mean(t[ids[:, 1:]], axis=1)
    return jnp.sum((jnp.sum(context * u[ids[:, 0]], axis=-1) - 1) ** 2)


def glove(t: Any, u: Any, flat: Any, ids: Any) -> Any:
    i, j, count = ids[:, 0], ids[:, 1], ids[:, 2]
    return jnp.sum((jnp.sum(t[i] * u[j], -1) + flat[i] - count % 5) ** 2)


def dlrm(t: Any, u: Any, v: Any, w: Any, ids: Any) -> Any:
    """Pairwise products of three categories and a dense feature: Naumov et al. (2019)."""
    dense = jax.nn.relu((ids[:, :1] % 5).astype(jnp.float32) @ w[:1])
    x = jnp.stack([dense, t[ids[:, 0]], u[ids[:, 1]], v[ids[:, 2]]], axis=1)
    pairs = jnp.einsum("bid,bjd->bij", x, x)[:, *jnp.triu_indices(4, 1)]
    return jnp.sum(jax.nn.softplus(jnp.sum(pairs, -1) / 16 + dense @ w[0]))


def dlrm_of_one_table(stack: Any, w: Any, ids: Any) -> Any:
    x = jnp.take(stack.reshape(-1, D), ids + offsets(stack[0]), axis=0)
    return jnp.sum(jax.nn.softplus(jnp.einsum("bid,bjd->b", x @ w, x) / 16))


def factorization_machine(t: Any, flat: Any, ids: Any) -> Any:
    x = t[ids]
    pairs = jnp.sum(jnp.sum(x, 1) ** 2 - jnp.sum(x**2, 1), -1)
    return jnp.sum((jnp.sum(flat[ids], -1) + pairs) ** 2)


def trans_e(t: Any, u: Any, ids: Any) -> Any:
    """Bordes et al. (2013): entities on the sphere, a margin between true and false."""
    entities = t / norm(t)
    head, relation, tail = entities[ids[:, 0]], u[ids[:, 1]], entities[ids[:, 2]]
    false = entities[ids[:, 0] + 1]
    distance = lambda h: jnp.sum((h + relation - tail) ** 2, -1)  # noqa: E731
    return jnp.sum(jax.nn.relu(9 + distance(head) - distance(false)))


def complex_(t: Any, u: Any, ids: Any) -> Any:
    """Trouillon et al. (2016): real and imaginary halves."""
    (h_re, h_im), (r_re, r_im) = jnp.split(t, 2, axis=1), jnp.split(u, 2, axis=1)
    h, r, o = ids.T
    re = h_re[h] * r_re[r] - h_im[h] * r_im[r]
    im = h_re[h] * r_im[r] + h_im[h] * r_re[r]
    return jnp.sum((jnp.sum(re * h_re[o] + im * h_im[o], -1)) ** 2)


def rotate(t: Any, u: Any, ids: Any) -> Any:
    re, im = jnp.split(t[ids[:, 0]], 2, axis=-1)
    angle = u[ids[:, 1], :2]
    turned = jnp.concatenate(
        [re * jnp.cos(angle) - im * jnp.sin(angle), re * jnp.sin(angle) + im * jnp.cos(angle)], -1
    )
    return jnp.sum((turned - t[ids[:, 2]]) ** 2)


def matrix_factorization(t: Any, u: Any, flat: Any, factor: Any, ids: Any) -> Any:
    user, item, rating = ids.T
    predicted = factor + flat[user] + jnp.sum(t[user] * u[item], -1)
    decay = jnp.sum(t[user] ** 2) + jnp.sum(u[item] ** 2)
    return jnp.sum((predicted - rating % 5) ** 2) + decay


def bpr(t: Any, u: Any, ids: Any) -> Any:
    """Rendle et al. (2009), by examples."""
    score = lambda i: jnp.dot(t[i[0]], u[i[1]] - u[i[2]])  # noqa: E731
    return -jnp.sum(jax.nn.log_sigmoid(jax.vmap(score)(ids)))


def q_learning(t: Any, ids: Any) -> Any:
    state, action, after = ids.T
    target = lax.stop_gradient(ids[:, 0] % 3 + 0.5 * jnp.max(t[after], -1))
    return jnp.sum((t[state, action % D] - target) ** 2)


def sarsa_lambda(t: Any, ids: Any) -> Any:
    """A rollout: the value of each state by `scan`, from the last to the first."""
    values = lambda c, i: (0.5 * c + t[i, i % D], (t[i, i % D] - lax.stop_gradient(c)) ** 2)  # noqa: E731
    return jnp.sum(lax.scan(values, jnp.zeros(3), ids, reverse=True)[1])


def attention(x: Any, w: Any) -> Any:
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1])))
    scores = jnp.einsum("bqd,bkd->bqk", x @ w, x) / jnp.sqrt(1.0 * D)
    return x + jax.nn.softmax(jnp.where(mask, scores, -1e9)) @ x


def transformer(t: Any, u: Any, layers: Any, ids: Any) -> Any:
    """Tokens and positions; the output is tied to the rows of sampled tokens."""
    x = t[ids] * jnp.sqrt(1.0 * D) + u[: ids.shape[1]]
    for w in layers:
        x = attention(layer_norm(x), w)
    sampled = t[jnp.concatenate([ids, ids + 1], axis=1)]
    logits = jnp.einsum("bsd,bkd->bsk", x, sampled)
    return -jnp.sum(jax.nn.log_softmax(logits)[..., 0])


def transformer_by_scan(t: Any, layers: Any, ids: Any) -> Any:
    x = scan(jax.checkpoint(lambda x, w: (attention(layer_norm(x), w), None)), t[ids], layers)
    return jnp.sum(x[:, -1] * t[ids[:, 0]])


def language_model(t: Any, u: Any, w: Any, ids: Any) -> Any:
    """An RNN that reads a row of `t` each step, and predicts among sampled rows of `u`."""

    def step(h: Any, i: Any) -> Any:
        h = jnp.tanh(h @ w + t[i[0]])
        logits = jnp.einsum("bd,bkd->bk", h, u[jnp.stack([i[1], i[1] + 1], -1)])
        return h, -jnp.sum(jax.nn.log_softmax(logits)[:, 0])

    steps = jnp.stack([ids[:, :-1], ids[:, 1:]], axis=0).transpose(2, 0, 1)
    return jnp.sum(lax.scan(step, jnp.zeros((ids.shape[0], D)), steps)[1])


def hash_encoding(stack: Any, ids: Any) -> Any:
    """Levels of a hash table, interpolated linearly: Mueller et al. (2022)."""

    def level(t: Any, resolution: Any) -> Any:
        x = ids * resolution / 7
        low = jnp.floor(x).astype(jnp.int32)
        part = (x - low)[..., None]
        key = lambda i: (i * 31) % t.shape[0]  # noqa: E731
        return t[key(low)] * (1 - part) + t[key(low + 1)] * part

    return jax.vmap(level)(stack, jnp.array([1.0, 2.0, 4.0]))


def graph(t: Any, w: Any, ids: Any) -> Any:
    """Messages along edges between the nodes of a sample."""
    x = t[ids.ravel()]
    source, target = jnp.array([0, 1, 2, 3]), jnp.array([1, 2, 3, 0])
    return x + jax.ops.segment_sum(x[source] @ w, target, x.shape[0])


def experts(stack: Any, ids: Any) -> Any:
    """Tokens of the expert that a frozen router takes."""
    router = jnp.argmax(lax.stop_gradient(stack)[:, ids].sum(-1), axis=0)
    return stack[router, ids]


MODELS: dict[str, Any] = {
    "word2vec: skip-gram": near(sgns),
    "word2vec: CBOW": near(cbow),
    "GloVe": glove,
    "DLRM": near(dlrm),
    "DLRM: one table": near(dlrm_of_one_table),
    "factorization machine": factorization_machine,
    "TransE": near(trans_e),
    "ComplEx": complex_,
    "RotatE": near(rotate),
    "matrix factorization": matrix_factorization,
    "BPR": near(bpr),
    "Q-learning": q_learning,
    "SARSA": sarsa_lambda,
    # Positions are read by static indices alone: see `static`.
    "transformer": near(transformer, auto=None),
    "transformer: scan over layers": near(transformer_by_scan),
    "language model: RNN": near(language_model),
    "hash encoding": near(hash_encoding),
    "graph of a sample": graph,
    "experts": experts,
}

# ---- Flax, when it is installed ----


def _linen(build: Callable[[Any, int], Any]) -> Module:
    def make(rows: int) -> Any:
        nn = pytest.importorskip("flax.linen")
        module = build(nn, rows)
        ids = jax.ShapeDtypeStruct(IDS, jnp.int32)
        variables = jax.eval_shape(module.init, jax.random.key(0), ids)
        return variables["params"], lambda params, ids: module.apply({"params": params}, ids)

    return Module(make)


def _linen_module(body: Callable[[Any, Any, int, Any], Any]) -> Module:
    """A compact module with the body ``(nn, module, rows, ids)``."""

    def build(nn: Any, rows: int) -> Any:
        class Model(nn.Module):
            @nn.compact
            def __call__(self, ids: Any) -> Any:
                return body(nn, self, rows, ids)

        return Model()

    return _linen(build)


def _embedding_cell(nn: Any, rows: int) -> Any:
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, h: Any, ids: Any) -> Any:
            h = jnp.tanh(nn.Dense(D)(h) + nn.Embed(rows, D)(ids))
            return h, h

    return Cell


def _linen_scan(nn: Any, module: Any, rows: int, ids: Any) -> Any:
    scanned = nn.scan(
        _embedding_cell(nn, rows),
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=1,
    )
    return scanned()(jnp.zeros((ids.shape[0], D)), ids)[1]


def _linen_scan_of_layers(nn: Any, module: Any, rows: int, ids: Any) -> Any:
    """A table in each layer: they are stacked."""
    scanned = nn.scan(
        _embedding_cell(nn, rows),
        {"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=F,
    )
    return scanned()(jnp.zeros((*ids.shape, D)), ids)[0]


def _linen_remat_scan(nn: Any, module: Any, rows: int, ids: Any) -> Any:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x + jnp.tanh(nn.Dense(D)(x) + nn.Embed(rows, D)(ids))

    return nn.remat_scan(Layer, lengths=(2, 2))()(jnp.zeros((*ids.shape, D)))


def _linen_remat_scan_of_features(nn: Any, module: Any, rows: int, ids: Any) -> Any:
    x = nn.Embed(rows, D)(ids)
    return nn.remat_scan(nn.Dense, lengths=(2, 2))(D)(x)


def _linen_vmap(nn: Any, module: Any, rows: int, ids: Any) -> Any:
    embed = nn.vmap(
        nn.Embed, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1
    )
    return embed(rows, D)(ids)


def _linen_vmap_of_ensemble(nn: Any, module: Any, rows: int, ids: Any) -> Any:
    embed = nn.vmap(
        nn.Embed,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=F,
    )
    return embed(rows, D)(ids)


def _linen_lstm(nn: Any, module: Any, rows: int, ids: Any) -> Any:
    return nn.RNN(nn.OptimizedLSTMCell(D))(nn.Embed(rows, D)(ids))


def _linen_transformer(nn: Any, module: Any, rows: int, ids: Any) -> Any:
    embed = nn.Embed(rows, D, name="tokens")
    x = embed(ids) + nn.Embed(rows, D, name="positions")(jnp.arange(ids.shape[1]) + ids[:, :1] % 2)
    x = nn.LayerNorm()(nn.MultiHeadDotProductAttention(num_heads=2)(x))
    return jnp.sum(x * embed(ids[:, ::-1]), axis=-1)


def _linen_parameter(nn: Any, module: Any, rows: int, ids: Any) -> Any:
    table = module.param("embedding", nn.initializers.normal(), (rows, D))
    return jnp.take(jnp.concatenate([jnp.zeros((1, D)), table]) * jnp.sqrt(1.0 * D), ids, axis=0)


def _nnx(build: Callable[[Any, int, Any], Any]) -> Module:
    def make(rows: int) -> Any:
        nnx = pytest.importorskip("flax.nnx")
        graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx, rows, nnx.Rngs(0))))
        return state, lambda params, ids: nnx.merge(graph, params)(ids)

    return Module(make)


def _nnx_scan(nnx: Any, rows: int, rngs: Any) -> Any:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(rows, D, rngs=rngs)
            self.w = nnx.Param(jnp.eye(D))

        def __call__(self, ids: Any) -> Any:
            def step(model: Any, h: Any, ids: Any) -> Any:
                h = jnp.tanh(h @ model.w[...] + model.embed(ids))
                return h, h

            scanned = nnx.scan(step, in_axes=(None, nnx.Carry, 1), out_axes=(nnx.Carry, 1))
            return scanned(self, jnp.zeros((ids.shape[0], D)), ids)[1]

    return Model()


def _nnx_remat(nnx: Any, rows: int, rngs: Any) -> Any:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(rows, D, rngs=rngs)
            self.head = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, ids: Any) -> Any:
            return nnx.remat(lambda model, ids: jnp.tanh(model.head(model.embed(ids))))(self, ids)

    return Model()


def _nnx_vmap(nnx: Any, rows: int, rngs: Any) -> Any:
    class Model(nnx.Module):
        def __init__(self) -> None:
            embed = nnx.split_rngs(splits=F)(
                nnx.vmap(lambda rngs: nnx.Embed(rows, D, rngs=rngs), in_axes=0, out_axes=0)
            )
            self.embed = embed(rngs)

        def __call__(self, ids: Any) -> Any:
            return nnx.vmap(lambda embed, ids: embed(ids), in_axes=(0, 1), out_axes=1)(
                self.embed, ids
            )

    return Model()


FLAX: dict[str, Any] = {
    "linen: scan over time": near(_linen_module(_linen_scan)),
    "linen: scan over layers with a table each": near(_linen_module(_linen_scan_of_layers)),
    "linen: remat": near(
        _linen_module(lambda nn, _, rows, ids: jnp.tanh(nn.remat(nn.Embed)(rows, D)(ids)))
    ),
    "linen: remat_scan of tables": near(_linen_module(_linen_remat_scan)),
    "linen: remat_scan after": near(_linen_module(_linen_remat_scan_of_features)),
    "linen: vmap of Embed": near(_linen_module(_linen_vmap)),
    "linen: an ensemble of Embed": near(_linen_module(_linen_vmap_of_ensemble)),
    "linen: RNN of LSTM cells": near(_linen_module(_linen_lstm)),
    "linen: transformer": near(_linen_module(_linen_transformer), tolerance=1e-5),
    "linen: own parameter with a zero row": near(_linen_module(_linen_parameter)),
    "linen: Embed in bfloat16": near(
        _linen_module(
            lambda nn, _, rows, ids: nn.Embed(rows, D, dtype=jnp.bfloat16)(ids).astype(jnp.float32)
        ),
        tolerance=1e-2,
    ),
    "nnx: scan over time": near(_nnx(_nnx_scan)),
    "nnx: remat": near(_nnx(_nnx_remat)),
    "nnx: vmap of Embed": near(_nnx(_nnx_vmap)),
}

# ---- what needs the whole table: the operation that an error names ----

INHERENT: dict[str, tuple[Callable[..., Any], str]] = {
    "tied softmax": (lambda t, ids: jax.nn.logsumexp(t[ids] @ t.T / 16, axis=-1), "dot_general"),
    "tied softmax, einsum": (
        lambda t, w, ids: jax.nn.log_softmax(jnp.einsum("bsd,vd->bsv", t[ids] @ w / 16, t))[..., 0],
        "dot_general",
    ),
    "tied softmax in scan": (
        lambda t, ids: scan(lambda c, i: (c + jax.nn.logsumexp(t[i] @ t.T / 16), None), 0.0, ids),
        "dot_general",
    ),
    "L2 of the table": (
        lambda t, ids: total(t[ids]) + jnp.sum(t**2) / 4,
        "(integer_pow|square|reduce_sum)",
    ),
    "L2 of all parameters": (
        lambda t, w, ids: total(t[ids] @ w) + sum(jnp.vdot(x, x) for x in (t, w)) / 4,
        "dot_general",
    ),
    "L1 of the table in cond": (
        lambda t, ids: (
            total(t[ids]) + lax.cond(ids[0, 0] > 5, lambda: jnp.sum(jnp.abs(t)), lambda: 0.0)
        ),
        "(abs|reduce_sum)",
    ),
    "t / norm of the table": (lambda t, ids: (t / jnp.linalg.norm(t))[ids], "reduce_sum"),
    "t - mean over rows": (lambda t, ids: (t - jnp.mean(t, axis=0))[ids], "reduce_sum"),
    "t / max over rows": (lambda t, ids: (t / jnp.max(t, axis=0))[ids], "reduce_max"),
    "softmax over rows": (lambda t, ids: jax.nn.softmax(t, axis=0)[ids], "reduce_(max|sum)"),
    "read times a sum": (lambda t, ids: t[ids] * jnp.sum(t) / 64, "reduce_sum"),
    "cumsum over rows": (lambda t, ids: jnp.cumsum(t, axis=0)[ids] / 16, "cumsum"),
    "sort over rows": (lambda t, ids: jnp.sort(t, axis=0)[ids], "sort"),
    "FFT over rows": (lambda t, ids: jnp.fft.rfft(t, axis=0)[ids[0]].real / 64, "fft"),
    "a graph's matrix @ t": (
        lambda t, ids: (jnp.eye(t.shape[0], k=1) @ t)[ids],
        "dot_general",
    ),
    "soft attention over a codebook": (
        lambda t, w, ids: jax.nn.softmax(w @ t.T / 16) @ t + total(t[ids]),
        "dot_general",
    ),
    "Gram matrix": (lambda t, ids: total(t[ids]) + jnp.sum((t.T @ t) ** 2) / 4096, "dot_general"),
    "a position table resized": (
        lambda t, ids: jax.image.resize(t, (60, D), "linear")[ids],
        "dot_general",
    ),
    "custom_vjp of the table": (lambda t, ids: own_lookup(t, ids), "custom_vjp_call"),
    "the table changed in scan": (
        lambda t, ids: scan(
            lambda c, i: ((c[0] * 0.5, c[1] + c[0][i]), None), (t, jnp.zeros((3, D))), ids
        )[1],
        "scan",
    ),
    "rows written in scan": (
        lambda t, ids: scan(
            lambda c, i: ((c[0].at[i].add(1.0), c[1] + c[0][i]), None),
            (t, jnp.zeros((3, D))),
            ids,
        )[1],
        "scan",
    ),
}

# ---- no table by accident: the parameter that "auto" leaves dense, and naming makes a table ----


def _loop_over_layers(t: Any, layers: Any, ids: Any) -> Any:
    x = t[ids]
    for i in range(F):
        x = x + x @ layers[i]
    return x / 16


NO_TABLES: dict[str, tuple[Callable[..., Any], str]] = {
    "layers by a Python index": (_loop_over_layers, "layers"),
    "some layers": (lambda t, layers, ids: t[ids] @ layers[0] @ layers[2], "layers"),
    "scalars unpacked": (
        lambda t, scale, ids: (lambda a, b, *_: a * t[ids] + b)(*scale),
        "scale",
    ),
    "a row by a Python index": (lambda t, kinds, ids: t[ids] + kinds[0], "kinds"),
    "token types": (lambda t, kinds, ids: t[ids] + kinds[ids % 2], "kinds"),
    "token types by take": (
        lambda t, kinds, ids: t[ids] + jnp.take(kinds, ids % 2, axis=0),
        "kinds",
    ),
    "as many rows as V": (
        lambda t, u, ids: t[ids] * u[jnp.arange(u.shape[0]) // 2 + ids[0, 0]].sum(0) / 64,
        "u",
    ),
    "as many rows as V, over a scan": (
        lambda t, u, ids: (
            t[ids]
            * scan(
                lambda c, k: (c + u[k + ids].sum((0, 1)), None),
                jnp.zeros(D),
                jnp.arange(u.shape[0] // 6),
            )
            / 64
        ),
        "u",
    ),
    "smoothness over rows": (
        lambda t, u, ids: total(t[ids]) + jnp.sum((u[1:] - u[:-1]) ** 2) / 4,
        "u",
    ),
}

GROUPS: dict[str, dict[str, Any]] = {
    "whole rows": WHOLE_ROWS,
    "control flow": CONTROL_FLOW,
    "custom derivatives": CUSTOM_DERIVATIVES,
    "row functions": ROW_FUNCTIONS,
    "row masks": ROW_MASKS,
    "parts": PARTS,
    "stacks": STACKS,
    "no gradient": NO_GRADIENT,
    "views": VIEWS,
    "shard_map": SHARD_MAPS,
    "models": MODELS,
    "flax": FLAX,
}
_ALWAYS_DENSE = {
    group: {name: either(read) for name, (read, _) in idioms.items()}
    for group, idioms in {"inherent": INHERENT, "no table": NO_TABLES}.items()
}
ALL: dict[tuple[str, str], Idiom] = {
    (group, name): read if isinstance(read, Idiom) else Idiom(read)
    for group, idioms in {**GROUPS, **_ALWAYS_DENSE}.items()
    for name, read in idioms.items()
}
