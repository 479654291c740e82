"""Synchronizing the stale rows of deferred tables: `catch_up`, `flush`, `owed`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import trees
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._core.types import P, Params, Path, S, State
from adam_transforms._embeddings.deferred.missed_updates import gap_of
from adam_transforms._embeddings.deferred.state import (
    DeferredAdamState,
    TableRows,
    deferred_states,
    deferred_tables,
    slot_trees,
    tables_of,
    with_last_steps,
    with_leaves,
    with_slots,
)
from adam_transforms._transforms.compress_moments import CompressMomentsState, decoded


def catch_up(params: P, state: S, ids: Mapping[Path, Any]) -> tuple[P, S]:
    """Synchronizes some rows of tables, for code that reads them from `params` itself.

    Args:
      params: the parameters that `state` belongs to.
      state: an optimizer state with a `DeferredAdamState` anywhere in it.
      ids: {path of a table: the rows to be read, integers of any shape}. Repetitions are allowed;
        ids outside of [0, V) are ignored.

    Returns:
      (params, state), both with these rows as dense Adam has them. A second call changes no bit.

    Raises:
      ValueError: a path is of no deferred table.

    Code that reads these rows afterwards needs no `rows_from`. Mark the row gradient for
    `deferred_adam`: ``grads["table"].as_synchronized()``.

    >>> import jax.numpy as jnp
    >>> from adam_transforms import deferred_adam
    >>> tx = deferred_adam(0.1, tables="table")
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> state = tx.init(params)
    >>> for row in (2, 0):
    ...     rows = SparseRows(jnp.array([row]), jnp.ones((1, 1)), num_rows=4, synchronized=True)
    ...     grads = {"table": rows}
    ...     updates, state = tx.update(grads, state, params)
    ...     params = {"table": params["table"] + updates["table"]}
    >>> params, state = catch_up(params, state, {"table": jnp.array([2, 3])})
    >>> params["table"][2].round(3).tolist()  # -0.1 before
    [-0.16...]
    """
    known = {path for found in deferred_states(state) for path in deferred_tables(found)}
    for path in ids:
        if path not in known:
            raise ValueError(f"{path!r} is no table of deferred_adam; these are: {sorted(known)}")
    return _synchronize(params, state, ids)


def flush(params: P, state: S) -> tuple[P, S]:
    """Synchronizes all rows of all deferred tables, as dense Adam has them.

    For code that reads whole tables: evaluation, export, another optimizer. O(V) time and memory. A
    second call changes no bit, and training can continue from the result.

    Args:
      params: the parameters that `state` belongs to.
      state: an optimizer state with a `DeferredAdamState` anywhere in it.

    Returns:
      (params, state).

    >>> import jax.numpy as jnp
    >>> from adam_transforms import deferred_adam
    >>> tx = deferred_adam(0.1, tables="table")
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> state = tx.init(params)
    >>> for row in (2, 0):
    ...     rows = SparseRows(jnp.array([row]), jnp.ones((1, 1)), num_rows=4, synchronized=True)
    ...     grads = {"table": rows}
    ...     updates, state = tx.update(grads, state, params)
    ...     params = {"table": params["table"] + updates["table"]}
    >>> params, state = flush(params, state)
    >>> params["table"].round(3).tolist()
    [[-0.074...], [0.0], [-0.16...], [0.0]]
    """
    return _synchronize(params, state, None)


class Owed(NamedTuple):
    """How stale a table is.

    Attributes:
      rows: int32 (), how many rows have pending updates that move them.
      longest_gap: int32 (), the most steps that a row has been idle.
    """

    rows: jax.Array
    longest_gap: jax.Array


def owed(params: Params, state: State) -> dict[Path, Owed]:
    """{path of a deferred table: how stale it is}.

    Reads whole tables: call it now and then, not at every step.

    >>> import jax.numpy as jnp
    >>> from adam_transforms import deferred_adam
    >>> tx = deferred_adam(0.1, tables="table")
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> state = tx.init(params)
    >>> for row in (2, 0):
    ...     rows = SparseRows(jnp.array([row]), jnp.ones((1, 1)), num_rows=4, synchronized=True)
    ...     grads = {"table": rows}
    ...     updates, state = tx.update(grads, state, params)
    ...     params = {"table": params["table"] + updates["table"]}
    >>> int(owed(params, state)["table"].rows)  # row 2
    1
    """
    result = {}
    for found in deferred_states(state):
        for path, (table, history) in tables_of(params, found).items():
            now = table.synchronized(history, found.count).values
            moves = now != table.values.astype(now.dtype)
            rows = jnp.sum(jnp.any(moves, axis=tuple(range(1, now.ndim))), dtype=jnp.int32)
            gaps = gap_of(table.last_step, found.count, history.weights.shape[0])
            result[path] = Owed(rows, jnp.max(gaps, initial=0))
    return result


def dense_equivalent(params: P, state: State) -> tuple[P, Any]:
    """Dense Adam's parameters and state at this point, to continue with it or to export.

    Args:
      params: the parameters that `state` belongs to.
      state: an optimizer state with one `DeferredAdamState` or `CompressMomentsState` in it.

    Returns:
      (params, optax.ScaleByAdamState or optax.ScaleByAmsgradState): the state that `scale_by_adam`
      or `scale_by_amsgrad` has after the same gradients; for `compress_moments`, with the decoded
      moments.

    Raises:
      ValueError: there is not exactly one of these states.

    >>> import jax.numpy as jnp
    >>> from adam_transforms import deferred_adam
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> state = deferred_adam(0.1, tables="table").init(params)
    >>> params, adam_state = dense_equivalent(params, state)
    >>> type(adam_state).__name__, int(adam_state.count)
    ('ScaleByAdamState', 0)
    """
    coded = trees.find_states(state, CompressMomentsState)
    if len(coded) == 1:
        return params, decoded(coded[0])
    params, state = flush(params, state)
    found = deferred_states(state)
    if len(found) != 1:
        raise ValueError(f"expected one DeferredAdamState in the state, found {len(found)}")
    count, *slots = found[0].count, *slot_trees(found[0])
    if len(slots) == 3:
        return params, optax.ScaleByAmsgradState(count, *slots)
    return params, optax.ScaleByAdamState(count, *slots)


def _synchronize(
    params: Params, state: State, ids: Mapping[Path, Any] | None
) -> tuple[Params, State]:
    """`catch_up`, or `flush` for None."""
    deferred_states(state)  # there is one
    new_params = {}

    def renew(found: Any) -> Any:
        if not isinstance(found, DeferredAdamState):
            return found
        new: dict[Path, TableRows] = {}
        for path, (table, history) in tables_of(params, found).items():
            if ids is not None and path not in ids:
                continue
            rows = None if ids is None else _unique_rows(ids[path], table.values.shape[0])
            now = table.gather(rows).synchronized(history, found.count)
            new[path] = table.scatter(rows, now)
            values = now.values.astype(table.values.dtype)
            new_params[path] = values if rows is None else rows.scatter(table.values, values)
        slots = [
            with_leaves(tree, {path: table.slots[i] for path, table in new.items()})
            for i, tree in enumerate(slot_trees(found))
        ]
        last_steps = {path: table.last_step for path, table in new.items()}
        return with_last_steps(with_slots(found, slots), last_steps)

    state = jax.tree.map(renew, state, is_leaf=lambda x: isinstance(x, DeferredAdamState))
    return with_leaves(params, new_params), state


def _unique_rows(ids: Any, num_rows: int) -> SparseRows:
    """The rows that `ids` name, without values."""
    indices = jnp.ravel(jnp.asarray(ids))
    return SparseRows(indices, jnp.zeros((indices.size, 0)), num_rows).sum_duplicates()
