"""Masks, groups and learning rates by path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, state_layout, trees
from adam_transforms._core.patterns import Patterns, Rules, compile_patterns, parse_rules
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.state_layout import Field, Role, register
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._transforms import numerics


def path_mask(patterns: Patterns, *, exclude: bool = False) -> Callable[[Any], Any]:
    """A mask by path, for `optax.masked`, `optax.add_decayed_weights` or `adamw`.

    Args:
      patterns: one or several regular expressions, searched for in the path of each leaf. They are
        trusted: a hostile one can take exponential time.
      exclude: select the leaves that match no pattern instead.

    Returns:
      A function from a tree to a tree of booleans: True where the leaf is selected.

    Raises:
      ValueError: a pattern is not a regular expression; when called, no leaf matches.

    >>> mask = path_mask(["bias$", "norm/"], exclude=True)
    >>> mask({"kernel": 1.0, "bias": 2.0, "norm": {"scale": 1.0}})
    {'bias': False, 'kernel': True, 'norm': {'scale': False}}
    """
    rules = Rules((compile_patterns("patterns", patterns),))
    exclude = arguments.flag("exclude", exclude)

    def mask(tree: Any) -> Any:
        return jax.tree.map(lambda index: (index == 0) != exclude, rules.indices(tree))

    return mask


def by_path(
    rules: Sequence[tuple[Patterns, optax.GradientTransformation]],
    default: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Parameter groups: one transformation for each group of paths.

    Args:
      rules: (patterns, transformation) pairs; the first pair whose patterns match the path of a
        parameter applies to it. Patterns are trusted, as in `path_mask`.
      default: applies to the parameters that no rule matches.

    Returns:
      `optax.multi_transform` over these groups, with its state.

    Raises:
      ValueError: a rule matches no parameter.

    >>> import jax.numpy as jnp, optax
    >>> tx = by_path([("bias", optax.set_to_zero())], default=optax.scale(-1.0))
    >>> params = {"bias": jnp.ones(2), "kernel": jnp.ones(2)}
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> updates["bias"].tolist(), updates["kernel"].tolist()
    ([0.0, 0.0], [-1.0, -1.0])
    """
    compiled, transformations = parse_rules(rules)
    groups: dict[Any, Any] = {
        i: arguments.transformation(f"rules[{i}]", inner) for i, inner in enumerate(transformations)
    }
    groups[len(groups)] = arguments.transformation("default", default)
    grouped = optax.multi_transform(groups, compiled.indices)

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, State]:
        if not isinstance(state, state_layout.GROUPS) or state.inner_states.keys() != groups.keys():
            raise wrong_state(grouped.init, updates, state, params)
        return grouped.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(grouped.init, update)


@register(inner_state=Role.INNER, rate=Field(Role.SCALAR, metric="learning_rate"))
class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate` with a schedule.

    Attributes:
      inner_state: `optax.ScaleByScheduleState`.
      rate: a scalar of the widest float (`jnp.result_type(float)`): the learning rate of the last
        step, or in a new state that of the first step. No update depends on it.
    """

    inner_state: Any
    rate: jax.Array


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate`; the rate of a schedule is in the state, for `metrics`.

    Args:
      learning_rate: a number, a scalar array, or a schedule ``count -> value`` of the number of
        steps before this one.

    Returns:
      A transformation that flips the sign; with a schedule its state is `ScaleByLearningRateState`,
      with a number it is Optax's transformation.

    Raises:
      TypeError: the learning rate has another type; an update is not a dense, floating or complex
        array.
      ValueError: the state is of another transformation.

    >>> import jax.numpy as jnp
    >>> from adam_transforms import metrics
    >>> tx = scale_by_learning_rate(lambda count: 0.5 / (count + 1))
    >>> state = tx.init(jnp.ones(1))
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.ones(1), state)
    >>> updates.tolist(), float(metrics(updates, state)["learning_rate"])
    ([-0.25], 0.25)
    """
    rate = arguments.scalar_or_schedule("learning_rate", learning_rate)
    if not callable(rate):
        return optax.with_extra_args_support(optax.scale_by_learning_rate(rate))
    schedule = cast(optax.Schedule, rate)

    def init(params: Params) -> State:
        state = optax.scale_by_learning_rate(schedule).init(params)
        rate = jnp.array(schedule(jnp.zeros((), jnp.int32)), dtypes.scalar_dtype())
        return ScaleByLearningRateState(state, rate)

    def update(
        updates: Updates, state: State, params: Params | None = None, **_: Any
    ) -> tuple[Updates, State]:
        if type(state) is not ScaleByLearningRateState:
            raise wrong_state(init, updates, state, params)
        rate = schedule(state.inner_state.count)
        scale = optax.scale_by_learning_rate(lambda _: rate)
        updates = trees.map_leaves(lambda path, g: g, updates)  # refuses row gradients
        updates, inner_state = scale.update(updates, state.inner_state)
        return updates, ScaleByLearningRateState(inner_state, jnp.array(rate, state.rate.dtype))

    return optax.GradientTransformationExtraArgs(init, update)


@register(count=Role.SCALAR, rates=Role.SCALAR)
class ScaleByPathLearningRateState(NamedTuple):
    """State of `scale_by_path_learning_rate`.

    Attributes:
      count: int32 (), the number of steps.
      rates: the learning rates of the last step, or in a new state those of the first step: a
        scalar of the widest float (`jnp.result_type(float)`) for each rule, the default last.
    """

    count: jax.Array
    rates: tuple[jax.Array, ...]


def scale_by_path_learning_rate(
    rules: Sequence[tuple[Patterns, optax.ScalarOrSchedule]],
    default: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each update by minus the learning rate of its path.

    Args:
      rules: (patterns, learning rate) pairs; the first pair whose patterns match the path of a
        parameter applies to it. A learning rate is a number, a scalar array, or a schedule ``count
        -> value`` of the number of steps before this one.
      default: the learning rate if no rule matches.

    Returns:
      A transformation with `ScaleByPathLearningRateState`, whose rates are in `metrics`; updates
      keep their dtype. It flips the sign and replaces `optax.scale_by_learning_rate` in a chain.

    Raises:
      ValueError: a rule matches no parameter.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_path_learning_rate([("embed", 0.5)], default=0.25)
    >>> params = {"embed": jnp.ones(1), "head": jnp.ones(1)}
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> updates["embed"].tolist(), updates["head"].tolist()
    ([-0.5], [-0.25])
    """
    compiled, rates = parse_rules(rules)
    rates = [
        arguments.scalar_or_schedule(name, rate)
        for name, rate in zip(
            [f"rules[{i}]" for i in range(len(rates))] + ["default"], [*rates, default], strict=True
        )
    ]

    scale = scale_by_chosen_rate(compiled.index, rates)

    def init(params: Params) -> State:
        compiled.indices(params)  # raises if a rule matches no parameter
        return scale.init(params)

    return optax.GradientTransformationExtraArgs(init, scale.update)


def scale_by_chosen_rate(
    choose: Callable[[Path], int], rates: Sequence[Any]
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the leaf at `path` by minus ``rates[choose(path)]``, a number or a schedule."""

    def rates_at(count: jax.Array) -> list[Any]:
        return [numerics.scalar_at(rate, count) for rate in rates]

    def init(params: Params) -> ScaleByPathLearningRateState:
        del params
        count, dtype = jnp.zeros((), jnp.int32), dtypes.scalar_dtype()
        # Copies: donating the state must not delete the caller's arrays.
        values = tuple(jnp.array(value, dtype) for value in rates_at(count))
        return ScaleByPathLearningRateState(count, values)

    def update(
        updates: Updates, state: State, params: Params | None = None, **_: Any
    ) -> tuple[Updates, State]:
        if type(state) is not ScaleByPathLearningRateState or len(state.rates) != len(rates):
            raise wrong_state(init, updates, state, params)
        values = rates_at(state.count)

        def scale(path: Path, g: jax.Array) -> jax.Array:
            dtype = dtypes.real_dtype(g.dtype)
            return dtypes.scale(g, dtypes.as_scalar(-values[choose(path)], dtype))

        updates = trees.map_leaves(scale, updates)
        kept = zip(values, state.rates, strict=True)
        new = tuple(jnp.array(value, jnp.result_type(old)) for value, old in kept)
        return updates, ScaleByPathLearningRateState(numerics.increment(state.count), new)

    return optax.GradientTransformationExtraArgs(init, update)
