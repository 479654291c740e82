"""Tables whose rows lag behind: the state of `deferred_adam`, and what is in it for each table."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adam_transforms._core import trees
from adam_transforms._core.sparse_rows import SparseRows, put_rows, take_rows
from adam_transforms._embeddings.deferred import missed_updates


class IdleRows(NamedTuple):
    """What is known of the idle rows of some tables.

    Attributes:
      last_step: for each of these tables, int32 (V,), the step that each row is up to date after;
        optax.MaskedNode in place of every other parameter.
      ring: what the steps since have done to a row that was idle.
    """

    last_step: Any
    ring: missed_updates.Ring


class DeferredAdamState(NamedTuple):
    """State of `deferred_adam`.

    Attributes:
      count: int32, shape (), the steps made.
      mu, nu: Adam's moments, like the parameters; each row of a table as of its last step.
      nu_max: AMSGrad's maximum of nu, likewise; None without AMSGrad.
      idle: of the tables without weight decay; None if there are none.
      idle_decayed: of the tables with weight decay; None if there are none.
    """

    count: jax.Array
    mu: Any
    nu: Any
    nu_max: Any
    idle: IdleRows | None
    idle_decayed: IdleRows | None


class Table(NamedTuple):
    """A table, or some rows of one, with what belongs to it."""

    values: jax.Array  # (n, D...)
    slots: tuple[jax.Array, ...]  # mu, nu and perhaps nu_max, each (n, D...)
    last: jax.Array  # int32 (n,)

    def take(self, rows: SparseRows | None) -> "Table":
        """These rows; all of them for None."""
        return jax.tree.map(lambda x: take_rows(x, rows), self)

    def put(self, rows: SparseRows | None, new: "Table") -> "Table":
        """With the slots of these rows replaced."""
        slots = tuple(
            put_rows(x, rows, y.astype(x.dtype)) for x, y in zip(self.slots, new.slots, strict=True)
        )
        return self._replace(slots=slots, last=put_rows(self.last, rows, new.last))

    def missed(self, ring: missed_updates.Ring, count: jax.Array) -> missed_updates.Missed:
        """What these rows missed up to step `count`."""
        mu, nu, *nu_max = self.slots
        return missed_updates.missed(ring, mu, nu_max[0] if nu_max else nu, self.last, count)

    def slots_now(self, missed: missed_updates.Missed) -> tuple[jax.Array, ...]:
        mu, nu, *nu_max = self.slots
        return missed.mu_now(mu), missed.nu_now(nu), *nu_max

    def up_to_date(self, ring: missed_updates.Ring, count: jax.Array) -> "Table":
        """As of step `count`, computed in float32 at least."""
        missed = self.missed(ring, count)
        last = jnp.maximum(self.last, count)
        return Table(missed.p_now(self.values), self.slots_now(missed), last)


def turns_of(num_rows: int, max_idle: int) -> tuple[int, int]:
    """After how many steps it is a row's turn again, and how many rows have theirs at a step."""
    turns = min(max_idle, num_rows)
    return turns, -(-num_rows // turns)


def slot_trees_of(state: DeferredAdamState) -> list[Any]:
    return [state.mu, state.nu] + ([] if state.nu_max is None else [state.nu_max])


def with_slots(state: DeferredAdamState, trees: Sequence[Any]) -> DeferredAdamState:
    return state._replace(**dict(zip(("mu", "nu", "nu_max"), trees, strict=False)))


def with_leaves(tree: Any, by_path: Mapping[str, Any]) -> Any:
    """`tree` with new leaves at these paths."""
    leaves, treedef = trees.flatten_with_paths(tree)
    return treedef.unflatten([by_path.get(path, leaf) for path, leaf in leaves])


def idle_by_path(state: DeferredAdamState) -> dict[str, tuple[jax.Array, missed_updates.Ring]]:
    """Each table's last steps, and the ring that belongs to it."""
    return {
        path: (last, group.ring)
        for group in (state.idle, state.idle_decayed)
        if group is not None
        for path, last in trees.flatten_with_paths(group.last_step)[0]
    }


def deferred_states(state: Any) -> list[DeferredAdamState]:
    found = trees.find_states(state, DeferredAdamState)
    if not found:
        raise ValueError("the optimizer state has no DeferredAdamState in it")
    return found


def slots_by_path(state: DeferredAdamState) -> dict[str, tuple[jax.Array, ...]]:
    columns = [trees.flatten_with_paths(tree)[0] for tree in slot_trees_of(state)]
    return {row[0][0]: tuple(x for _, x in row) for row in zip(*columns, strict=True)}


def tables_of(
    params: Any, state: DeferredAdamState
) -> dict[str, tuple[Table, missed_updates.Ring]]:
    """Each deferred table, and the ring that belongs to it."""
    leaves, slots = dict(trees.flatten_with_paths(params)[0]), slots_by_path(state)
    tables = {}
    for path, (last, ring) in idle_by_path(state).items():
        if leaves.get(path) is None:
            raise ValueError(f"params have no {path!r}, which is a table of the deferred state")
        tables[path] = (Table(jnp.asarray(leaves[path]), slots[path], last), ring)
    return tables
