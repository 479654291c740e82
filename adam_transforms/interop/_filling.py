"""Filling a fresh optimizer state with what another system has kept."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adam_transforms._core import trees
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._embeddings.deferred.state import DeferredAdamState
from adam_transforms._transforms.accumulation import AccumulateState
from adam_transforms._transforms.ema import ParamsEmaState
from adam_transforms._transforms.learning_rates import ScaleByPathLearningRateState
from adam_transforms._transforms.loss_scaling import DynamicLossScaleState
from adam_transforms.interop._slots import ACCUMULATIONS, ADAM, Contents, by_rows, has


def has_step_counters(state: Any) -> bool:
    """Whether anything but Adam goes by the number of steps."""
    found = jax.tree.leaves(state, is_leaf=_counts)
    return any(_counts(x) and not isinstance(x, (*ADAM, ParamsEmaState)) for x in found)


def fill_state(state: Any, contents: Contents) -> Any:
    """A fresh state with the contents in their places.

    Whatever counts steps goes on from where they were: Adam's, those of schedules and of
    hyperparameters. What keeps slots that are not brought starts afresh, with its count.
    """
    calls = contents.calls
    if calls is None and not has(state, ACCUMULATIONS):
        calls = contents.count
    return _filled(state, contents, calls)


def _filled(tree: Any, contents: Contents, count: int | None) -> Any:
    """`tree` with its states renewed; `count` is for those that are in no accumulation."""

    def renewed(x: Any) -> Any:
        if isinstance(x, ADAM):
            return _filled_adam(x, contents, _known(count))
        if isinstance(x, ParamsEmaState):
            return _filled_average(x, contents, count)
        if not _is_state(x):
            return x
        inside = contents.count if isinstance(x, ACCUMULATIONS) else count
        fields = {
            field: _filled(value, contents, inside)
            for field, value in x._asdict().items()
            if field not in ("acc", "acc_grads")
        }
        if "count" in x._fields and _goes_on(x):
            fields["count"] = _placed(_known(count), x.count)
        return _filled_wrapper(x._replace(**fields), contents)

    return jax.tree.map(renewed, tree, is_leaf=_is_state)


def _is_state(x: Any) -> bool:
    """Whether it is a state in which something is to be renewed."""
    return isinstance(x, (*ACCUMULATIONS, DynamicLossScaleState)) or _counts(x)


def _counts(x: Any) -> bool:
    return isinstance(x, tuple) and "count" in getattr(x, "_fields", ())


def _known(count: int | None) -> int:
    if count is None:
        raise ValueError(
            "tx counts steps outside of its accumulation, and how many gradients an update has "
            "taken is not known here"
        )
    return count


def _goes_on(x: Any) -> bool:
    """Whether a count belongs to no slots, which start afresh: a schedule's, or a wrapper's."""
    if isinstance(x, ScaleByPathLearningRateState) or "inner_state" in x._fields:
        return True
    rest = jax.tree.leaves(x._replace(count=None))
    return not any(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in rest)


def _filled_adam(x: Any, contents: Contents, count: int) -> Any:
    slots = {
        slot: _with_slot(getattr(x, slot), contents.slots, slot)
        for slot in ("mu", "nu", "nu_max")
        if getattr(x, slot, None) is not None
    }
    x = x._replace(count=_placed(count, x.count), **slots)
    if not isinstance(x, DeferredAdamState):
        return x

    def paid(group: Any) -> Any:
        if group is None:
            return None
        now = jax.tree.map(lambda last: jnp.full_like(last, count), group.last_step)
        return group._replace(last_step=now)

    return x._replace(idle=paid(x.idle), idle_decayed=paid(x.idle_decayed))


def _filled_average(x: ParamsEmaState, contents: Contents, count: int | None) -> ParamsEmaState:
    """With the average that is brought; else it starts afresh."""
    paths = [path for path, leaf in trees.flatten_with_paths(x.ema)[0] if leaf is not None]
    if not all("ema" in contents.slots.get(path, {}) for path in paths):
        return x
    weight = _placed(1.0, x.weight)
    ema = _with_slot(x.ema, contents.slots, "ema")
    return ParamsEmaState(_placed(_known(count), x.count), weight, ema)


def _filled_wrapper(x: Any, contents: Contents) -> Any:
    if isinstance(x, AccumulateState):
        x = x._replace(mini_step=_placed(contents.mini_step, x.mini_step))
        return x._replace(acc=_with_slot(x.acc, contents.slots, "acc")) if contents.mini_step else x
    if isinstance(x, optax.MultiStepsState):
        return x._replace(gradient_step=_placed(contents.count, x.gradient_step))
    if isinstance(x, DynamicLossScaleState) and contents.scale is not None:
        return x._replace(
            scale=_placed(contents.scale, x.scale),
            finite_steps=_placed(contents.finite_steps, x.finite_steps),
        )
    return x


def _with_slot(tree: Any, slots: Mapping[str, Mapping[str, Any]], slot: str) -> Any:
    """`tree` with the arrays of one slot; leaves that it is not brought for stay."""

    def leaf_now(path: str, leaf: Any) -> Any:
        if leaf is None or slot not in slots.get(path, {}):
            return leaf
        if isinstance(leaf, SparseRows):
            raise ValueError(by_rows(path))
        return _placed(slots[path][slot], leaf)

    leaves, treedef = trees.flatten_with_paths(tree)
    return treedef.unflatten([leaf_now(path, leaf) for path, leaf in leaves])


def _placed(value: Any, like: Any) -> Any:
    """`value` in the dtype and on the devices of `like`. Of an array there must be no other user:
    JAX may keep its memory."""
    value = np.asarray(value, like.dtype)
    if isinstance(like, jax.Array) and not isinstance(like, Tracer) and like.committed:
        return jax.device_put(value, like.sharding)
    return jnp.asarray(value)
