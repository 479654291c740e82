"""Matches the parameters of two systems by name, and transposes their slots.

Slots are held as ``{parameter: {slot: array}}`` with this package's names of the slots.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adam_transforms._core.types import Path
from adam_transforms.interop import _hdf5

# The slots that are means of squares. A value that is negative or not finite would stay in them.
_SQUARES = ("nu", "nu_max")

Rename = Callable[[Path], Any]
"""Maps the path of a parameter to its name in the other system, or to (name, axes), where
``other_array.transpose(axes)`` has the layout of the parameter."""

Slots = Mapping[str, Mapping[str, Any]]


class Name(NamedTuple):
    """A parameter's name in the other system, and the axes that transpose its arrays to ours."""

    name: str
    axes: tuple[int, ...] | None


def import_slots(
    source: Slots, target: Slots, rename: Rename | None, label: Callable[[str, str], str]
) -> dict[Path, dict[str, np.ndarray]]:
    """The arrays of `source` by path, transposed, cast to the dtypes of `target`, and copied.

    Args:
      source: the slots of the other system; a parameter may have none.
      target: {path: {slot: leaf}}, the expected slots; a leaf gives shape and dtype.
      rename: None if each path is the name.
      label: maps (name, slot) to the other system's name of the slot, for errors.

    Raises:
      ValueError: lists all slots that are missing, left over, of another shape or not representable
        in the dtype of `target`, second moments that are negative or not finite, and names that
        several paths share.
    """
    names = _names(target, rename)
    problems = _shared_names(names)
    imported: dict[Path, dict[str, np.ndarray]] = {path: {} for path in target}
    for path, slots in target.items():
        name, axes = names[path]
        if name not in source:
            problems.append(f"{path!r} needs the parameter {name!r}, which is missing")
            continue
        for slot, like in slots.items():
            if slot not in source[name]:
                problems.append(f"{path!r} needs {label(name, slot)}, which is missing")
                continue
            value = source[name][slot]
            converted = _shape_problem(_shape(value), axes, like.shape)  # before a file is read
            if converted is None:
                array = as_array(label(name, slot), value)
                converted = _convert(array, slot, axes, like.dtype)
            if isinstance(converted, str):
                problems.append(f"{label(name, slot)}, for {path!r}, {converted}")
            else:
                imported[path][slot] = converted
        for slot in source[name].keys() - slots.keys():
            problems.append(f"{label(name, slot)} is left over: {path!r} has no slot {slot}")
    known = {name for name, _ in names.values()}
    problems += [
        f"{name!r} is left over: no path maps to it"
        for name, slots in source.items()
        if name not in known and slots
    ]
    if problems:
        raise ValueError(_bullet_list("the two states do not match", problems))
    return imported


def export_slots(slots: Slots, rename: Rename | None) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of `slots` by the other system's names, transposed to its layout and copied.

    Raises:
      ValueError: lists names that several paths share, and axes that are no permutation.
    """
    names = _names(slots, rename)
    problems = _shared_names(names)
    exported: dict[str, dict[str, np.ndarray]] = {}
    for path, arrays in slots.items():
        name, axes = names[path]
        exported[name] = {}
        for slot, array in arrays.items():
            array = np.asarray(array)
            if axes is not None:
                if not _is_permutation(axes, array.ndim):
                    problems.append(f"{path!r} {_axes_problem(array.shape, axes)}")
                    break
                array = array.transpose(np.argsort(axes))
            exported[name][slot] = np.array(array, order="C")
    if problems:
        raise ValueError(_bullet_list("rename does not fit the parameters", problems))
    return exported


def checked_names(names: Any, expected: int, where: str) -> list[str]:
    """`names` as a list of `expected` different strings.

    Args:
      names: the names of all parameters in the order of the other system.
      expected: their number.
      where: what they name, for errors.

    Raises:
      TypeError, ValueError: they are no strings, have another number, or are not distinct.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names must be a list of strings, got {names!r}")
    names = list(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a list of strings, got {names!r}")
    if len(names) != expected:
        raise ValueError(
            f"names must be {expected}, one for each of {where}, got {len(names)}: {names}"
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"names must be distinct, got more than one of {repeated}")
    return names


def positions(count: int) -> list[str]:
    """The names "0", "1", ... of parameters that only have a position."""
    return [str(i) for i in range(count)]


def in_order(exported: Iterable[str], names: Any, where: str) -> list[str]:
    """`names`, checked to contain all exported ones; for None, the exported ones if positions.

    Raises:
      ValueError: `names` is None and the exported names are no positions; or `names` lacks some.
    """
    exported = list(exported)
    if names is None:
        if set(exported) != set(positions(len(exported))):
            raise ValueError(
                f"pass names, in the order of {where}, which have positions but no names; "
                f"the parameters are {exported}"
            )
        return positions(len(exported))
    names = list(names)
    names = checked_names(names, len(names), where)
    missing = [name for name in exported if name not in names]
    if missing:
        raise ValueError(f"names lack {missing}; they are {names}")
    return names


def as_array(label: str, value: Any) -> np.ndarray:
    """`value` as a NumPy array: a JAX array, a tensor, an HDF5 data set, a number."""
    if hasattr(value, "detach"):  # a PyTorch tensor: NumPy cannot read device memory
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float().numpy().astype(jnp.bfloat16)
    array = _hdf5.read(value) if _hdf5.is_dataset(value) else np.asarray(value)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise TypeError(f"{label} must be an array of numbers, got {value!r:.80}")
    return array


def as_scalar(label: str, value: Any, expected: str = "a scalar") -> np.ndarray:
    """`value` as an array of shape ()."""
    if _shape(value) != ():
        raise ValueError(f"{label} must be {expected}, got an array {list(_shape(value))}")
    return as_array(label, value)


def as_count(label: str, value: Any) -> int:
    """A number of steps from a scalar of any real dtype."""
    array = as_scalar(label, value)
    if np.iscomplexobj(array):
        raise ValueError(f"{label} must be real, got {array}")
    number = float(array)
    if not (number.is_integer() and 0 <= number < 2**31):
        raise ValueError(f"{label} must be an integer in [0, 2^31), got {number:g}")
    return int(number)


def as_scale(label: str, value: Any) -> np.ndarray:
    """A loss scale: a positive finite scalar."""
    scale = np.array(as_scalar(label, value))
    if not 0 < float(scale) < np.inf:
        raise ValueError(f"{label} must be positive and finite, got {scale}")
    return scale


def _names(paths: Iterable[Path], rename: Rename | None) -> dict[Path, Name]:
    return {path: Name(path, None) if rename is None else _name(path, rename) for path in paths}


def _name(path: Path, rename: Rename) -> Name:
    result = rename(path)
    if isinstance(result, str):
        return Name(result, None)
    if isinstance(result, Sequence) and len(result) == 2:
        name, axes = result
        if isinstance(name, str) and isinstance(axes, Sequence):
            if all(isinstance(axis, int) for axis in axes):
                return Name(name, tuple(axes))
    raise TypeError(f"rename must return a name or (name, axes), got {result!r} for {path!r}")


def _shared_names(names: Mapping[Path, Name]) -> list[str]:
    """An error message for each name that several paths map to."""
    by_name: dict[str, list[str]] = {}
    for path, (name, _) in names.items():
        by_name.setdefault(name, []).append(path)
    return [
        f"{' and '.join(map(repr, paths))} all map to {name!r}"
        for name, paths in by_name.items()
        if len(paths) > 1
    ]


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(np.shape(value) or ())  # None of an HDF5 dataset without any elements


def _shape_problem(
    shape: tuple[int, ...], axes: tuple[int, ...] | None, expected: tuple[int, ...]
) -> str | None:
    """What is wrong with the shape of an array that `axes` transpose to the expected shape."""
    transposed, hint, found = "", "", shape
    if axes is not None:
        if not _is_permutation(axes, len(shape)):
            return _axes_problem(shape, axes)
        transposed, found = " after the transpose", tuple(shape[axis] for axis in axes)
    elif len(shape) > 1 and sorted(shape) == sorted(expected):
        hint = "; if it is the transpose, let rename return (name, axes)"
    if found == expected:
        return None
    return f"has shape {list(found)}{transposed}, expected {list(expected)}{hint}"


def _convert(
    array: np.ndarray, slot: str, axes: tuple[int, ...] | None, dtype: Any
) -> np.ndarray | str:
    """The array of a slot, transposed and cast to `dtype`; or what is wrong with its values."""
    if slot in _SQUARES and not (np.all(np.isfinite(array)) and np.all(array >= 0)):
        return "has values that are negative or not finite, but is a mean of squares"
    cast = _cast(array if axes is None else array.transpose(axes), dtype)
    if cast is None:
        return (
            f"has {array.dtype} values that {dtype}, the dtype of the slot, cannot represent; "
            "round the array first if that is intended"
        )
    return cast


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray | None:
    """A copy in `dtype`; None if the cast is not exact. NaN counts as exact."""
    if np.iscomplexobj(array) and not jnp.issubdtype(dtype, jnp.complexfloating):
        return None
    with np.errstate(all="ignore"):
        cast = np.array(array, dtype, order="C")
        back = cast.astype(array.dtype)
    return cast if np.all((back == array) | (array != array)) else None


def _is_permutation(axes: tuple[int, ...], ndim: int) -> bool:
    return sorted(axes) == list(range(ndim))


def _axes_problem(shape: tuple[int, ...], axes: tuple[int, ...]) -> str:
    return f"has shape {list(shape)}, but axes {axes} do not permute its dimensions"


def _bullet_list(heading: str, problems: Sequence[str]) -> str:
    return f"{heading}:\n" + "\n".join(f"  {problem}" for problem in problems)
