"""Comparing a restored state with the state of the current configuration."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adam_transforms._core import trees
from adam_transforms._core.state_layout import Role, walk
from adam_transforms._core.types import Path, State
from adam_transforms._embeddings.deferred.chebyshev import Scalars

_MOST_LINES = 30


def check_state(state: State, like: State) -> None:
    """Refuses a state that another configuration has made; names every difference.

    A checkpoint library may cast dtypes silently, accept arrays of any shape, or refuse them
    without their paths. This function compares all paths, shapes and dtypes, and for
    `deferred_adam` the decay rates and epsilon of the pending updates.

    Args:
      state: the restored state, or its description: any tree of arrays, `jax.ShapeDtypeStruct` or
        Orbax metadata, e.g. a state, or ``{"params": params, "state": state}``.
      like: the same tree from the current configuration, e.g. ``tx.init(params)``. If it comes from
        `jax.eval_shape`, only paths, shapes and dtypes are compared.

    Raises:
      ValueError: the trees differ; names the paths, the found and the expected arrays.

    Containers may differ in type, because checkpoints store a NamedTuple as a dictionary. PRNG keys
    are compared as the ``uint32`` arrays that checkpoints store.

    >>> import jax.numpy as jnp
    >>> from adam_transforms import adam
    >>> params = {"w": jnp.zeros(3)}
    >>> check_state(adam().init(params), like=adam(1e-4).init(params))
    >>> check_state(adam().init(params), like=adam(mu_dtype="bfloat16", amsgrad=True).init(params))
    Traceback (most recent call last):
        ...
    ValueError: the state is not as this configuration makes it:
      '0/mu/w' is float32[3], expected bfloat16[3]
      '0/nu_max' is missing
    """
    found, expected = _leaves(state), _leaves(like)
    hints = _hints(found, expected, like)
    lines = []
    for path, leaf in expected.items():
        if path in found and str(found[path]) != str(leaf):
            hint = f" ({hints[path]})" if path in hints else ""
            lines.append(f"{path!r} is {found[path]}, expected {leaf}{hint}")
        elif path in hints:
            lines.append(f"{path!r}: {hints[path]}")
    for path, leaf in _only_in(expected, found):
        lines.append(f"{path!r} is missing" + (f", expected {leaf}" if leaf else ""))
    for path, leaf in _only_in(found, expected):
        lines.append(f"{path!r} is {leaf or 'there'}, expected nothing")
    if not lines:
        return
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} more"]
    raise ValueError("\n  ".join(["the state is not as this configuration makes it:", *lines]))


class _Leaf(NamedTuple):
    """An array, a number, or a description of an array with a shape and a dtype."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape) if hasattr(self.value, "shape") else np.shape(self.value)

    def __str__(self) -> str:
        shape, dtype = self.shape, getattr(self.value, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
            key = jax.ShapeDtypeStruct(shape, dtype)
            return str(_Leaf(jax.eval_shape(jax.random.key_data, key)))
        name = np.dtype(np.asarray(self.value).dtype if dtype is None else dtype).name
        return f"{name}[{','.join(map(str, shape))}]"

    def number(self) -> float | None:
        """The value of a scalar; None for any other array, and if the value is not known."""
        x = self.value
        is_known = isinstance(x, np.ndarray | np.generic | jax.Array)
        if not is_known or isinstance(x, Tracer) or self.shape:
            return None
        return float(x)


def _leaves(tree: Any) -> dict[Path, _Leaf]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {trees.path_str(keys): _Leaf(x) for keys, x in leaves}


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


def _hints(found: dict[Path, _Leaf], expected: dict[Path, _Leaf], like: Any) -> dict[Path, str]:
    """{path: the hyperparameter of `deferred_adam` that differs}."""

    hints = {}
    for place, _ in walk(like, stop=lambda place, _: place.role is Role.SHARED):
        if place.role is not Role.SHARED:
            continue
        history = str(place)
        for path in (f"{history}/weights", f"{history}/log_decay"):
            old, new = (x[path].shape[0] - 1 if path in x else None for x in (found, expected))
            if None not in (old, new) and old != new:
                hints[path] = f"max_idle was {old}, is {new}"
        for name in Scalars._fields:
            path = f"{history}/scalars/{name}"
            old, new = (x[path].number() if path in x else None for x in (found, expected))
            if old is not None and new is not None and old != new:
                is_log = name.startswith("log_")
                old, new = (math.exp(x) if is_log else x for x in (old, new))
                hints[path] = f"{name.removeprefix('log_')} was {old:.6g}, is {new:.6g}"
    return hints
