"""Scalars to log at every step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from adam_transforms._core import arguments, state_layout, trees
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._core.types import Params, State, Updates
from adam_transforms._embeddings.deferred.missed_updates import gap_of
from adam_transforms._embeddings.deferred.state import DeferredAdamState, deferred_tables
from adam_transforms._transforms import numerics
from adam_transforms._transforms.learning_rates import ScaleByPathLearningRateState


def metrics(
    updates: Updates,
    state: State,
    *,
    params: Params | None = None,
    grads: Updates | None = None,
    per_parameter: bool = False,
    idle_gaps: bool = False,
) -> dict[str, jax.Array]:
    """Scalars of one step as a flat dict, for any logger, inside or outside jit.

    =========================  ===================================================================
    ``updates_norm``           global norm of the updates, row updates included; 0 for a step that
                               only accumulates or is skipped
    ``grads_norm``             global norm of `grads`; scaled if the loss was
    ``params_norm``            global norm of `params`; reads all of them, tables included
    ``updates_norm/<path>``    with `per_parameter`, the norm of each leaf; also for `grads` and
                               `params`
    ``rows_touched/<path>``    for each row update, the fraction of the table's rows that it updates
    ``longest_gap/<path>``     with `idle_gaps`, for each table of `deferred_adam` the maximum
                               number of steps that a row has been idle; reads an int32 for each row
    ``count``                  the number of steps of Adam
    ``learning_rate``          the value that the step used: from a schedule of `adam`, `adamw`,
                               `lazy_adam` or `scale_by_learning_rate`, from `deferred_adam`, or
                               from `optax.inject_hyperparams`. Other scheduled hyperparameters of
                               the latter are included under their names
    ``learning_rate/<rule>``   from `scale_by_path_learning_rate`, by the index of the rule, the
                               default last
    ``loss_scale``             the scale for the next loss
    ``skipped_steps``          the number of steps skipped because a gradient was not finite
    ``consecutive_nonfinite``  the number of steps since the last finite one, by `skip_nonfinite`
                               with `max_consecutive`
    ``mini_step``              the number of gradients accumulated in this cycle, by `accumulate` or
                               `optax.MultiSteps`
    =========================  ===================================================================

    Scalars that are not in the state are omitted: a constant learning rate, and every learning rate
    of `optax.adam`. An injected learning rate is included once.

    The name of a scalar in a parameter group ends in the group's label: ``learning_rate/head``.
    `by_path` numbers its groups in the order of its rules; the default is last. If names are still
    equal, they end in the paths of their states instead: ``count/0``, ``count/1/inner_state``.

    Args:
      updates: the updates that the transformation returned: arrays, `SparseRows` and None.
      state: the optimizer state returned with them.
      params, grads: trees of arrays, `SparseRows` and None, to add their norms.
      per_parameter: static; whether to add the norm of each leaf.
      idle_gaps: static; whether to add the idle gaps of deferred tables.

    Returns:
      {name: scalar}. The names depend only on the structure of the arguments, so a jitted step that
      returns them is traced once. Norms are at least float32, counts int32.

    Raises:
      TypeError: an update is not floating or complex (e.g. `updates` and `state` are swapped).

    >>> import jax.numpy as jnp, optax
    >>> from adam_transforms import adam
    >>> tx = adam(optax.linear_schedule(0.5, 0.0, transition_steps=10))
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
            found[trees.join_paths("rows_touched", path)] = _fraction_touched(update)
    state = trees.unwrap_variables(state)
    if idle_gaps:
        found |= _longest_gaps(state)
    return found | {s.name: jnp.asarray(s.value) for s in scalars_of(state)}


class Scalar(NamedTuple):
    """A scalar of a state: its name in `metrics`, its place, and its value. The path of `owner`
    distinguishes it from scalars of the same name."""

    name: str
    place: state_layout.Place
    owner: state_layout.Place
    value: Any


def scalars_of(state: State) -> list[Scalar]:
    """The scalars of an optimizer state without Flax NNX variables, sorted by name."""
    found = []
    injections = []  # where learning rates are injected

    def add(name: str, owner: state_layout.Place, value: Any, *keys: Any) -> None:
        place = owner._replace(keys=(*owner.keys, *keys))
        found.append(Scalar(name, place, owner, value))

    for owner, node in state_layout.walk(state):
        is_injected = any(owner.keys[: len(keys)] == keys for keys in injections)
        for field, (_, metric) in state_layout.fields_of(type(node)).items():
            if metric is None or (metric == "learning_rate" and is_injected):
                continue
            value = getattr(node, field)
            if value is not None:  # in a state of a version that did not keep it
                add(metric, owner, value, GetAttrKey(field))
        for name, value in _injected(node):
            add(name, owner, value, GetAttrKey("hyperparams"), DictKey(name))
            if name == "learning_rate":
                injections.append(owner.keys)
        has_rules = isinstance(node, ScaleByPathLearningRateState)
        for rule, rate in enumerate(node.rates if has_rules else ()):
            keys = (*owner.keys, GetAttrKey("rates"), SequenceKey(rule))
            place = owner._replace(keys=keys, groups=(*owner.groups, str(rule)))
            found.append(Scalar("learning_rate", place, place, rate))
    return sorted(_with_distinct_names(found), key=lambda scalar: scalar.name)


def _injected(state: Any) -> list[tuple[str, Any]]:
    """The learning rate and the scheduled hyperparameters of `optax.inject_hyperparams`."""
    if not isinstance(state, state_layout.INJECTED):
        return []
    scheduled = getattr(state, "hyperparams_states", {})
    return [
        (name, value)
        for name, value in state.hyperparams.items()
        if name == "learning_rate" or name in scheduled
    ]


def _with_distinct_names(scalars: list[Scalar]) -> list[Scalar]:
    """Appends group labels to the names; where names are then still equal, paths instead."""
    grouped = [(s.name, trees.join_paths(s.name, *s.place.groups)) for s in scalars]
    ambiguous = {name for name, full in grouped if grouped.count((name, full)) > 1}
    return [
        s._replace(name=trees.join_paths(name, str(s.owner)) if name in ambiguous else full)
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
        norms |= {
            trees.join_paths(name, path): numerics.global_norm(x) for path, x in leaves.items()
        }
    return norms


def _fraction_touched(rows: SparseRows) -> jax.Array:
    distinct = jnp.sum(rows.sum_duplicates().is_valid, dtype=jnp.int32)
    return distinct.astype(jnp.float32) / float(max(rows.num_rows, 1))


def _longest_gaps(state: State) -> dict[str, jax.Array]:
    gaps = {}
    for found in trees.find_states(state, DeferredAdamState):
        for path, table in deferred_tables(found).items():
            # max(count - last_step) would allocate a (V,) array for the differences.
            oldest = jnp.min(table.last_step) if table.last_step.size else found.count
            gap = gap_of(oldest, found.count, table.history.weights.shape[0])
            gaps[trees.join_paths("longest_gap", path)] = gap
    return gaps
