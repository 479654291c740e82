"""Reads HDF5 files, and archives that hold one, as untrusted data.

Only the given file is read: links to other files and storage in other files are refused. Nothing is
unpickled. The caller can compare shapes before data are read, and what is small does not unpack to
something huge.
"""

import contextlib
import importlib
import io
import math
import os
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

_ARCHIVE_MEMBER = "model.weights.h5"
_ARCHIVE_SIGNATURE = b"PK\x03\x04"

# Keras does not compress its archives. One that was compressed later has moments of zero for rows
# that were never touched; but random weights do not shrink, so that the ratio stays far below this.
_MAX_EXPANSION = 8
# The bytes of an archive, and the elements of a chunk, that are too few to matter.
_SMALL = 1 << 22
# The bytes of an attribute in an object header, by HDF5's format.
_MAX_ATTRIBUTE = 1 << 16


class MalformedError(ValueError):
    """A file is damaged, or has what no reader should follow."""


@contextlib.contextmanager
def errors_as_malformed() -> Iterator[None]:
    """Turns whatever h5py, zipfile and zlib raise on damaged data into `MalformedError`."""
    try:
        yield
    except MalformedError:
        raise
    except Exception as error:
        raise MalformedError(f"the file is damaged or of another format: {error}") from error


@contextlib.contextmanager
def opened(path: str) -> Iterator[Any]:
    """The root group of an HDF5 file, or of the one in a ``.keras`` archive.

    Raises:
      OSError: there is no such file, or it may not be read.
      ImportError: h5py is not installed.
      ValueError: names the file; it is damaged, or has what no reader should follow.
    """
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        raise ImportError(
            "h5py is needed to read a Keras file: pip install 'adam-transforms[keras]'"
        ) from None
    with open(path, "rb") as start:
        is_archive = start.read(len(_ARCHIVE_SIGNATURE)) == _ARCHIVE_SIGNATURE
    try:
        with errors_as_malformed():
            file = h5py.File(_unpacked(path) if is_archive else path, "r")
        with file:
            yield file
    except MalformedError as error:
        raise ValueError(f"{path}: {error}") from error


def member(group: Any, name: str) -> Any:
    """The group or dataset at a path below `group`; None if there is none.

    Raises:
      MalformedError: a part of the path is a link, which may lead to another file.
    """
    h5l = sys.modules["h5py"].h5l
    for part in name.split("/"):
        links = getattr(group.id, "links", None)  # none in a dataset
        if part in ("", ".") or links is None or not links.exists(part.encode()):
            return None
        if links.get_info(part.encode()).type != h5l.TYPE_HARD:
            raise MalformedError(
                f"{part!r} in {group.name} is a soft or external link, which may lead to another "
                "file; put what it leads to in its place"
            )
        group = group[part]
    return group


def names_in(group: Any, attribute: str) -> list[str]:
    """The names in an attribute of `group`, which Keras splits into several if they are many."""
    keys = [attribute]
    if attribute not in group.attrs:
        keys = [f"{attribute}{i}" for i in range(len(group.attrs))]
    return [name for key in keys for name in _strings_in(group, key)]


def _strings_in(x: Any, attribute: str) -> list[str]:
    """The strings in an attribute; none if there is no such attribute."""
    if attribute not in x.attrs:
        return []
    header = x.attrs.get_id(attribute)
    is_string = sys.modules["h5py"].check_string_dtype(header.dtype) is not None
    if not is_string or header.get_storage_size() > _MAX_ATTRIBUTE:
        raise MalformedError(f"the attribute {attribute} of {x.name} must be strings")
    values = np.ravel(x.attrs[attribute]).tolist()
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def is_group(x: Any) -> bool:
    """Whether `x` is an HDF5 group, opened by the caller."""
    return "h5py" in sys.modules and isinstance(x, sys.modules["h5py"].Group)


def is_dataset(x: Any) -> bool:
    """Whether `x` is an HDF5 dataset."""
    return "h5py" in sys.modules and isinstance(x, sys.modules["h5py"].Dataset)


def read(dataset: Any) -> np.ndarray:
    """The array of numbers in a dataset, bfloat16 where Keras has marked it as such.

    Raises:
      MalformedError: it is stored in another file, holds no numbers, or is damaged.
    """
    with errors_as_malformed():
        is_bfloat16 = _strings_in(dataset, "dtype") == ["bfloat16"]
        problem = _storage_problem(dataset, is_bfloat16)
        if problem is not None:
            raise MalformedError(f"{dataset.name} {problem}")
        array = np.asarray(dataset[()])
        if is_bfloat16:  # HDF5 stores two bytes without a type
            raw = array.dtype.kind == "V"
            array = array.view(jnp.bfloat16) if raw else array.astype(jnp.bfloat16)
        return array


def _storage_problem(dataset: Any, is_bfloat16: bool) -> str | None:
    """What forbids to read a dataset, found in its header."""
    if dataset.is_virtual:
        return "is a virtual dataset, which reads other files; copy its data"
    if dataset.external:
        return "has its data in another file; copy them"
    dtype = dataset.dtype
    if dtype.kind not in "biufc" and not (is_bfloat16 and dtype == np.dtype("V2")):
        return f"must be an array of numbers, got {dtype}"
    if math.prod(dataset.chunks or ()) > max(dataset.size, _SMALL):
        return f"has {dataset.size} elements in chunks of the shape {dataset.chunks}"
    settings, h5z = dataset.id.get_create_plist(), sys.modules["h5py"].h5z
    filters = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
    if sum(x not in (h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32) for x in filters) > 1:
        return "is compressed more than once"
    return None


def _unpacked(path: str) -> io.BytesIO:
    """The HDF5 file in a ``.keras`` archive."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if _ARCHIVE_MEMBER not in names:
            raise MalformedError(f"the archive has no {_ARCHIVE_MEMBER}, got {names[:8]}")
        declared, size = archive.getinfo(_ARCHIVE_MEMBER).file_size, os.path.getsize(path)
        if declared > max(_MAX_EXPANSION * size, _SMALL):
            raise MalformedError(
                f"{_ARCHIVE_MEMBER} would unpack to {declared} bytes, of an archive of {size} "
                "bytes; pack it without compression, as Keras does"
            )
        return io.BytesIO(archive.read(_ARCHIVE_MEMBER))
