"""Parameters of two systems matched by name, and the transposes between them.

A state is written here as ``{parameter: {slot: array}}``, with our names of the slots.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Rename = Callable[[str], Any]
"""From the path of a parameter to its name there, or to (name, axes): with
``their_array.transpose(axes)`` the array is ours."""

Slots = Mapping[str, Mapping[str, Any]]


class Name(NamedTuple):
    """What a parameter is called there, and how its arrays are transposed on the way here."""

    name: str
    axes: tuple[int, ...] | None


def bring(
    theirs: Slots, ours: Slots, rename: Rename | None, label: Callable[[str, str], str]
) -> dict[str, dict[str, np.ndarray]]:
    """Their arrays under our paths, transposed, in our dtypes. The arrays are fresh copies.

    Args:
      theirs: what they have; a parameter may be there without slots.
      ours: what is needed, leaves that tell shape and dtype.
      rename: None if the paths are the names.
      label: what they call a slot of a parameter, for errors.

    Raises:
      ValueError: lists all that is missing, left over, of another shape, named twice, or of values
        that our dtype does not hold.
    """
    names = _names(ours, rename)
    problems = _named_twice(names)
    brought: dict[str, dict[str, np.ndarray]] = {path: {} for path in ours}
    for path, slots in ours.items():
        name, axes = names[path]
        if name not in theirs:
            problems.append(f"{path!r} is to be {name!r} there, which is missing")
            continue
        for slot, like in slots.items():
            if slot not in theirs[name]:
                problems.append(f"{path!r} needs {label(name, slot)}, which is missing")
                continue
            array = as_array(label(name, slot), theirs[name][slot])
            fitted = _fitted(array, axes, like)
            if isinstance(fitted, str):
                problems.append(f"{label(name, slot)}, for {path!r}, {fitted}")
            else:
                brought[path][slot] = fitted
        for slot in theirs[name].keys() - slots.keys():
            problems.append(f"{label(name, slot)} is left over: {path!r} keeps no {slot}")
    known = {name for name, _ in names.values()}
    problems += [
        f"{name!r} is left over: it is no parameter's name"
        for name, slots in theirs.items()
        if name not in known and slots
    ]
    if problems:
        raise ValueError(_listed("the two states do not match", problems))
    return brought


def send(ours: Slots, rename: Rename | None) -> dict[str, dict[str, np.ndarray]]:
    """Our arrays under their names, transposed back. The arrays are fresh copies.

    Raises:
      ValueError: lists the names that are given twice, and axes that fit no array.
    """
    names = _names(ours, rename)
    problems = _named_twice(names)
    sent: dict[str, dict[str, np.ndarray]] = {}
    for path, slots in ours.items():
        name, axes = names[path]
        sent[name] = {}
        for slot, array in slots.items():
            array = np.asarray(array)
            if axes is not None:
                if sorted(axes) != list(range(array.ndim)):
                    problems.append(_no_axes(path, axes, array))
                    break
                array = array.transpose(np.argsort(axes))
            sent[name][slot] = np.array(array, order="C")
    if problems:
        raise ValueError(_listed("the parameters cannot be named", problems))
    return sent


def checked_names(names: Any, expected: int, where: str) -> list[str]:
    """The names of all parameters there, in their order.

    Raises:
      TypeError, ValueError: they are no strings, not `expected` of them, or not all different.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names must be a list of strings, got {names!r}")
    names = list(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a list of strings, got {names!r}")
    if len(names) != expected:
        raise ValueError(f"names must be as many as {where}, {expected}, got {len(names)}: {names}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names must be different, got more than one of {twice}")
    return names


def positions(count: int) -> list[str]:
    """The names of parameters that are known by position alone."""
    return [str(i) for i in range(count)]


def in_order(sent: Iterable[str], names: Any, where: str) -> list[str]:
    """The names in their order there; without `names` they must be positions.

    Raises:
      ValueError: they are no positions, or not among `names`.
    """
    sent = list(sent)
    if names is None:
        if set(sent) != set(positions(len(sent))):
            raise ValueError(
                f"pass names, in the order of {where}, which goes by position; "
                f"the parameters are {sent}"
            )
        return positions(len(sent))
    names = list(names)
    names = checked_names(names, len(names), where)
    unknown = [name for name in sent if name not in names]
    if unknown:
        raise ValueError(f"names lack {unknown}; they are {names}")
    return names


def as_array(label: str, value: Any) -> np.ndarray:
    """A NumPy array of whatever holds numbers: a JAX array, a tensor, an HDF5 data set."""
    if hasattr(value, "detach"):  # a tensor of PyTorch, which NumPy cannot read off a device
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float().numpy().astype(jnp.bfloat16)
    stored = getattr(value, "attrs", {}).get("dtype")
    array = np.asarray(value)
    if stored == "bfloat16":  # HDF5 knows it as two bytes
        array = array.view(jnp.bfloat16) if array.dtype.kind == "V" else array.astype(jnp.bfloat16)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise TypeError(f"{label} must be an array of numbers, got {value!r:.80}")
    return array


def as_count(label: str, value: Any) -> int:
    """A number of steps, kept as a scalar of whatever dtype."""
    array = as_array(label, value)
    if array.shape != () or np.iscomplexobj(array):
        raise ValueError(f"{label} must be a scalar, got {array.dtype}{list(array.shape)}")
    number = float(array)
    if not (number.is_integer() and 0 <= number < 2**31):
        raise ValueError(f"{label} must be an integer in [0, 2^31), got {number:g}")
    return int(number)


def _names(paths: Iterable[str], rename: Rename | None) -> dict[str, Name]:
    """What each path is called there."""
    return {path: Name(path, None) if rename is None else _name(path, rename) for path in paths}


def _name(path: str, rename: Rename) -> Name:
    given = rename(path)
    if isinstance(given, str):
        return Name(given, None)
    if isinstance(given, Sequence) and len(given) == 2:
        name, axes = given
        if isinstance(name, str) and isinstance(axes, Sequence):
            if all(isinstance(axis, int) for axis in axes):
                return Name(name, tuple(axes))
    raise TypeError(f"rename must return a name or (name, axes), got {given!r} for {path!r}")


def _named_twice(names: Mapping[str, Name]) -> list[str]:
    by_name: dict[str, list[str]] = {}
    for path, (name, _) in names.items():
        by_name.setdefault(name, []).append(path)
    return [
        f"{' and '.join(map(repr, paths))} are all to be {name!r} there"
        for name, paths in by_name.items()
        if len(paths) > 1
    ]


def _fitted(array: np.ndarray, axes: tuple[int, ...] | None, like: Any) -> np.ndarray | str:
    """The array transposed and in the dtype of `like`, or why that cannot be."""
    if axes is not None:
        if sorted(axes) != list(range(array.ndim)):
            return f"has shape {list(array.shape)}, of which {axes} are not the axes"
        array = array.transpose(axes)
    if array.shape != like.shape:
        turned = "" if axes is None else " once transposed"
        hint = ""
        if axes is None and array.ndim > 1 and sorted(array.shape) == sorted(like.shape):
            hint = "; if it is the same transposed, rename can return (name, axes)"
        return f"has shape {list(array.shape)}{turned}, expected {list(like.shape)}{hint}"
    cast = _cast(array, like.dtype)
    if cast is None:
        return (
            f"has {array.dtype} values that {like.dtype}, in which the state keeps them, does not "
            "hold; round the array first if that is meant"
        )
    return cast


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray | None:
    """A copy in `dtype`; None if that would lose anything."""
    if np.iscomplexobj(array) and not jnp.issubdtype(dtype, jnp.complexfloating):
        return None
    with np.errstate(all="ignore"):
        cast = np.array(array, dtype, order="C")
        back = cast.astype(array.dtype)
    return cast if np.all((back == array) | (array != array)) else None


def _no_axes(path: str, axes: tuple[int, ...], array: np.ndarray) -> str:
    return f"{path!r} has shape {list(array.shape)}, of which {axes} are not the axes"


def _listed(what: str, problems: Sequence[str]) -> str:
    return f"{what}:\n" + "\n".join(f"  {problem}" for problem in problems)
