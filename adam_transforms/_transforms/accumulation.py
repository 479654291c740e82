"""Gradient accumulation: one inner step for several gradients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.sparse_rows import SparseRows, is_rows, on_values
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.state_layout import Field, Role, register
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._transforms import conditional_update


@register(mini_step=Field(Role.SCALAR, metric="mini_step"), acc=Role.BUFFER, inner_state=Role.INNER)
class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      mini_step: int32 (), the number of gradients in this cycle, 0 to every - 1.
      acc: like the parameters, the sum of this cycle's gradients; for row gradients of n rows, all
        rows of the cycle (`SparseRows` of every x n rows, not inside a Flax NNX variable). At
        ``mini_step == 0`` the content is meaningless: the emitting step stores its updates there,
        and the next step overwrites them.
      inner_state: the state of the inner transformation.
    """

    mini_step: jax.Array
    acc: Updates
    inner_state: State


def accumulate(
    inner: optax.GradientTransformation,
    every: int,
    *,
    average: bool = True,
    accumulator_dtype: Any = None,
    like: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates `every` gradients, then runs `inner` once on their mean or sum.

    .. math:: u_t = \begin{cases}
       \mathrm{inner}\big(\tfrac1k \sum_{i=t-k+1}^{t} g_i\big) & t \equiv 0 \pmod k \\
       0 & \text{otherwise} \end{cases}

    On all other steps the updates are zero, `inner` does not run, and its state stays
    bit-identical, in place. Counts and schedules inside `inner` advance once a cycle. `inner`
    receives the extra arguments of the emitting step.

    Args:
      inner: any transformation.
      every: the number of gradients in a cycle, a static int >= 1.
      average: pass the mean to `inner`; False for the sum.
      accumulator_dtype: None for the parameter's dtype, but at least float32.
      like: a tree like the gradients, e.g. from `jax.eval_shape` or `nnx.eval_shape`, if they are
        not like the parameters. Row gradients require it, because it gives their number of rows;
        all rows are stored, in O(every x rows) memory, and summed at the end of the cycle. A leaf
        that is None has no accumulator.

    Returns:
      A transformation with `AccumulateState`. A gradient that is None adds nothing to its sum; if
      it is None in the emitting step, so is the update, and the sum is discarded. Reverse-mode
      differentiation through update is not supported.

    Raises:
      ValueError, TypeError: an argument is wrong; in update, the structure or shapes of the
        gradients differ from the parameters'.

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

    def accumulator_of(x: Any) -> Any:
        if not isinstance(x, SparseRows):
            return jnp.zeros_like(x, dtype=dtype or dtypes.compute_dtype(jnp.result_type(x)))
        size, *shape = x.values.shape
        values = jnp.zeros((every * size, *shape), dtype or dtypes.compute_dtype(x.dtype))
        return SparseRows(jnp.full((every * size,), x.num_rows), values, x.num_rows)

    def init(params: Params) -> AccumulateState:
        # nnx.Optimizer does not update a variable that contains a tree.
        is_like_params = like is None or trees.is_placeholder(params)
        gradients = params if is_like_params else trees.unwrap_variables(like, is_rows)
        acc = jax.tree.map(accumulator_of, gradients, is_leaf=is_rows)
        return AccumulateState(jnp.zeros((), jnp.int32), acc, inner.init(params))

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, State]:
        if type(state) is not AccumulateState:
            raise wrong_state(init, updates, state, params)
        is_first = state.mini_step == 0
        # mini_step is larger if the state was saved with a larger `every`.
        is_last = state.mini_step >= every - 1

        def add(path: Path, g: Any, acc: Any) -> Any:
            if isinstance(g, SparseRows) or isinstance(acc, SparseRows):
                _check_rows(path, g, acc, every)
                return _store_rows(acc, g, state.mini_step)
            g = dtypes.store(path, g, acc.dtype)
            return jnp.where(is_first, g, acc + g)

        def step(total: Updates, inner_state: State) -> tuple[Updates, State]:
            if average:
                total = jax.tree.map(
                    functools.partial(on_values, lambda x: dtypes.scale(x, 1.0 / every)),
                    total,
                    is_leaf=is_rows,
                )
            return inner.update(total, inner_state, params, **extra_args)

        def new_accumulator(carried: Any, acc: Any, total: Any) -> Any:
            if acc is None:
                return None
            if carried is None:
                return _skip_gradient(acc, state.mini_step, every)
            if isinstance(acc, SparseRows):
                if carried.values.shape != acc.values.shape:
                    return total  # the updates have another number of rows
                values = carried.values.astype(acc.dtype)
                return SparseRows(carried.indices, values, acc.num_rows)
            return carried.astype(acc.dtype)

        old_acc = trees.wrap_like(updates, state.acc)
        total = trees.map_leaves(add, updates, old_acc, names=("the accumulator",), rows=True)
        carried, inner_state = conditional_update.update_if(is_last, step, total, state.inner_state)
        acc = jax.tree.map(new_accumulator, carried, old_acc, total, is_leaf=trees.is_leaf)
        acc = trees.wrap_like(state.acc, acc)
        mini_step = jnp.where(is_last, 0, state.mini_step + 1)
        updates = conditional_update.select(is_last, carried, updates, params)
        return updates, AccumulateState(mini_step, acc, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_rows(path: Path, g: Any, acc: Any, every: int) -> None:
    """Refuses a gradient that differs from `like` in its kind or number of rows."""
    if not isinstance(acc, SparseRows):
        raise TypeError(
            f"{path!r} has a row gradient (SparseRows): accumulate needs to know its number of "
            "rows; pass like=jax.eval_shape(gradient function, ...)"
        )
    if not isinstance(g, SparseRows):
        raise TypeError(f"{path!r} has a dense gradient, but a row gradient in `like`")
    size = acc.values.shape[0] // every
    if g.values.shape[0] != size:
        raise ValueError(
            f"{path!r} has a gradient of {g.values.shape[0]} rows, but of {size} in `like`"
        )


def _skip_gradient(acc: Any, mini_step: jax.Array, every: int) -> Any:
    """`acc` after a gradient that is None; the content of the last cycle is overwritten."""
    if not isinstance(acc, SparseRows):
        return jnp.where(mini_step == 0, jnp.zeros_like(acc), acc)
    size = acc.values.shape[0] // every
    padding = SparseRows(jnp.full((size,), acc.num_rows), acc.values[:size], acc.num_rows)
    return _store_rows(acc, padding, mini_step)


def _store_rows(acc: SparseRows, rows: SparseRows, mini_step: jax.Array) -> SparseRows:
    """Writes the rows of one step to its position in `acc`."""
    size = rows.values.shape[0]
    at = mini_step * size + jnp.arange(size, dtype=jnp.int32)
    # XLA scatters in place; it would copy `acc` for a dynamic_update_slice.
    return SparseRows(
        acc.indices.at[at].set(rows.indices),
        acc.values.at[at].set(rows.values.astype(acc.dtype)),
        acc.num_rows,
    )
