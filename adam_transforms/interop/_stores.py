"""Reads the arrays of a Keras optimizer from a mapping, a list or a file."""

import importlib
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from adam_transforms.interop import _matching

Store: TypeAlias = Mapping[str, Any] | Sequence[Any] | str | os.PathLike[str]


def arrays_of(store: Store) -> list[Any]:
    """The arrays of a store in the order of their keys."""
    if isinstance(store, str | os.PathLike):
        return _read(os.fspath(store))
    if isinstance(store, Sequence):
        return list(store)
    if not isinstance(store, Mapping):
        raise TypeError(f"store must be a mapping, a list or a path, got {store!r:.80}")
    keys = _matching.positions(len(store))
    if set(store) != set(keys):
        raise ValueError(f'store must have the keys "0", "1", ..., got {list(store)[:8]}')
    return [store[key] for key in keys]


def _read(path: str) -> list[np.ndarray]:
    """The optimizer's arrays in a ``.weights.h5`` or ``.keras`` file."""
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        raise ImportError(
            "h5py is needed to read a Keras file: pip install 'adam-transforms[keras]'"
        ) from None
    file: Any = path
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            file = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(file, "r") as weights:
        group: Any = weights.get("optimizer/vars")
        if group is None:
            raise ValueError(
                f"{path} has no optimizer/vars: the model was saved without its optimizer, or "
                f"before the first step; the file has {sorted(weights)}"
            )
        return [_matching.as_array(key, group[key]) for key in _matching.positions(len(group))]
