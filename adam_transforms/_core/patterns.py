"""Selecting parameters by regular expressions in their paths."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from adam_transforms._core import trees
from adam_transforms._core.types import Path

Patterns = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]
"""One or several regular expressions; a path matches if `re.search` finds any of them in it.

They are trusted: a hostile expression can take exponential time.
"""

Selection = Patterns | Callable[[Path, Any], bool]
"""Which parameters: patterns of their paths, or a predicate ``(path, leaf) -> bool``."""


def compile_patterns(name: str, patterns: Any) -> tuple[re.Pattern[str], ...]:
    """Compiles `patterns`; errors name the argument and the pattern."""
    patterns = [patterns] if isinstance(patterns, str | re.Pattern) else patterns
    if not isinstance(patterns, Sequence) or not all(
        isinstance(p, str | re.Pattern) for p in patterns
    ):
        raise TypeError(f"{name} must be a pattern or a list of patterns, got {patterns!r:.200}")
    if not patterns:
        raise ValueError(f"{name} must hold at least one pattern, got none")
    try:
        return tuple(re.compile(p) for p in patterns)
    except re.error as error:
        raise ValueError(
            f"{name} holds {error.pattern!r}, which is no regular expression: {error}"
        ) from error


class Rules(NamedTuple):
    """Ordered groups of patterns; a path belongs to the first group that matches it."""

    groups: tuple[tuple[re.Pattern[str], ...], ...]

    def index(self, path: Path) -> int:
        """The index of the first group that matches `path`; ``len(groups)`` if none does."""
        for i, group in enumerate(self.groups):
            if any(pattern.search(path) for pattern in group):
                return i
        return len(self.groups)

    def indices(self, tree: Any) -> Any:
        """Replaces each leaf of `tree`, None included, by the index of its group.

        Raises:
          ValueError: the tree has leaves, and a group matches none of them; several leaves have
            the path that a group matches.
        """
        leaves, treedef = trees.flatten_with_paths(tree)
        paths = [path for path, _ in leaves]
        for group in self.groups if paths else ():
            if not any(pattern.search(path) for path in paths for pattern in group):
                patterns = ", ".join(repr(pattern.pattern) for pattern in group)
                raise ValueError(
                    f"no parameter matches {patterns}; the paths are {_format_paths(paths)}"
                )
        chosen = [self.index(path) for path in paths]
        selected = [p for p, i in zip(paths, chosen, strict=True) if i < len(self.groups)]
        trees.refuse_equal_paths(paths, selected)
        return treedef.unflatten(chosen)


Leaves = Sequence[tuple[Path, Any]]
"""The leaves of one tree with their paths."""


def selector(name: str, selection: Any) -> Callable[..., set[int]]:
    """A function from the `Leaves` of a tree, or of several, to the positions of the selected ones
    among all of them.

    Args:
      name: the name of the selection in errors.
      selection: one or several regular expressions, each of which must match a leaf, or a predicate
        ``(path, leaf) -> bool``. A selected scalar is an error, and so is a selected path that
        several leaves have.
    """
    patterns = () if callable(selection) else compile_patterns(name, selection)

    def select(*of_trees: Leaves) -> set[int]:
        leaves = [leaf for of_tree in of_trees for leaf in of_tree]
        chosen = set()
        if callable(selection):
            chosen = {i for i, leaf in enumerate(leaves) if selection(*leaf)}
        for pattern in patterns:
            hits = {i for i, (path, _) in enumerate(leaves) if pattern.search(path)}
            if leaves and not hits:
                paths = _format_paths([path for path, _ in leaves])
                raise ValueError(
                    f"no leaf matches {pattern.pattern!r} of {name}; the paths are {paths}"
                )
            chosen |= hits
        start = 0
        for of_tree in of_trees:
            paths = [path for path, _ in of_tree]
            trees.refuse_equal_paths(paths, [p for i, p in enumerate(paths, start) if i in chosen])
            start += len(paths)
        for i in chosen:
            path, leaf = leaves[i]
            if jnp.ndim(leaf) == 0:
                raise ValueError(f"{trees.quoted(path)} is selected by {name}, but is a scalar")
        return chosen

    return select


def parse_rules(rules: Any) -> tuple[Rules, list[Any]]:
    """Splits ``[(patterns, value), ...]`` into compiled rules and their values."""
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise TypeError(f"rules must be a list of (patterns, value) pairs, got {rules!r:.200}")
    groups, values = [], []
    for i, rule in enumerate(rules):
        if not isinstance(rule, tuple | list) or len(rule) != 2:
            raise TypeError(f"rules[{i}] must be a (patterns, value) pair, got {rule!r:.200}")
        groups.append(compile_patterns(f"rules[{i}]", rule[0]))
        values.append(rule[1])
    return Rules(tuple(groups)), values


def _format_paths(paths: Sequence[Path], most: int = 8) -> str:
    """The first `most` paths, for an error message."""
    shown = ", ".join(map(trees.quoted, paths[:most]))
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
