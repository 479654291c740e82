"""Parameters selected by patterns in their path: masks, groups, learning rates."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms import _arguments, _numerics, _trees

Patterns = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]
"""One regular expression or several; a path matches when `re.search` finds any of them in it."""


def compile_patterns(name: str, patterns: Any) -> tuple[re.Pattern[str], ...]:
    """Compiled `patterns`; the errors name the argument and the pattern."""
    patterns = [patterns] if isinstance(patterns, str | re.Pattern) else patterns
    if not isinstance(patterns, Sequence) or not all(
        isinstance(p, str | re.Pattern) for p in patterns
    ):
        raise TypeError(f"{name} must be a pattern or a list of patterns, got {patterns!r}")
    if not patterns:
        raise ValueError(f"{name} must hold at least one pattern, got none")
    try:
        return tuple(re.compile(p) for p in patterns)
    except re.error as error:
        raise ValueError(
            f"{name} holds {error.pattern!r}, no regular expression: {error}"
        ) from error


class Rules(NamedTuple):
    """Groups of patterns in order; a path belongs to the first group that matches it."""

    groups: tuple[tuple[re.Pattern[str], ...], ...]

    def index(self, path: str) -> int:
        """The first group that matches `path`; ``len(groups)`` if none does."""
        for i, group in enumerate(self.groups):
            if any(pattern.search(path) for pattern in group):
                return i
        return len(self.groups)

    def indices(self, tree: Any) -> Any:
        """`tree` with each leaf (None included) replaced by its group's index.

        Raises:
          ValueError: the tree has leaves, and a group matches none of them.
        """
        leaves, treedef = _trees.flatten_with_paths(tree)
        paths = [path for path, _ in leaves]
        for group in self.groups if paths else ():
            if not any(pattern.search(path) for path in paths for pattern in group):
                patterns = ", ".join(repr(pattern.pattern) for pattern in group)
                raise ValueError(f"no parameter matches {patterns}; the paths are {_listed(paths)}")
        return treedef.unflatten([self.index(path) for path in paths])


def selector(name: str, selection: Any) -> Callable[[Sequence[tuple[str, Any]]], set[int]]:
    """From (path, leaf) pairs to the positions of the selected ones, which may not be scalars.

    Args:
      name: what the selection is called in an error.
      selection: one regular expression or several, each of which must match something, or a
        predicate ``(path, leaf) -> bool``.
    """
    patterns = () if callable(selection) else compile_patterns(name, selection)

    def select(leaves: Sequence[tuple[str, Any]]) -> set[int]:
        chosen = set()
        if callable(selection):
            chosen = {i for i, leaf in enumerate(leaves) if selection(*leaf)}
        for pattern in patterns:
            hits = {i for i, (path, _) in enumerate(leaves) if pattern.search(path)}
            if leaves and not hits:
                paths = _listed([path for path, _ in leaves])
                raise ValueError(
                    f"no leaf matches {pattern.pattern!r} of {name}; the paths are {paths}"
                )
            chosen |= hits
        for i in chosen:
            path, leaf = leaves[i]
            if jnp.ndim(leaf) == 0:
                raise ValueError(f"{path!r} is selected by {name}, but is a scalar")
        return chosen

    return select


def parse_rules(rules: Any) -> tuple[Rules, list[Any]]:
    """Splits ``[(patterns, value), ...]`` into the compiled rules and their values."""
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise TypeError(f"rules must be a list of (patterns, value) pairs, got {rules!r}")
    groups, values = [], []
    for i, rule in enumerate(rules):
        if not isinstance(rule, tuple | list) or len(rule) != 2:
            raise TypeError(f"rules[{i}] must be a (patterns, value) pair, got {rule!r}")
        groups.append(compile_patterns(f"rules[{i}]", rule[0]))
        values.append(rule[1])
    return Rules(tuple(groups)), values


def path_mask(patterns: Patterns, *, exclude: bool = False) -> Callable[[Any], Any]:
    """A mask by path, for `optax.masked`, `optax.add_decayed_weights` or `adamw`.

    Args:
      patterns: one regular expression or several, searched for in each leaf's path.
      exclude: select the leaves that match none of them instead.

    Returns:
      A function from a tree to booleans in its structure: True where the leaf is selected.

    Raises:
      ValueError: a pattern is no regular expression; when called, no leaf matches.

    >>> mask = path_mask(["bias$", "norm/"], exclude=True)
    >>> mask({"kernel": 1.0, "bias": 2.0, "norm": {"scale": 1.0}})
    {'bias': False, 'kernel': True, 'norm': {'scale': False}}
    """
    rules = Rules((compile_patterns("patterns", patterns),))
    exclude = _arguments.flag("exclude", exclude)

    def mask(tree: Any) -> Any:
        return jax.tree.map(lambda index: (index == 0) != exclude, rules.indices(tree))

    return mask


def by_path(
    rules: Sequence[tuple[Patterns, optax.GradientTransformation]],
    default: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Parameter groups: a transformation for each group of paths.

    Args:
      rules: (patterns, transformation) pairs; a parameter gets the first whose patterns match its
        path.
      default: for the parameters that no rule matches.

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
        i: _arguments.transformation(f"rules[{i}]", inner)
        for i, inner in enumerate(transformations)
    }
    groups[len(groups)] = _arguments.transformation("default", default)
    return optax.multi_transform(groups, compiled.indices)


class ScaleByPathLearningRateState(NamedTuple):
    """State of `scale_by_path_learning_rate`.

    Attributes:
      count: int32 (), the number of steps taken.
      rates: the learning rates of the last step, before it those of the first: a scalar of the
        widest float (`jnp.result_type(float)`) for each rule in order, and the default's.
    """

    count: jax.Array
    rates: tuple[jax.Array, ...]


def scale_by_path_learning_rate(
    rules: Sequence[tuple[Patterns, optax.ScalarOrSchedule]],
    default: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each update by minus the learning rate of its path.

    Args:
      rules: (patterns, learning rate) pairs; a parameter gets the first whose patterns match its
        path. A learning rate is a number, a scalar array, or a schedule ``count -> value`` read at
        the number of steps taken before this one.
      default: the learning rate where no rule matches.

    Returns:
      A transformation with `ScaleByPathLearningRateState`, from which `metrics` tells the rates;
      updates keep their dtype. Like `optax.scale_by_learning_rate` it flips the sign, so it comes
      where that one would.

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
        _arguments.scalar_or_schedule(name, rate)
        for name, rate in zip(
            [f"rules[{i}]" for i in range(len(rates))] + ["default"], [*rates, default], strict=True
        )
    ]

    scale = scale_by_chosen_rate(compiled.index, rates)

    def init(params: Any) -> Any:
        compiled.indices(params)  # a rule that matches nothing is an error from the start
        return scale.init(params)

    return optax.GradientTransformationExtraArgs(init, scale.update)


def scale_by_chosen_rate(
    choose: Callable[[str], int], rates: Sequence[Any]
) -> optax.GradientTransformationExtraArgs:
    """Each leaf times minus the learning rate, a number or a schedule, that its path chooses."""

    def rates_at(count: jax.Array) -> list[Any]:
        return [_numerics.as_scalar(_arguments.at_count(rate, count)) for rate in rates]

    def kept(values: Sequence[Any]) -> tuple[jax.Array, ...]:
        # Copies: whoever donates the state must not delete the caller's arrays.
        return tuple(jnp.array(value, _numerics.scalar_dtype()) for value in values)

    def init(params: Any) -> ScaleByPathLearningRateState:
        del params
        count = jnp.zeros((), jnp.int32)
        return ScaleByPathLearningRateState(count, kept(rates_at(count)))

    def update(updates: Any, state: Any, params: Any = None, **_: Any):
        del params
        now = rates_at(state.count)

        def scale(path: str, g: jax.Array) -> jax.Array:
            dtype = _numerics.real_dtype(g.dtype)
            return _numerics.scale(g, _numerics.as_scalar(-now[choose(path)], dtype))

        updates = _trees.map_leaves(scale, updates)
        count = _numerics.increment(state.count)
        return updates, ScaleByPathLearningRateState(count, kept(now))

    return optax.GradientTransformationExtraArgs(init, update)


def _listed(paths: Sequence[str], most: int = 8) -> str:
    """The first paths, for an error message."""
    shown = ", ".join(repr(path) for path in paths[:most])
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
