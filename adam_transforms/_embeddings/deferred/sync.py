"""Reading what lags behind: deferred tables brought up to date, whole or some rows of them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core.sparse_rows import SparseRows, put_rows
from adam_transforms._embeddings.deferred.state import (
    DeferredAdamState,
    IdleRows,
    Table,
    deferred_states,
    idle_by_path,
    slot_trees_of,
    slots_by_path,
    tables_of,
    with_leaves,
    with_slots,
)
from adam_transforms._xla import scheduling


def catch_up(params: Any, state: Any, ids: Mapping[str, Any]) -> tuple[Any, Any]:
    """Brings some rows of tables up to date, for code that reads them from `params` itself.

    Args:
      params: the parameters that `state` belongs to.
      state: an optimizer state with a `DeferredAdamState` anywhere in it.
      ids: for the path of each table to be read, integers of any shape: its rows, repetitions
        allowed. What lies outside [0, V) means nothing.

    Returns:
      (params, state), both with these rows as dense Adam has them. Done twice, the second time
      changes no bit.

    Raises:
      ValueError: a path is of no deferred table.
    """
    known = {path for found in deferred_states(state) for path in idle_by_path(found)}
    for path in ids:
        if path not in known:
            raise ValueError(f"{path!r} is no table of deferred_adam; these are: {sorted(known)}")
    return _bring_up_to_date(params, state, ids)


def flush(params: Any, state: Any) -> tuple[Any, Any]:
    """Brings all rows of all deferred tables up to date, as dense Adam has them.

    For whatever reads whole tables: evaluation, export, another optimizer. O(V) time and memory.
    Done twice, the second time changes no bit; and training can go on from the result.

    Args:
      params: the parameters that `state` belongs to.
      state: an optimizer state with a `DeferredAdamState` anywhere in it.

    Returns:
      (params, state).
    """
    return _bring_up_to_date(params, state, None)


class Owed(NamedTuple):
    """What a table owes.

    Attributes:
      rows: int32 (), how many rows have missed steps that move them.
      longest_gap: int32 (), the most steps that a row has been idle.
    """

    rows: jax.Array
    longest_gap: jax.Array


def owed(params: Any, state: Any) -> dict[str, Owed]:
    """For the path of each deferred table, how far it lags behind dense Adam's.

    Reads whole tables, so now and then is often enough.
    """
    result = {}
    for found in deferred_states(state):
        for path, (table, ring) in tables_of(params, found).items():
            now = table.up_to_date(ring, found.count).values
            moves = jnp.reshape(now != table.values.astype(now.dtype), (now.shape[0], -1))
            rows = jnp.sum(jnp.any(moves, axis=1), dtype=jnp.int32)
            result[path] = Owed(rows, jnp.max(found.count - table.last, initial=0))
    return result


def dense_equivalent(params: Any, state: Any) -> tuple[Any, Any]:
    """Dense Adam's parameters and state at this point, to go on with it or to export.

    Args:
      params: the parameters that `state` belongs to.
      state: an optimizer state with one `DeferredAdamState` in it.

    Returns:
      (params, optax.ScaleByAdamState or optax.ScaleByAmsgradState), that of `scale_by_adam` or
      `scale_by_amsgrad` after the same gradients.

    Raises:
      ValueError: there is not exactly one `DeferredAdamState`.
    """
    params, state = flush(params, state)
    found = deferred_states(state)
    if len(found) != 1:
        raise ValueError(f"expected one DeferredAdamState in the state, found {len(found)}")
    count, *slots = found[0].count, *slot_trees_of(found[0])
    if len(slots) == 3:
        return params, optax.ScaleByAmsgradState(count, *slots)
    return params, optax.ScaleByAdamState(count, *slots)


def current_rows(state: Any) -> dict[str, Callable[[jax.Array, SparseRows | None], jax.Array]]:
    """For the path of each deferred table, a function that reads it as dense Adam has it now: from
    the table and the rows to read to (n, D...), or for None to all of it."""
    readers = {}
    for found in deferred_states(state):
        slots = slots_by_path(found)
        for path, (last, ring) in idle_by_path(found).items():
            if path in readers:
                raise ValueError(f"two deferred states in rows_from have a table at {path!r}")
            readers[path] = jax.tree_util.Partial(_read, slots[path], last, ring, found.count)
    return readers


def _read(slots: Any, last: Any, ring: Any, count: Any, table: Any, rows: Any) -> jax.Array:
    before = Table(table, slots, last).take(rows)
    if rows is not None:
        before = before._replace(slots=tuple(map(scheduling.computed_before, before.slots)))
    return before.up_to_date(ring, count).values.astype(table.dtype)


def _bring_up_to_date(params: Any, state: Any, ids: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """`catch_up`, or for None `flush`."""
    deferred_states(state)  # there is one
    new_params = {}

    def renew(found: Any) -> Any:
        if not isinstance(found, DeferredAdamState):
            return found
        new = {}
        for path, (table, ring) in tables_of(params, found).items():
            if ids is None:
                rows = None
            elif path in ids:
                indices = jnp.ravel(jnp.asarray(ids[path]))
                num_rows = table.values.shape[0]
                rows = SparseRows(indices, jnp.zeros((indices.size, 0)), num_rows).sum_duplicates()
            else:
                continue
            now = table.take(rows).up_to_date(ring, found.count)
            new[path] = table.put(rows, now)
            now_values = now.values.astype(table.values.dtype)
            new_params[path] = put_rows(table.values, rows, now_values)

        def with_last_steps(group: IdleRows | None) -> IdleRows | None:
            if group is None:
                return None
            lasts = {path: table.last for path, table in new.items()}
            return group._replace(last_step=with_leaves(group.last_step, lasts))

        trees = [
            with_leaves(tree, {path: table.slots[i] for path, table in new.items()})
            for i, tree in enumerate(slot_trees_of(found))
        ]
        return with_slots(found, trees)._replace(
            idle=with_last_steps(found.idle), idle_decayed=with_last_steps(found.idle_decayed)
        )

    state = jax.tree.map(renew, state, is_leaf=lambda x: isinstance(x, DeferredAdamState))
    return with_leaves(params, new_params), state
