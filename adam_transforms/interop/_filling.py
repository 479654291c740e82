"""Replaces the contents of a new optimizer state by imported ones."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adam_transforms._core import state_layout, trees
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._core.state_layout import Role
from adam_transforms._core.types import Path, State
from adam_transforms._transforms.accumulation import (
    ACCUMULATE_STATES,
    VariableAccumulateState,
)
from adam_transforms._transforms.compress_moments import CompressMomentsState, decoded, encoded
from adam_transforms._transforms.ema import ParamsEmaState
from adam_transforms._transforms.loss_scaling import DynamicLossScaleState
from adam_transforms.interop._slots import Contents, find, row_accumulator_message


def has_step_counters(state: State) -> bool:
    """Whether a state other than Adam's and averages has a step count, e.g. a schedule's."""
    return any(
        not state_layout.is_adam(x) and Role.AVERAGE not in _roles(x)
        for x in find(state, _has_count)
    )


def fill_state(state: State, contents: Contents) -> State:
    """A new state with the imported contents.

    Imported counts replace Adam's and those of schedules and hyperparameters. A state with slots
    that are not imported keeps its initial slots and its initial count.
    """
    calls = contents.calls
    if calls is None and not find(state, state_layout.is_accumulation):
        calls = contents.count
    return _fill(state, contents, calls)


def _fill(tree: State, contents: Contents, count: int | None) -> State:
    """`tree` with all contents replaced; `count` is the step count outside of accumulations."""

    def fill_node(x: Any) -> Any:
        if state_layout.is_adam(x):
            return _fill_adam(x, contents, _known(count))
        if isinstance(x, ParamsEmaState):
            return _fill_average(x, contents, count)
        if not _is_fillable(x):
            return x
        inner_count = contents.count if state_layout.is_accumulation(x) else count
        layout = state_layout.fields_of(type(x))
        fields = {
            name: _fill(value, contents, inner_count)
            for name, value in x._asdict().items()
            if name not in layout or layout[name].role is not Role.BUFFER
        }
        if "count" in x._fields and _is_step_counter(x):
            fields["count"] = _cast_like(_known(count), x.count)
        return _fill_wrapper(x._replace(**fields), contents)

    return jax.tree.map(fill_node, tree, is_leaf=_is_fillable)


def _is_fillable(x: Any) -> bool:
    """Whether `x` is a state with contents to replace."""
    is_wrapper = state_layout.is_accumulation(x) or isinstance(x, DynamicLossScaleState)
    return is_wrapper or _has_count(x)


def _has_count(x: Any) -> bool:
    return isinstance(x, tuple) and "count" in getattr(x, "_fields", ())


def _roles(x: Any) -> set[Role]:
    """The roles of the fields of `x` in the table of state classes."""
    return {field.role for field in state_layout.fields_of(type(x)).values()}


def _known(count: int | None) -> int:
    if count is None:
        raise ValueError(
            "tx counts steps outside of its accumulation, but the number of gradients per update "
            "is unknown"
        )
    return count


def _is_step_counter(x: Any) -> bool:
    """Whether the count of `x` is that of a schedule or wrapper, not of slots of its own."""
    roles = _roles(x)
    if roles or "inner_state" in x._fields:
        return not roles & set(state_layout.MIRRORS)
    rest = jax.tree.leaves(x._replace(count=None))
    return not any(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in rest)


def _fill_adam(x: Any, contents: Contents, count: int) -> Any:
    if isinstance(x, CompressMomentsState):
        return encoded(_fill_adam(decoded(x), contents, count), x)
    slots = {
        slot: _fill_slot(getattr(x, slot), contents.slots, slot)
        for slot in state_layout.slot_names(x)
    }
    return _mark_current(x._replace(count=_cast_like(count, x.count), **slots), count)


def _mark_current(state: State, count: int) -> State:
    """`state` with all rows of deferred tables synchronized at step `count`."""

    def has_last_steps(x: Any) -> bool:
        return Role.LAST_STEP in _roles(x)

    def mark(x: Any) -> Any:
        if not has_last_steps(x):
            return x
        fields = {
            name: jax.tree.map(lambda last: jnp.full_like(last, count), getattr(x, name))
            for name, field in state_layout.fields_of(type(x)).items()
            if field.role is Role.LAST_STEP
        }
        return x._replace(**fields)

    return jax.tree.map(mark, state, is_leaf=has_last_steps)


def _fill_average(x: ParamsEmaState, contents: Contents, count: int | None) -> ParamsEmaState:
    """`x` with the imported average; unchanged without one."""
    paths = [path for path, leaf in trees.flatten_with_paths(x.ema)[0] if leaf is not None]
    if not all("ema" in contents.slots.get(path, {}) for path in paths):
        return x
    count = _known(count)
    return x._replace(
        count=_cast_like(count, x.count),
        weight=_cast_like(1.0, x.weight),
        ema=_fill_slot(x.ema, contents.slots, "ema"),
        last_step=jax.tree.map(lambda last: jnp.full_like(last, count), x.last_step),
    )


def _fill_wrapper(x: Any, contents: Contents) -> Any:
    if isinstance(x, ACCUMULATE_STATES):
        x = x._replace(mini_step=_cast_like(contents.mini_step, x.mini_step))
        if isinstance(x, VariableAccumulateState):
            # Every gradient of another system has weight 1.
            numbers = {"weight": contents.mini_step, "cycles": contents.count}
            kept = {name: getattr(x, name) for name in numbers if getattr(x, name) is not None}
            x = x._replace(**{k: _cast_like(numbers[k], like) for k, like in kept.items()})
        return x._replace(acc=_fill_slot(x.acc, contents.slots, "acc")) if contents.mini_step else x
    if isinstance(x, optax.MultiStepsState):
        return x._replace(gradient_step=_cast_like(contents.count, x.gradient_step))
    if isinstance(x, DynamicLossScaleState) and contents.scale is not None:
        return x._replace(
            scale=_cast_like(contents.scale, x.scale),
            finite_steps=_cast_like(contents.finite_steps, x.finite_steps),
        )
    return x


def _fill_slot(tree: Any, slots: Mapping[Path, Mapping[str, Any]], slot: str) -> Any:
    """`tree` with the imported arrays of one slot; other leaves are unchanged."""

    def fill_leaf(path: Path, leaf: Any) -> Any:
        if leaf is None or slot not in slots.get(path, {}):
            return leaf
        if isinstance(leaf, SparseRows):
            raise ValueError(row_accumulator_message(path))
        return _cast_like(slots[path][slot], leaf)

    leaves, treedef = trees.flatten_with_paths(tree)
    return treedef.unflatten([fill_leaf(path, leaf) for path, leaf in leaves])


def _cast_like(value: Any, like: Any) -> Any:
    """`value` with the dtype and the sharding of `like`.

    JAX may adopt the memory of a NumPy array: the caller must not use `value` again.
    """
    value = np.asarray(value, like.dtype)
    if isinstance(like, jax.Array) and not isinstance(like, Tracer) and like.committed:
        return jax.device_put(value, like.sharding)
    return jnp.asarray(value)
