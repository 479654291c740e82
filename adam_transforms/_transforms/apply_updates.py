"""Applying updates to parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._core.types import P, Params, Path, State, Updates


def apply_updates(params: P, updates: Updates, *, key: jax.Array | None = None) -> P:
    """Parameters plus updates, each sum rounded once to the parameter's dtype.

    A superset of `optax.apply_updates`. The sum is computed in at least float32. Rounding to
    nearest loses small updates: a bfloat16 parameter at 1.0 does not change by steps of 1e-3. With
    `key` the sum is rounded stochastically, up or down, and its expected value is exact. Of a
    table with row updates only the touched rows are computed; duplicates are summed first.

    Args:
      params: a tree of arrays; a None leaf stays None.
      updates: a tree like `params`; where a leaf is None the parameter is unchanged.
      key: a PRNG key, a new one for every step; None rounds to nearest. It is used only for real
        parameters below float32.

    Returns:
      The new parameters, with the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: a structure or shape differs; names the path.

    >>> import jax, jax.numpy as jnp
    >>> params = {"w": jnp.ones(10_000, jnp.bfloat16)}
    >>> updates = {"w": jnp.full(10_000, 1e-3)}
    >>> float(apply_updates(params, updates)["w"].astype(jnp.float32).mean())
    1.0
    >>> rounded = apply_updates(params, updates, key=jax.random.key(0))
    >>> round(float(rounded["w"].astype(jnp.float32).mean()), 3)
    1.001
    """
    rows, treedef = trees.align(params, updates, names=("the parameters", "the updates"))
    keys = [None] * len(rows) if key is None else list(jax.random.split(key, len(rows)))
    return treedef.unflatten(
        [apply_update(path, p, u, key) for (path, p, u), key in zip(rows, keys, strict=True)]
    )


def update_and_apply(
    tx: optax.GradientTransformation,
    grads: Updates,
    state: State,
    params: Params,
    *,
    key: jax.Array | None = None,
    **extra_args: Any,
) -> tuple[Params, State]:
    """One whole step: the new parameters and the new state.

    The result is bit for bit that of ``tx.update`` and `apply_updates`, at the same cost.

    Args:
      tx: any transformation, of this package or of Optax.
      grads, state, params: as ``tx.update`` takes them.
      key: rounds the new parameters stochastically, as in `apply_updates`.
      **extra_args: passed to ``tx.update``, if it takes any.

    Returns:
      (params, state). Under `jax.jit`, donate both: a step then writes them in place.

    Raises:
      TypeError: `tx` is not a transformation.
      ValueError: a structure or shape differs; names the path.

    >>> import jax, jax.numpy as jnp, optax
    >>> tx = optax.adam(0.1)
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...     grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
    ...     return update_and_apply(tx, grads, state, params)
    >>> params, state = step(params, state)
    >>> params["w"].round(3).tolist()
    [0.9..., 1.9...]
    """
    tx = arguments.transformation("tx", tx)
    updates, state = tx.update(grads, state, params, **extra_args)
    return apply_updates(params, updates, key=key), state


def apply_update(path: Path, p: Any, u: Any, key: jax.Array | None = None) -> Any:
    """`apply_updates` for one leaf."""
    if p is None or u is None:
        return p
    if isinstance(u, SparseRows):
        return u.add_to(p, key).astype(jnp.result_type(p))
    p, u = jnp.asarray(p), jnp.asarray(u)
    wide = dtypes.promote(p.dtype, u.dtype)
    if jnp.issubdtype(wide, jnp.inexact):
        wide = dtypes.compute_dtype(wide)
    return dtypes.store(path, p.astype(wide) + u.astype(wide), p.dtype, key)
