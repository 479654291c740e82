"""The scalars worth logging at every step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from adam_transforms._core import arguments, state_layout, trees
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._embeddings.deferred.state import DeferredAdamState, idle_tables
from adam_transforms._transforms import numerics
from adam_transforms._transforms.learning_rates import ScaleByPathLearningRateState


def metrics(
    updates: Any,
    state: Any,
    *,
    params: Any = None,
    grads: Any = None,
    per_parameter: bool = False,
    idle_gaps: bool = False,
) -> dict[str, jax.Array]:
    """What to log of a step: a flat dict of scalars, for any logger, inside jit or outside.

    =========================  ===================================================================
    ``updates_norm``           global norm of the updates, row updates included; 0 on a held or
                               skipped step
    ``grads_norm``             that of `grads`, as they are given: scaled if the loss was
    ``params_norm``            that of `params`; reads them all, tables too
    ``updates_norm/<path>``    with `per_parameter`, the norm of each leaf; likewise of `grads` and
                               `params`
    ``rows_touched/<path>``    for each row update, the share of the table's rows that it names
    ``longest_gap/<path>``     with `idle_gaps`, for each table of `deferred_adam` the most steps
                               that a row has been idle; reads an int32 for each row
    ``count``                  steps made by Adam
    ``learning_rate``          of `optax.inject_hyperparams`, as are the hyperparameters by their
                               names that it reads from schedules
    ``learning_rate/<rule>``   of `scale_by_path_learning_rate`, by the number of the rule, the
                               default last
    ``loss_scale``             the scale for the next loss
    ``skipped_steps``          steps skipped so far because they were not finite
    ``mini_step``              gradients accumulated in this cycle, by `accumulate` or
                               `optax.MultiSteps`
    =========================  ===================================================================

    What the state does not hold is left out. The learning rate of a preset or of an optimizer of
    Optax is not in its state: ``schedule(count)`` is what the next step will take, or it can be
    injected: ``optax.inject_hyperparams(at.adam)(learning_rate=schedule)``.

    Of a state inside a parameter group the name ends with the group's label: ``learning_rate/head``
    (`by_path` numbers its groups as its rules are, the default last). Where that leaves several of
    one name, they all end with the paths of their states instead: ``count/0``,
    ``count/1/inner_state``.

    Args:
      updates: what the transformation returned; arrays, `SparseRows` and None.
      state: the optimizer state returned with them.
      params, grads: trees of arrays, `SparseRows` and None, for norms of them too.
      per_parameter: static; whether each leaf's norm is wanted besides the global one.
      idle_gaps: static; whether the idle gaps of deferred tables are wanted.

    Returns:
      {name: scalar}. The names depend on the structure of the arguments alone, so that a jitted
      step that returns them is traced once. Norms are at least float32, counts int32.

    Raises:
      TypeError: an update is not floating or complex (`updates` and `state` swapped, say).

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.5)
    >>> params = {"w": jnp.zeros(4)}
    >>> updates, state = tx.update({"w": jnp.ones(4)}, tx.init(params), params)
    >>> {name: round(float(x), 3) for name, x in metrics(updates, state).items()}
    {'updates_norm': 1.0, 'count': 1.0, 'learning_rate': 0.5}
    """
    per_parameter = arguments.flag("per_parameter", per_parameter)
    idle_gaps = arguments.flag("idle_gaps", idle_gaps)
    updates = trees.as_gradients(updates)
    found = {}
    for name, tree in (("updates", updates), ("grads", grads), ("params", params)):
        if tree is not None:
            found |= _norms(f"{name}_norm", tree, per_parameter)
    for path, update in trees.flatten_with_paths(updates)[0]:
        if isinstance(update, SparseRows):
            found[trees.joined("rows_touched", path)] = _share_touched(update)
    state = trees.unwrapped(state)
    if idle_gaps:
        found |= _longest_gaps(state)
    return found | {s.name: jnp.asarray(s.value) for s in scalars_of(state)}


class Scalar(NamedTuple):
    """A number in a state under its name as a metric, where it is, and the part of the state whose
    path tells it from others of that name."""

    name: str
    place: state_layout.Place
    owner: state_layout.Place
    value: Any


def scalars_of(state: Any) -> list[Scalar]:
    """The metrics that an optimizer state, variables unwrapped, holds."""
    found = []

    def add(name: str, owner: state_layout.Place, value: Any, *keys: Any) -> None:
        place = owner._replace(keys=(*owner.keys, *keys))
        found.append(Scalar(name, place, owner, value))

    for owner, node in state_layout.walk(state):
        for field, (_, metric) in state_layout.fields_of(type(node)).items():
            if metric is not None:
                add(metric, owner, getattr(node, field), GetAttrKey(field))
        for name, value in _injected(node):
            add(name, owner, value, GetAttrKey("hyperparams"), DictKey(name))
        for rule, rate in enumerate(_rates(node)):
            keys = (*owner.keys, GetAttrKey("rates"), SequenceKey(rule))
            place = owner._replace(keys=keys, groups=(*owner.groups, str(rule)))
            found.append(Scalar("learning_rate", place, place, rate))
    return sorted(_distinct(found), key=lambda scalar: scalar.name)


def _injected(state: Any) -> list[tuple[str, Any]]:
    """The learning rate, and what is read from schedules, if it is a state of injection."""
    if not isinstance(state, state_layout.INJECTED):
        return []
    scheduled = getattr(state, "hyperparams_states", {})
    return [
        (name, value)
        for name, value in state.hyperparams.items()
        if name == "learning_rate" or name in scheduled
    ]


def _rates(state: Any) -> Sequence[Any]:
    """The learning rate of each rule, if it is a state with rules."""
    return state.rates if isinstance(state, ScaleByPathLearningRateState) else ()


def _distinct(scalars: list[Scalar]) -> list[Scalar]:
    """With the groups in the names, or with paths in all of one name if groups are not enough."""
    grouped = [(s.name, trees.joined(s.name, *s.place.groups)) for s in scalars]
    several = {name for name, full in grouped if grouped.count((name, full)) > 1}
    return [
        s._replace(name=trees.joined(name, str(s.owner)) if name in several else full)
        for s, (name, full) in zip(scalars, grouped, strict=True)
    ]


def _norms(name: str, tree: Any, per_parameter: bool) -> dict[str, jax.Array]:
    leaves = {
        path: x
        for path, x in trees.non_none(tree)
        if trees.is_array(x) and jnp.issubdtype(trees.dtype_of(x), jnp.inexact)
    }
    norms = {name: numerics.global_norm(leaves)}
    if per_parameter:
        norms |= {trees.joined(name, path): numerics.global_norm(x) for path, x in leaves.items()}
    return norms


def _share_touched(rows: SparseRows) -> jax.Array:
    distinct = jnp.sum(rows.sum_duplicates().is_valid, dtype=jnp.int32)
    return distinct.astype(jnp.float32) / float(max(rows.num_rows, 1))


def _longest_gaps(state: Any) -> dict[str, jax.Array]:
    gaps = {}
    for found in trees.find_states(state, DeferredAdamState):
        for path, idle in idle_tables(found).items():
            # The minimum first: the gaps of all rows would be one more (V,) array.
            oldest = jnp.min(idle.last_step) if idle.last_step.size else found.count
            gaps[trees.joined("longest_gap", path)] = found.count - oldest
    return gaps
