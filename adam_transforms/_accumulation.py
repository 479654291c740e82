"""Gradient accumulation: one inner step for every so many gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms import _arguments, _gating, _numerics, _trees


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      mini_step: int32 (), gradients received in this cycle, 0 to every - 1.
      acc: like the parameters, the sum of this cycle's gradients. At ``mini_step == 0`` it means
        nothing: the emitting step leaves its updates there, and the next one overwrites them.
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
      like: arrays or shapes like the gradients, e.g. from `jax.eval_shape`, if they are not like
        the parameters: where a leaf is None there, nothing is kept.

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
    inner = _arguments.transformation("inner", inner)
    every = _arguments.positive_int("every", every)
    average = _arguments.flag("average", average)
    dtype = _arguments.float_dtype("accumulator_dtype", accumulator_dtype)

    def init(params: Any) -> AccumulateState:
        acc = _trees.zeros_like(
            params if like is None else like, lambda p: dtype or _numerics.compute_dtype(p)
        )
        return AccumulateState(jnp.zeros((), jnp.int32), acc, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        starts = state.mini_step == 0
        emits = state.mini_step == every - 1

        def add(path: str, g: jax.Array, acc: jax.Array) -> jax.Array:
            g = _numerics.store(path, g, acc.dtype)
            return jnp.where(starts, g, acc + g)

        def step(total: Any, inner_state: Any) -> tuple[Any, Any]:
            if average:
                total = jax.tree.map(lambda x: _numerics.scale(x, 1.0 / every), total)
            return inner.update(total, inner_state, params, **extra_args)

        def keep(carried: jax.Array | None, acc: jax.Array | None) -> jax.Array | None:
            if acc is None:
                return None
            if carried is None:  # no gradient: what the last cycle left has to go all the same
                return jnp.where(starts, jnp.zeros_like(acc), acc)
            return carried.astype(acc.dtype)

        total = _trees.map_leaves(add, updates, state.acc, names=("the accumulator",))
        carried, inner_state = _gating.update_if(emits, step, total, state.inner_state)
        acc = jax.tree.map(keep, carried, state.acc, is_leaf=_trees.is_none)
        mini_step = jnp.where(emits, 0, state.mini_step + 1)
        updates = _gating.select(emits, carried, updates, params)
        return updates, AccumulateState(mini_step, acc, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
