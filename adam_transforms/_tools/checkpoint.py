"""Whether a restored state is of the configuration that goes on with it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adam_transforms._core import trees
from adam_transforms._embeddings.deferred.chebyshev import Scalars
from adam_transforms._embeddings.deferred.state import IdleRows

_MOST_LINES = 30


def check_state(state: Any, like: Any) -> None:
    """Refuses a state that another configuration has made, and names every difference.

    What restores a checkpoint may cast one dtype to another in silence, take arrays of any shape,
    or refuse them without saying which. This compares what is at each path: whether it is there,
    its shape and its dtype, and of `deferred_adam` the decay rates and epsilon that its rows are
    owed by.

    Args:
      state: what was restored, or is about to be: any tree of arrays, of `jax.ShapeDtypeStruct` or
        of Orbax's metadata, e.g. a state, or ``{"params": params, "state": state}``.
      like: a tree of the same paths as the present configuration makes it, e.g.
        ``tx.init(params)``; under `jax.eval_shape` only shapes and dtypes are compared.

    Raises:
      ValueError: they differ; names the paths, what was found and what was expected.

    Containers may differ in kind, for checkpoints keep a NamedTuple as a dictionary. PRNG keys
    count as the ``uint32`` that they are kept as.

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
    for path, wanted in expected.items():
        if path in found and str(found[path]) != str(wanted):
            hint = f" ({hints[path]})" if path in hints else ""
            lines.append(f"{path!r} is {found[path]}, expected {wanted}{hint}")
        elif path in hints:
            lines.append(f"{path!r}: {hints[path]}")
    for path, wanted in _only_in(expected, found):
        lines.append(f"{path!r} is missing" + (f", expected {wanted}" if wanted else ""))
    for path, leaf in _only_in(found, expected):
        lines.append(f"{path!r} is {leaf or 'there'}, expected nothing")
    if not lines:
        return
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} more"]
    raise ValueError("\n  ".join(["the state is not as this configuration makes it:", *lines]))


class _Leaf(NamedTuple):
    """An array, or what stands for one: a shape and a dtype."""

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
        """The number that it is, if it is one and known now."""
        x = self.value
        is_known = isinstance(x, np.ndarray | np.generic | jax.Array)
        if not is_known or isinstance(x, Tracer) or self.shape:
            return None
        return float(x)


def _leaves(tree: Any) -> dict[str, _Leaf]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {trees.path_str(path): _Leaf(x) for path, x in leaves}


def _only_in(leaves: dict[str, _Leaf], others: dict[str, _Leaf]) -> list[tuple[str, _Leaf | None]]:
    """What is in `leaves` where `others` have nothing: arrays, and the topmost paths of trees."""
    known = {"/".join(keys[:n]) for keys in _keys(others) for n in range(len(keys) + 1)}
    only: dict[str, _Leaf | None] = {}
    for (path, leaf), keys in zip(leaves.items(), _keys(leaves), strict=True):
        if path in others:
            continue
        tops = ("/".join(keys[:n]) for n in range(1, len(keys) + 1))
        top = next((top for top in tops if top not in known), path)
        only[top] = leaf if top == path else None
    return list(only.items())


def _keys(leaves: dict[str, _Leaf]) -> list[list[str]]:
    return [path.split("/") for path in leaves]


def _hints(found: dict[str, _Leaf], expected: dict[str, _Leaf], like: Any) -> dict[str, str]:
    """For the paths where deferred rows differ, what of the configuration does."""

    def is_idle_rows(x: Any) -> bool:
        return isinstance(x, IdleRows)

    hints = {}
    for key_path, group in jax.tree_util.tree_flatten_with_path(like, is_leaf=is_idle_rows)[0]:
        if not is_idle_rows(group):
            continue
        ring = trees.path_str((*key_path, jax.tree_util.GetAttrKey("ring")))
        for path in (f"{ring}/weights", f"{ring}/log_decay"):
            was, now = (x[path].shape[0] - 1 if path in x else None for x in (found, expected))
            if None not in (was, now) and was != now:
                hints[path] = f"max_idle was {was}, is {now}"
        for name in Scalars._fields:
            path = f"{ring}/scalars/{name}"
            was, now = (x[path].number() if path in x else None for x in (found, expected))
            if was is not None and now is not None and was != now:
                is_log = name.startswith("log_")
                was, now = (math.exp(x) if is_log else x for x in (was, now))
                hints[path] = f"{name.removeprefix('log_')} was {was:.6g}, is {now:.6g}"
    return hints
