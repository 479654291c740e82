"""Comparing an optimizer state with the state that a configuration makes."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adam_transforms._core import trees
from adam_transforms._core.sparse_rows import is_rows
from adam_transforms._core.state_layout import TABLE, Role, fields_of, walk
from adam_transforms._core.types import Params, Path, State, Updates

HEADING = "the state is not as this configuration makes it:"
# Of an error that `update` raises: the first differences tell which configuration differs.
_MOST_LINES = 4


def wrong_state(
    init: Callable[[Params], State],
    updates: Updates,
    state: State,
    params: Params | None,
    expected: State = None,
) -> ValueError:
    """The error of an `update` that got a state that its `init` does not make.

    Args:
      init: the transformation's own.
      updates, state, params: the arguments of `update`.
      expected: what `init` makes, if that is known.
    """
    own, *others = (jax.tree.structure(x, is_leaf=trees.is_leaf) for x in (state, updates, params))
    if state is not None and not holds_states(state) and own in others:
        return ValueError(
            f"{HEADING}\n  it is a tree like the parameters\n"
            "update takes (gradients, state, params), in this order"
        )
    if expected is None:
        expected = _made_by(init, updates if params is None else params)
    lines = []
    if expected is not None:
        found = trees.other_container(state, expected)
        lines += ["{} is {}, expected {}".format(*found)] if found else []
        lines += differences(state, expected, with_dtypes=False)
    listed = "\n  ".join([HEADING, *shortened(lines, _MOST_LINES)])
    return ValueError(f"{listed}\n{_remedy(state)}")


def holds_states(tree: Any) -> bool:
    """Whether a tree has a transformation's state in it, not only containers and arrays."""
    return any(type(node) in TABLE for _, node in walk(tree))


def _remedy(state: State) -> str:
    roles = {field.role for _, node in walk(state) for field in fields_of(type(node)).values()}
    if not roles:
        return "Pass what init(params) or the last update returned; restore a checkpoint into that"
    convert = "transfer_state(state, old_tx, new_tx, params) keeps what both have"
    if Role.LAST_STEP not in roles:
        return f"After a change of the configuration, {convert}; init(params) starts afresh"
    return (
        "After a change of the configuration (max_idle, weight decay, b1, ...), apply the pending "
        f"updates with params, state = flush(params, state); then {convert}"
    )


def has_shapes_of(state: State, expected: State) -> bool:
    """Whether a state has the structure and the shapes of another one. Dtypes may differ: each
    slot keeps its own."""
    leaves, treedef = jax.tree.flatten(state)
    expected_leaves, expected_treedef = jax.tree.flatten(expected)
    return treedef == expected_treedef and all(
        np.shape(x) == y.shape for x, y in zip(leaves, expected_leaves, strict=True)
    )


def _made_by(init: Callable[[Params], State], like: Any) -> State | None:
    """The state that `init` makes, abstract; None if it refuses the parameters."""
    try:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(trees.shape_of(x), trees.dtype_of(x)),
            like,
            is_leaf=is_rows,
        )
        return jax.eval_shape(init, shapes)
    except (TypeError, ValueError, AttributeError):
        return None


# ---- differences --------------------------------------------------------------------------------


def differences(state: State, like: State, *, with_dtypes: bool = True) -> list[str]:
    """A line for each path at which two trees of arrays, or descriptions of arrays, differ."""
    found, expected = _leaves(state), _leaves(like)
    hints = _hints(state, like)
    lines = []
    for path, leaf in expected.items():
        now = found.get(path, leaf)
        if str(now) != str(leaf) if with_dtypes else now.shape != leaf.shape:
            hint = f" ({hints[path]})" if path in hints else ""
            lines.append(f"{path!r} is {now}, expected {leaf}{hint}")
        elif path in hints:
            lines.append(f"{path!r}: {hints[path]}")
    lines += [f"{path!r}: {hint}" for path, hint in hints.items() if path not in expected]
    for path, leaf in _only_in(expected, found):
        lines.append(f"{path!r} is missing" + (f", expected {leaf}" if leaf else ""))
    for path, leaf in _only_in(found, expected):
        lines.append(f"{path!r} is {leaf or 'there'}, expected nothing")
    return lines


def shortened(lines: Sequence[str], most: int) -> list[str]:
    """The first `most` lines, and how many more there are."""
    rest = len(lines) - most
    return [*lines] if rest <= 0 else [*lines[:most], f"and {rest} more"]


class _Leaf(NamedTuple):
    """An array, a number, or a description of an array with a shape and a dtype."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape) if hasattr(self.value, "shape") else np.shape(self.value)

    @property
    def dtype(self) -> np.dtype:
        dtype = getattr(self.value, "dtype", None)
        return np.dtype(np.asarray(self.value).dtype if dtype is None else dtype)

    def __str__(self) -> str:
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]"

    def number(self) -> float | None:
        """The value of a scalar; None for any other array, and if the value is not known."""
        x = self.value
        is_known = isinstance(x, np.ndarray | np.generic | jax.Array)
        if not is_known or isinstance(x, Tracer) or self.shape:
            return None
        return float(x)


def _leaves(tree: Any) -> dict[Path, _Leaf]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {trees.path_str(keys): _Leaf(_key_data(x)) for keys, x in leaves}


def _key_data(x: Any) -> Any:
    """Of PRNG keys the array that checkpoints store, abstract; any other leaf as it is."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return x
    return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, dtype))


def _only_in(
    leaves: dict[Path, _Leaf], others: dict[Path, _Leaf]
) -> list[tuple[Path, _Leaf | None]]:
    """(path, leaf) for leaves, and (root, None) for whole subtrees, that `others` does not have."""
    known = {prefix for path in others for prefix in ("", *_prefixes(path))}
    only: dict[Path, _Leaf | None] = {}
    for path, leaf in leaves.items():
        if path not in others:
            root = next((prefix for prefix in _prefixes(path) if prefix not in known), path)
            only[root] = leaf if root == path else None
    return list(only.items())


def _prefixes(path: Path) -> list[Path]:
    """The paths of the nodes from below the root down to `path` itself."""
    keys = path.split("/")
    return ["/".join(keys[:n]) for n in range(1, len(keys) + 1)]


def _hints(state: State, like: State) -> dict[Path, str]:
    """{path: the hyperparameter that differs}, for the states that keep hyperparameters: those with
    arrays that belong to no single parameter (`Role.SHARED`, the history of `deferred_adam`)."""
    found, expected = _leaves(state), _leaves(like)
    hints, named = {}, set()
    histories = walk(like, stop=lambda place, _: place.role is Role.SHARED)
    for history in [str(place) for place, _ in histories if place.role is Role.SHARED]:
        for path in (f"{history}/weights", f"{history}/log_decay"):
            old, new = (x[path].shape[0] - 1 if path in x else None for x in (found, expected))
            if None not in (old, new) and old != new:
                hints[path] = f"max_idle was {old}, is {new}"
        for path in expected:
            parent, _, field = path.rpartition("/")
            if parent != f"{history}/scalars" or path not in found:
                continue
            old, new = found[path].number(), expected[path].number()
            if old is not None and new is not None and old != new:
                name = field.removeprefix("log_")
                old, new = (math.exp(x) if name != field else x for x in (old, new))
                hints[path] = f"{name} was {old:.6g}, is {new:.6g}"
                named.add(f"{history}/settings/{name}")
    settings = _settings(state)
    for path, new in _settings(like).items():
        if settings.get(path, new) != new and path not in named:
            name = path.rpartition("/")[2]
            hints[path] = f"{name} was {settings[path]}, is {new}"
    return hints


def _settings(state: State) -> dict[Path, str]:
    """{path of a setting: value}, from the keys ``name=value`` without a leaf, which make settings
    a part of a state's structure."""
    nodes = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: x is None)[0]
    matches = [re.fullmatch(r"(.*\bsettings/\w+)=(.*)", trees.path_str(keys)) for keys, _ in nodes]
    return {match[1]: match[2] for match in matches if match}
