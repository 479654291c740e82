"""`jax.export`: programs that take or return the trees of this package can be serialized."""

import contextlib
import json
from typing import Any, TypeVar

from jax import export

C = TypeVar("C", bound=type)


def serializable_tuple(cls: C) -> C:
    """A class decorator for named tuples."""
    with contextlib.suppress(ValueError):  # The module is loaded again.
        export.register_namedtuple_serialization(cls, serialized_name=_name(cls))
    return cls


def serializable_node(cls: C) -> C:
    """A class decorator for pytree nodes whose static part is a tuple of numbers and tuples."""
    with contextlib.suppress(ValueError):  # The module is loaded again.
        export.register_pytree_node_serialization(
            cls,
            serialized_name=_name(cls),
            serialize_auxdata=lambda static: json.dumps(static).encode(),
            deserialize_auxdata=lambda data: _with_tuples(json.loads(data)),
        )
    return cls


def _with_tuples(x: Any) -> Any:
    """`x` with its lists as the tuples that they were."""
    return tuple(map(_with_tuples, x)) if isinstance(x, list) else x


def _name(cls: type) -> str:
    return f"adam_transforms.{cls.__name__}"
