"""Gradient accumulation: one inner step for every so many gradients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.sparse_rows import SparseRows, is_rows, on_values
from adam_transforms._core.state_layout import Field, Role, register
from adam_transforms._transforms import conditional_update


@register(mini_step=Field(Role.SCALAR, metric="mini_step"), acc=Role.BUFFER, inner_state=Role.INNER)
class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      mini_step: int32 (), gradients received in this cycle, 0 to every - 1.
      acc: like the parameters, the sum of this cycle's gradients; of a table with row gradients all
        that the cycle has brought, one after the other (`SparseRows` of every x n rows, in no
        variable of Flax NNX). At ``mini_step == 0`` it means nothing: the emitting step leaves its
        updates there, and the next one overwrites them.
      inner_state: the state of the inner transformation.
    """

    mini_step: jax.Array
    acc: Any
    inner_state: Any


def accumulate(
    inner: optax.GradientTransformation,
    every: int,
    *,
    average: bool = True,
    accumulator_dtype: Any = None,
    like: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Collects `every` gradients, then runs `inner` once on their mean or sum.

    .. math:: u_t = \begin{cases}
       \mathrm{inner}\big(\tfrac1k \sum_{i=t-k+1}^{t} g_i\big) & t \equiv 0 \pmod k \\
       0 & \text{otherwise} \end{cases}

    On the steps between, the updates are zero, `inner` does not run and its state stays
    bit-identical, in place. Counts and schedules inside `inner` advance once a cycle. Extra
    arguments of the emitting step reach `inner`.

    Args:
      inner: any transformation.
      every: gradients to a cycle, a static int >= 1.
      average: hand `inner` the mean; False for the sum.
      accumulator_dtype: None for the parameter's dtype, but at least float32.
      like: what the gradients are like, e.g. from `jax.eval_shape` or `nnx.eval_shape`, if not like
        the parameters. Needed for row gradients, which are kept as they come, in O(every x rows),
        and summed when the cycle ends: it says how many a step brings. Where a leaf is None,
        nothing is kept.

    Returns:
      A transformation with `AccumulateState`. A leaf whose gradient is None adds nothing to its
      sum, and is skipped if it is None in the emitting step. It cannot be differentiated through
      in reverse mode.

    Raises:
      ValueError, TypeError: an argument is wrong; in update, the gradients' structure or shapes
        differ from the parameters'.

    >>> import jax.numpy as jnp, optax
    >>> tx = accumulate(optax.scale(-1.0), every=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (1.0, 3.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    ...     print((updates + 0.0).tolist())
    [0.0]
    [-2.0]
    """
    inner = arguments.transformation("inner", inner)
    every = arguments.positive_int("every", every)
    average = arguments.flag("average", average)
    dtype = arguments.float_dtype("accumulator_dtype", accumulator_dtype)

    def kept_dtype(p: Any) -> Any:
        return dtype or dtypes.compute_dtype(p)

    def start(x: Any) -> Any:
        if not isinstance(x, SparseRows):
            return trees.zeros_like(x, kept_dtype)
        size, *shape = x.values.shape
        values = jnp.zeros((every * size, *shape), kept_dtype(x.dtype))
        return SparseRows(jnp.full((every * size,), x.num_rows), values, x.num_rows)

    def init(params: Any) -> AccumulateState:
        # nnx.Optimizer does not update what is a tree inside a variable.
        gradients = params if like is None else trees.unwrapped(like, is_rows)
        acc = jax.tree.map(start, gradients, is_leaf=is_rows)
        return AccumulateState(jnp.zeros((), jnp.int32), acc, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        starts = state.mini_step == 0
        emits = state.mini_step >= every - 1  # beyond it, if `every` was larger when it was saved

        def add(path: str, g: Any, acc: Any) -> Any:
            if isinstance(g, SparseRows) or isinstance(acc, SparseRows):
                _check_rows(path, g, acc, every)
                return _append(acc, g, state.mini_step)
            g = dtypes.store(path, g, acc.dtype)
            return jnp.where(starts, g, acc + g)

        def step(total: Any, inner_state: Any) -> tuple[Any, Any]:
            if average:
                total = jax.tree.map(
                    functools.partial(on_values, lambda x: dtypes.scale(x, 1.0 / every)),
                    total,
                    is_leaf=is_rows,
                )
            return inner.update(total, inner_state, params, **extra_args)

        def keep(carried: Any, acc: Any, total: Any) -> Any:
            if acc is None:
                return None
            if carried is None:
                return _without_gradient(acc, state.mini_step, every)
            if isinstance(acc, SparseRows):
                if carried.values.shape != acc.values.shape:
                    return total  # an update of more rows than the gradients' is carried apart
                values = carried.values.astype(acc.dtype)
                return SparseRows(carried.indices, values, acc.num_rows)
            return carried.astype(acc.dtype)

        before = trees.wrapped_as(updates, state.acc)
        total = trees.map_leaves(add, updates, before, names=("the accumulator",), rows=True)
        carried, inner_state = conditional_update.update_if(emits, step, total, state.inner_state)
        acc = jax.tree.map(keep, carried, before, total, is_leaf=trees.is_leaf)
        acc = trees.wrapped_as(state.acc, acc)
        mini_step = jnp.where(emits, 0, state.mini_step + 1)
        updates = conditional_update.select(emits, carried, updates, params)
        return updates, AccumulateState(mini_step, acc, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_rows(path: str, g: Any, acc: Any, every: int) -> None:
    """Refuses a gradient that `like` has not announced."""
    if not isinstance(acc, SparseRows):
        raise TypeError(
            f"{path!r} has a row gradient (SparseRows): accumulate keeps them if it knows how many "
            "rows a step brings; pass like=jax.eval_shape(gradient function, ...)"
        )
    if not isinstance(g, SparseRows):
        raise TypeError(f"{path!r} has a dense gradient, but `like` announced a row gradient")
    size = acc.values.shape[0] // every
    if g.values.shape[0] != size:
        raise ValueError(
            f"{path!r} has a gradient of {g.values.shape[0]} rows, but `like` announced {size}"
        )


def _without_gradient(acc: Any, mini_step: jax.Array, every: int) -> Any:
    """`acc` after a step without a gradient; what the last cycle left goes all the same."""
    if not isinstance(acc, SparseRows):
        return jnp.where(mini_step == 0, jnp.zeros_like(acc), acc)
    size = acc.values.shape[0] // every
    padding = SparseRows(jnp.full((size,), acc.num_rows), acc.values[:size], acc.num_rows)
    return _append(acc, padding, mini_step)


def _append(acc: SparseRows, rows: SparseRows, mini_step: jax.Array) -> SparseRows:
    """`acc` with `rows` for what the step of this number in the cycle has brought."""
    size = rows.values.shape[0]
    at = mini_step * size + jnp.arange(size, dtype=jnp.int32)
    # Scattered, not sliced in: XLA updates what it scatters into in place.
    return SparseRows(
        acc.indices.at[at].set(rows.indices),
        acc.values.at[at].set(rows.values.astype(acc.dtype)),
        acc.num_rows,
    )
