"""Any per-row chain of transformations, run on the touched rows alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, trees
from adam_transforms._core.sparse_rows import SparseRows, is_rows, put_rows, take_rows
from adam_transforms._embeddings.deferred.state import DeferredAdamState
from adam_transforms._embeddings.row_blocks import block_length, over_blocks
from adam_transforms._transforms.accumulation import AccumulateState
from adam_transforms._transforms.ema import ParamsEmaState
from adam_transforms._xla.row_independence import as_row_function

# States of transformations that collect gradients over several steps.
_COLLECTING = (AccumulateState, optax.MultiStepsState, optax.ApplyEvery)


class LazyState(NamedTuple):
    """State of `lazy`: that of the inner transformation, with slots of whole tables."""

    inner_state: Any


def lazy(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Makes a chain lazy: of a table with a row gradient, only the touched rows are updated.

    For each gradient that is a `SparseRows` it gathers the touched rows of the parameter and of
    every slot that mirrors it, runs `inner` on these small dense arrays as if they were the whole
    parameter, and scatters the slots' rows back. All other rows, of slots and parameters, stay
    bit-identical. Dense gradients pass through `inner` in the same call, and a global norm spans
    both. Time and memory are O(rows touched), whatever V, and in place where the state is donated.

    On a CPU many rows (arrays of 2 MiB and more) are treated some at a time, within the caches, if
    what `inner` does to a row is seen to depend on that row alone, and on what it can compute from
    the gradients beforehand: their norm, say.

    Duplicate rows are summed first. Counts are global: bias corrections and schedules are those of
    the step, not of a row's own history. Decay of weights acts on touched rows only.

    Args:
      inner: any transformation, or chain, that treats the rows of a table alike and apart. What
        mixes rows and shows it in the shapes of its state (Adafactor, SM3) is refused; a
        transformation that mixes rows and keeps no such state (`optax.scale_by_trust_ratio`, say)
        cannot be told from one that does not, and would see the touched rows only.

    Returns:
      A transformation with `LazyState`. Updates are `SparseRows` where the gradients are.

    Raises:
      ValueError: `inner` collects gradients over steps, averages a table's parameters, or has a
        state that is not kept by row; update was given row gradients but no `params`, or a state of
        other parameters.

    References:
      The rule is that of TensorFlow's contrib.opt.LazyAdamOptimizer.

    >>> import jax.numpy as jnp, optax
    >>> tx = lazy(optax.adam(0.1))
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> rows = SparseRows(jnp.array([2, 2]), jnp.array([[1.0], [1.0]]), num_rows=4)
    >>> updates, state = tx.update({"table": rows}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["table"].round(3).tolist()
    [[0.0], [0.0], [-0.1...], [0.0]]
    """
    inner = arguments.transformation("inner", inner)

    def init(params: Any) -> LazyState:
        state = inner.init(params)
        if any(trees.find_states(state, kind) for kind in _COLLECTING):
            raise ValueError(
                "lazy cannot hold a transformation that collects gradients over steps: each step "
                "would move the rows that it touches itself. Wrappers nest in this order: "
                "dynamic_loss_scale(accumulate("
                "lazy(optax.chain(clip, adam, decay, learning rate)), every))"
            )
        if trees.find_states(state, DeferredAdamState):
            raise ValueError(
                "lazy cannot hold deferred_adam, which takes row gradients itself: "
                "optax.chain(lazy(clip), deferred_adam(...))"
            )
        return LazyState(state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        leaves, treedef = trees.flatten_with_paths(updates)
        tables = {
            i: leaf.sum_duplicates()
            for i, (_, leaf) in enumerate(leaves)
            if isinstance(leaf, SparseRows)
        }
        if not tables:
            updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
            return updates, LazyState(inner_state)
        if params is None:
            raise ValueError(
                "lazy takes the touched rows out of params: update needs them, got None"
            )
        names = ("the updates", "the parameters")
        aligned, _ = trees.align(updates, params, names=names)
        for i in tables:
            if aligned[i][2] is None:
                raise ValueError(f"{aligned[i][0]!r} has a row gradient, but no parameter")
        param_leaves = [p for _, _, p in aligned]

        slots = _slots(inner, treedef, param_leaves, list(tables))
        state_leaves, state_def = jax.tree.flatten(state.inner_state)
        _check_state(state_leaves, slots)
        k = len(leaves)

        def update_leaves(*flat: Any) -> list[Any]:
            """`inner` from the leaves of gradients, parameters and state to those of updates and
            state."""
            updates, params = (treedef.unflatten(part) for part in (flat[:k], flat[k : 2 * k]))
            state = state_def.unflatten(flat[2 * k :])
            updates, state = inner.update(updates, state, params, **extra_args)
            return [*treedef.flatten_up_to(updates), *state_def.flatten_up_to(state)]

        gradients = [tables.get(i, g) for i, (_, g) in enumerate(leaves)]
        owners = [*range(k), *(slot.table for slot in slots)]
        table_of = [i if i in tables else None for i in owners]
        outputs = _in_blocks(update_leaves, gradients, param_leaves, state_leaves, table_of)
        if outputs is None:
            outputs = _at_once(update_leaves, gradients, param_leaves, state_leaves, table_of)
        new_updates, new_state = outputs[:k], outputs[k:]
        _check_state(new_state, slots)
        return treedef.unflatten(new_updates), LazyState(state_def.unflatten(new_state))

    return optax.GradientTransformationExtraArgs(init, update)


def _at_once(
    update: Callable[..., list[Any]],
    gradients: list[Any],
    params: list[Any],
    state: list[Any],
    table_of: list[int | None],
) -> list[Any]:
    """`update`, with the touched rows of each table as if they were the whole table.

    Args:
      update: from all leaves of gradients, parameters and state to those of updates and state.
      table_of: for each gradient and each leaf of the state the table it belongs to, or None.
    """
    k = len(params)
    rows = [None if table is None else gradients[table] for table in table_of]
    outputs = update(
        *(g.values if is_rows(g) else g for g in gradients),
        *map(take_rows, params, rows[:k]),
        *map(take_rows, state, rows[k:]),
    )
    updates = [
        u if r is None else r.with_values(u) for u, r in zip(outputs[:k], rows[:k], strict=True)
    ]
    return [*updates, *map(put_rows, state, rows[k:], outputs[k:])]


def _in_blocks(
    update: Callable[..., list[Any]],
    gradients: list[Any],
    params: list[Any],
    state: list[Any],
    table_of: list[int | None],
) -> list[Any] | None:
    """As `_at_once`, some rows of a table at a time; None where that does not pay, and where
    `update` lets rows meet."""
    k = len(params)
    tables = {table: gradients[table] for table in table_of if table is not None}
    lengths = [length for rows in tables.values() if (length := block_length(rows)) is not None]
    if not lengths:
        return None
    length = min(lengths)

    def rows_to_come(x: Any, table: int | None) -> Any:
        if table is None:
            return x
        n = tables[table].values.shape[0]
        return jax.ShapeDtypeStruct((n, *jnp.shape(x)[1:]), jnp.result_type(x))

    inputs = [
        *(g.values if is_rows(g) else g for g in gradients),
        *map(rows_to_come, params, table_of[:k]),
        *map(rows_to_come, state, table_of[k:]),
    ]
    by_row = as_row_function(update, inputs, [*table_of[:k], *table_of], table_of)
    if by_row is None:
        return None
    outputs = [*by_row.shared]
    for table, rows in tables.items():
        places = [i for i, owner in enumerate(table_of) if owner == table]  # the update, the slots

        def update_some(some: SparseRows, slots: Any, table: int = table) -> Any:
            inputs = [some.values, *(take_rows(x, some) for x in (params[table], *slots))]
            values, *new = by_row.of_rows(table, inputs)
            return values, [put_rows(x, some, y) for x, y in zip(slots, new, strict=True)]

        slots = [state[i - k] for i in places[1:]]
        rows, slots = over_blocks(update_some, rows, slots, length)
        for i, x in zip(places, [rows, *slots], strict=True):
            outputs[i] = x
    return outputs


class _Slot(NamedTuple):
    """A leaf of the inner state, as `inner.init` makes it."""

    path: str
    shape: tuple[int, ...]
    table: int  # the parameter whose rows it is kept by, or -1


def _slots(
    inner: optax.GradientTransformationExtraArgs,
    treedef: Any,
    params: list[Any],
    tables: list[int],
) -> list[_Slot]:
    """All leaves of the inner state; `tables` are the leaves of `params` with a row gradient.

    `inner.init` is asked for its shapes with the tables as they are, taller, each by a number of
    rows of its own, and wider. Kept by row is what grows by as many rows as its table does, and
    only then. Whatever else changes mixes rows.
    """
    shapes = [jax.eval_shape(lambda p=p: p) for p in params]
    growth = {table: more for more, table in enumerate(tables, start=1)}

    def state_with(more_rows: dict[int, int], more_columns: int) -> Any:
        resized = [*shapes]
        for table in tables:
            rows, *width = shapes[table].shape
            shape = (rows + more_rows.get(table, 0), *(size + more_columns for size in width))
            resized[table] = jax.ShapeDtypeStruct(shape, shapes[table].dtype)
        return jax.eval_shape(inner.init, treedef.unflatten(resized))

    def is_kept_by(table: int, now: Any, tall: Any, wide: Any) -> bool:
        rows = shapes[table].shape[0]
        grown = (rows + growth[table], *now.shape[1:])
        return now.shape[:1] == wide.shape[:1] == (rows,) and tall.shape == grown

    state, taller, wider = state_with({}, 0), state_with(growth, 0), state_with({}, 1)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    slots = []
    for (key_path, now), tall, wide in zip(
        leaves, jax.tree.leaves(taller), jax.tree.leaves(wider), strict=True
    ):
        path = trees.path_str(key_path)
        table = next((i for i in tables if is_kept_by(i, now, tall, wide)), -1)
        if table < 0 and not now.shape == tall.shape == wide.shape:
            raise ValueError(
                f"lazy needs a state that is kept by row, but {path!r}, of shape "
                f"{list(now.shape)}, depends on the shape of a table with a row gradient otherwise"
            )
        slots.append(_Slot(path, now.shape, table))
    for before, after in zip(
        trees.find_states(state, ParamsEmaState),
        trees.find_states(taller, ParamsEmaState),
        strict=True,
    ):
        averages, _ = jax.tree_util.tree_flatten_with_path(before.ema)
        for (key_path, now), tall in zip(averages, jax.tree.leaves(after.ema), strict=True):
            if now.shape != tall.shape:
                raise ValueError(
                    "params_ema inside lazy would not average the idle rows of "
                    f"{trees.path_str(key_path)!r}; mask it to the other parameters (optax.masked)"
                )
    return slots


def _check_state(leaves: list[Any], slots: list[_Slot]) -> None:
    """Refuses a state in which a leaf has another shape than `inner.init` gave it."""
    if len(leaves) != len(slots):
        raise ValueError("the state is not one that init made for these parameters")
    for x, slot in zip(leaves, slots, strict=True):
        if jnp.shape(x) != slot.shape:
            raise ValueError(
                f"{slot.path!r} has shape {list(jnp.shape(x))} in the state, "
                f"but {list(slot.shape)} is what init makes for these parameters"
            )
