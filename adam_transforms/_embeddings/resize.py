"""Tables with more rows, and the optimizer state for them."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from adam_transforms._core import dtypes, state_layout, trees
from adam_transforms._core.slots import owners
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._core.state_layout import Role
from adam_transforms._embeddings.deferred.missed_updates import gap_of
from adam_transforms._embeddings.deferred.state import (
    DeferredAdamState,
    deferred_tables,
    round_robin_schedule,
)
from adam_transforms._embeddings.deferred.sync import catch_up


def resize(params: Any, state: Any, rows: Mapping[str, Any]) -> tuple[Any, Any]:
    """Appends rows to tables and to the optimizer state, for a vocabulary that grows.

    The new rows of a slot are zeros. Masters (`master_weights`) get the new rows of the table, and
    an average (`params_ema`) gets these rows times its ``weight``. A new row of a table of
    `deferred_adam` has no pending updates. An old row keeps its pending updates, unless it would
    be idle for more than `max_idle` steps before its turn in the longer round robin: such a row is
    synchronized now. Rows collected by `accumulate` stay collected. All other leaves are the same
    arrays as before.

    Args:
      params: the parameters that `state` belongs to.
      state: an optimizer state, of any chain and wrappers.
      rows: {path of a table: the rows to append, (k, D...), which are cast to the table's dtype; or
        the new number of rows, to append zeros}. Stacked tables (F, V, D...) grow by whole tables,
        along their first axis.

    Returns:
      (params, state). Shapes have changed: a jitted step compiles once more, and a model that
      contains the size of its table must be built again. A sharded table stays sharded.

    Raises:
      ValueError: a path is of no table, or of several leaves; the number of rows is less than the
        present one; rows have another width; an axis of a state array has the table's length, but
        the array is not recognised as a slot of the table.
      TypeError: neither a number nor an array; called while tracing.

    A slot is recognised by its path, which ends in the table's, and by its length. Adam's and most
    other slots start at zero; the caller fills those that do not (Adagrad's accumulator starts at
    0.1 in Optax).

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.adam(0.1)
    >>> params = {"table": jnp.ones((2, 1))}
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> params, state = resize(params, state, {"table": 3})
    >>> params["table"].tolist(), state[0].mu["table"].round(3).tolist()
    ([[1.0], [1.0], [0.0]], [[0.1...], [0.1...], [0.0]])
    """
    if not isinstance(rows, Mapping):
        raise TypeError(f"rows must be a mapping from paths to numbers of rows, got {rows!r:.200}")
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((params, state))):
        raise TypeError("resize changes shapes: call it between steps, outside jit")
    leaves, treedef = trees.flatten_with_paths(params)
    trees.refuse_equal_paths([path for path, _ in leaves], rows)
    tables = dict(leaves)
    shapes = {path: jnp.shape(p) for path, p in leaves if p is not None}
    new_rows = {}
    for path, more in rows.items():
        if not shapes.get(path):
            known = ", ".join(repr(path) for path, shape in shapes.items() if shape)
            raise ValueError(f"{path!r} is no table in params; these are: {known}")
        appended = _rows_to_append(path, tables[path], more)
        if appended.shape[0]:
            new_rows[path] = appended
    params, state = _overdue_caught_up(params, state, new_rows)
    leaves, _ = trees.flatten_with_paths(params)
    larger = [_append(path, p, new_rows[path]) if path in new_rows else p for path, p in leaves]
    growth = _Growth(shapes, new_rows, owners(params, state))
    return treedef.unflatten(larger), _grown(growth, "", state)


def _rows_to_append(path: str, table: Any, more: Any) -> jax.Array:
    """(k, D...), in the table's dtype."""
    (num_rows, *width), dtype = jnp.shape(table), jnp.result_type(table)
    if not isinstance(more, bool | np.bool_) and np.ndim(more) == 0:
        try:
            size = operator.index(more)
        except TypeError:
            raise TypeError(
                f"{path!r} must grow to a number of rows, or by an array of rows, got {more!r:.200}"
            ) from None
        if size < num_rows:
            raise ValueError(
                f"{path!r} has {num_rows} rows and cannot go down to {size}: what the others hold "
                "would be lost"
            )
        return jnp.zeros((size - num_rows, *width), dtype)
    if not isinstance(more, jax.Array | np.ndarray):
        raise TypeError(
            f"{path!r} must grow to a number of rows, or by an array of rows, got {more!r:.200}"
        )
    if [*more.shape[1:]] != width:
        expected = ", ".join(["k", *map(str, width)])
        raise ValueError(
            f"the rows to append to {path!r} must have shape [{expected}], got {list(more.shape)}"
        )
    return dtypes.store(path, jnp.asarray(more), dtype)


class _Growth(NamedTuple):
    """The tables that grow.

    Attributes:
      shapes: the old shape of each parameter.
      new_rows: the rows to append to each table.
      owners: for the path of each slot in the state, the parameter that it belongs to.
    """

    shapes: dict[str, tuple[int, ...]]
    new_rows: dict[str, jax.Array]
    owners: dict[str, str]


# From the rows appended to a table, and a leaf that mirrors it, to the rows to append to that.
_Fill = Callable[[jax.Array, Any], jax.Array]


def _zeros(appended: jax.Array, x: Any) -> jax.Array:
    return jnp.zeros((appended.shape[0], *x.shape[1:]), x.dtype)


def _grown(growth: _Growth, path: str, state: Any, fill: _Fill = _zeros) -> Any:
    """A state, or a part of one, at `path`, with more rows."""

    def below(name: str, tree: Any, fill: _Fill = fill) -> Any:
        return _grown(growth, trees.join_paths(path, name), tree, fill)

    def is_apart(x: Any) -> bool:
        return x is not state and isinstance(x, (*state_layout.TABLE, SparseRows))

    fields = state_layout.fields_of(type(state))
    if fields:
        return state._replace(
            **{
                name: below(name, getattr(state, name), _fill_of(field.role, state, fill))
                for name, field in fields.items()
                if field.role not in (Role.SCALAR, Role.SHARED)
            }
        )
    if isinstance(state, SparseRows) or jax.tree_util.all_leaves([state]):
        return _grown_leaf(growth, path, state, fill)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_apart)
    return treedef.unflatten([below(trees.path_str(key_path), x) for key_path, x in leaves])


def _fill_of(role: Role, state: Any, outer: _Fill) -> _Fill:
    """How the new rows of a field of `state` start; `outer` is the fill of the field that `state`
    is in."""
    if role is Role.AVERAGE:
        return _weighted_by(state.weight)
    if role is Role.AVERAGED_STEP:
        return lambda appended, last: jnp.full(
            (appended.shape[0], *last.shape[1:]), state.count, last.dtype
        )
    if role is Role.COPY:
        return lambda appended, _: appended
    if isinstance(state, DeferredAdamState) and role is Role.INNER:
        # The last steps: a new row has no pending updates.
        return lambda appended, last: jnp.full(appended.shape[:1], state.count, last.dtype)
    return outer if role is Role.LAST_STEP else _zeros


def _weighted_by(weight: jax.Array) -> _Fill:
    def fill(appended: jax.Array, _: Any) -> jax.Array:
        dtype = dtypes.compute_dtype(appended.dtype)
        return dtypes.scale(appended.astype(dtype), weight.astype(dtypes.real_dtype(dtype)))

    return fill


def _grown_leaf(growth: _Growth, path: str, x: Any, fill: _Fill) -> Any:
    shape, owner = jnp.shape(x), growth.owners.get(path)
    if owner is None:
        for table in growth.new_rows:
            if growth.shapes[table][0] in shape:
                raise _unrecognised(path, shape, table)
    if owner not in growth.new_rows:
        return x
    (num_rows, *width), appended = growth.shapes[owner], growth.new_rows[owner]
    is_like_table = shape == (num_rows, *width)
    if isinstance(x, SparseRows) and is_like_table:
        leading_shape = (num_rows + appended.shape[0], *x.leading_shape[1:])
        size = math.prod(leading_shape)
        indices = jnp.where(x.is_valid, x.indices, size)  # padding stays behind the last row
        static = {"unique": x.unique, "synchronized": x.synchronized}
        return SparseRows(indices, x.values, size, leading_shape=leading_shape, **static)
    if num_rows not in shape:
        return x
    is_by_row = shape[0] == num_rows and num_rows not in (*shape[1:], *width)
    if not (is_like_table or is_by_row):
        raise _unrecognised(path, shape, owner)
    return _append(path, x, fill(appended, x))


def _unrecognised(path: str, shape: tuple[int, ...], table: str) -> ValueError:
    return ValueError(
        f"{path!r} in the state, of shape {list(shape)}, has the length of {table!r}, but is "
        "not recognisably kept by its rows"
    )


def _append(path: str, x: Any, appended: jax.Array) -> jax.Array:
    """`x` with more rows, sharded as before."""
    appended = appended.astype(x.dtype)
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jnp.concatenate([jnp.asarray(x), appended])
    # By way of the host: where the rows are sharded most of them change their device.
    whole = np.concatenate([np.asarray(x), np.asarray(appended)])
    try:
        return jax.device_put(whole, sharding)
    except ValueError as error:
        raise ValueError(
            f"{path!r} cannot have {whole.shape[0]} rows, sharded as it is: {error}"
        ) from None


def _overdue_caught_up(
    params: Any, state: Any, new_rows: Mapping[str, jax.Array]
) -> tuple[Any, Any]:
    """(params, state) with those deferred rows synchronized that would otherwise wait too long.

    The round robin's period depends on the length of the table, and the history has a limited
    number of steps.
    """
    for found in trees.find_states(state, DeferredAdamState):
        for path, table in deferred_tables(found).items():
            if path not in new_rows:
                continue
            num_rows, stored = table.last_step.shape[0], table.history.weights.shape[0]
            size = num_rows + new_rows[path].shape[0]
            period, length = round_robin_schedule(size, stored)
            turn = np.arange(num_rows) // length
            wait = (turn - int(found.count)) % period
            gap = np.asarray(gap_of(table.last_step, found.count, stored))
            overdue = np.flatnonzero(gap + wait >= stored)
            if overdue.size:
                params, state = catch_up(params, state, {path: overdue})
    return params, state
