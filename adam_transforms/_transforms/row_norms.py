"""A limit on the norm of each row of a table."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, patterns, trees
from adam_transforms._core.sparse_rows import DeferredRows, SparseRows
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._transforms.apply_updates import apply_update


def max_row_norm(
    limit: float | jax.Array, *, tables: patterns.Selection | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each updated row with a norm above `limit` down to `limit`: max_norm of nn.Embedding.

    .. math:: p_r + u_r \leftarrow (p_r + u_r) \, \min(1, c / \|p_r + u_r\|_2)

    It must be last in a chain, inside `lazy` or after it. Rows without an update do not change. A
    dense update is an update of every row, along the first axis. PyTorch instead scales a row when
    it is next read, and so also a row that has had no update yet.

    Args:
      limit: c > 0.
      tables: selects the parameters (V, D...) that are tables, as for `deferred_adam`. None selects
        the parameters with a row update. If no update has rows, as always inside `lazy`, None
        selects all parameters with two axes or more, also dense kernels. Inside `lazy`, name the
        tables.

    Returns:
      A stateless transformation; `update` needs `params`. The dtype of an update is the promotion
      of the incoming update's and the parameter's. Norms are computed in at least float32, and do
      not overflow. The norm of a scaled row is `limit` to rounding.

    Raises:
      ValueError: `limit` is out of range; `tables` matches nothing, or a scalar; update got no
        `params`.
      TypeError: a row update comes from `deferred_adam`, which moves idle rows.

    >>> import jax.numpy as jnp
    >>> tx = max_row_norm(1.0)
    >>> params = jnp.array([[0.0, 0.5], [2.0, 0.0]])
    >>> updates = SparseRows(jnp.array([0]), jnp.array([[3.0, 3.5]]), num_rows=2)
    >>> updates, _ = tx.update(updates, tx.init(params), params)
    >>> (params + updates).round(3).tolist()
    [[0.6..., 0.8...], [2.0, 0.0]]
    """
    limit = arguments.scalar("limit", limit, above=0.0)
    select = None if tables is None else patterns.selector("tables", tables)

    def init(params: Params) -> optax.EmptyState:
        if select is not None:
            select(trees.flatten_with_paths(params)[0])  # raises if it matches nothing
        return optax.EmptyState()

    def update(
        updates: Updates, state: State, params: Params | None = None, **_: Any
    ) -> tuple[Updates, State]:
        if params is None:
            raise ValueError(
                "max_row_norm limits rows of params: update needs params, got None: "
                "call update(grads, state, params)"
            )
        if type(state) is not optax.EmptyState:
            raise wrong_state(init, updates, state, params)
        names = ("the updates", "the parameters")
        aligned, treedef = trees.align(updates, params, names=names)
        has_rows = [isinstance(u, SparseRows) for _, u, _ in aligned]
        if select is not None:
            chosen = select([(path, p) for path, _, p in aligned])
        elif any(has_rows):
            chosen = {i for i, x in enumerate(has_rows) if x}
        else:
            chosen = {i for i, (_, _, p) in enumerate(aligned) if jnp.ndim(p) > 1}

        def limited(i: int, path: Path, u: Any, p: Any) -> Any:
            if u is None or p is None:
                return u
            if isinstance(u, DeferredRows) and i in chosen:
                raise TypeError(
                    f"{path!r} has a row gradient of deferred_adam, which moves idle rows too: "
                    "max_row_norm cannot limit them; use lazy_adam"
                )
            if isinstance(u, SparseRows):
                u = u.sum_duplicates() if i in chosen else u
                p = u.gather(p)
                values = _limit_rows(path, u.values, p, limit) if i in chosen else u.values
                return u.with_values(values.astype(dtypes.promote(u.dtype, p.dtype)))
            u, p = trees.as_gradient(path, u), jnp.asarray(p)
            dtype = dtypes.promote(u.dtype, p.dtype)
            return (_limit_rows(path, u, p, limit) if i in chosen else u).astype(dtype)

        results = [limited(i, *leaf) for i, leaf in enumerate(aligned)]
        return treedef.unflatten(results), state

    return optax.GradientTransformationExtraArgs(init, update)


def _limit_rows(path: Path, u: jax.Array, p: jax.Array, limit: Any) -> jax.Array:
    """What is to be added to rows p, (n, D...), in at least float32; exactly `u` to rows within
    the limit."""
    dtype = dtypes.compute_dtype(u.dtype, p.dtype)
    new = apply_update(path, p, u).astype(dtype)
    axes, real = tuple(range(1, new.ndim)), dtypes.real_dtype(dtype)
    size = jnp.max(jnp.abs(new), axis=axes, keepdims=True, initial=0.0)
    size = jnp.where(size > 0, size, jnp.ones_like(size))
    # Its squares do not overflow. The reciprocal of the largest numbers would be subnormal.
    shrink = jnp.where(size > 1, 0.125, 1.0).astype(real)
    direction = dtypes.scale(dtypes.scale(new, shrink), 1.0 / (size * shrink))
    norm = jnp.sqrt(jnp.sum(dtypes.abs_sq(direction), axis=axes, keepdims=True))
    bound = dtypes.as_scalar(limit, real)
    projected = dtypes.scale(direction, bound / jnp.where(norm > 0, norm, jnp.ones_like(norm)))
    return jnp.where(size * norm > bound, projected - p.astype(dtype), u.astype(dtype))
