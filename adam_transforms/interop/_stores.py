"""Reads the arrays of a Keras optimizer from a mapping, a list or a file."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from adam_transforms.interop import _hdf5, _matching

Store: TypeAlias = Mapping[str, Any] | Sequence[Any] | str | os.PathLike[str]


class Variables(NamedTuple):
    """The variables of an optimizer.

    Attributes:
      arrays: in the optimizer's order; those of a file are HDF5 datasets, not read yet.
      legacy: whether that order is TensorFlow 2.0's; None if the store does not tell.
    """

    arrays: list[Any]
    legacy: bool | None = None


@contextlib.contextmanager
def opened(store: Store) -> Iterator[Variables]:
    """The variables in a store; those of a file can be read inside of the context."""
    if isinstance(store, str | os.PathLike):
        with _hdf5.opened(os.fspath(store)) as file:
            with _hdf5.errors_as_malformed():
                variables = _variables_in(file)
            yield variables
    elif _hdf5.is_group(store):
        with _hdf5.errors_as_malformed():
            variables = Variables(_datasets(store, _matching.positions(len(store))))
        yield variables
    elif isinstance(store, Sequence):
        yield Variables(list(store))
    elif isinstance(store, Mapping):
        keys = _matching.positions(len(store))
        if set(store) != set(keys):
            raise ValueError(f'store must have the keys "0", "1", ..., got {list(store)[:8]}')
        yield Variables([store[key] for key in keys])
    else:
        raise TypeError(f"store must be a mapping, a list or a path, got {store!r:.80}")


def _datasets(group: Any, names: Sequence[str]) -> list[Any]:
    """The datasets of these names."""
    datasets = [_hdf5.member(group, name) for name in names]
    lacking = [x for x, found in zip(names, datasets, strict=True) if not _hdf5.is_dataset(found)]
    if lacking:
        raise _hdf5.MalformedError(
            f"{group.name} must have datasets {lacking[:8]}, got {list(group)[:8]}"
        )
    return datasets


def _variables_in(file: Any) -> Variables:
    """The variables in a ``.weights.h5`` file, or in Keras's older ``.h5`` file of a model."""
    numbered = _hdf5.member(file, "optimizer/vars")
    named = _hdf5.member(file, "optimizer_weights")
    if _hdf5.is_group(numbered):
        variables = Variables(_datasets(numbered, _matching.positions(len(numbered))))
    elif _hdf5.is_group(named):
        variables = _named(named)
    else:
        raise _hdf5.MalformedError(_no_optimizer_message(file))
    if len(variables.arrays) <= 2:  # the iteration, and the learning rate
        raise _hdf5.MalformedError(
            "the optimizer has no slots: it is not Adam, or was saved before its first step"
        )
    return variables


def _named(group: Any) -> Variables:
    """The variables of ``model.save("model.h5")``, in the order of the attribute with their names.

    The name of the first, the number of steps, tells the order: "iteration" in Keras 3 and
    tf.keras 2.11; "iter" in earlier tf.keras, and "iterations" in Keras 2.
    """
    names = _hdf5.names_in(group, "weight_names")
    first = re.search(r"(?:^|/)(iteration|iterations|iter)(_\d+)?(:0)?$", (names or [""])[0])
    if first is None:
        raise _hdf5.MalformedError(
            "the attribute weight_names of optimizer_weights must begin with the number of steps, "
            f"got {names[:8]}"
        )
    return Variables(_datasets(group, names), legacy=first[1] != "iteration")


def _no_optimizer_message(file: Any) -> str:
    """Why there is none, as far as the file tells."""
    has = f"has no optimizer/vars and no optimizer_weights, but {sorted(file)[:8]}"
    if "layer_names" in file.attrs:
        return f"{has}: save_weights wrote it, without the optimizer; use model.save"
    if {"layers", "model_weights"} & set(file) and "optimizer" not in file:
        return f"{has}: the model was saved without its optimizer, or before the first step"
    return f"{has}: Keras writes no such file"
