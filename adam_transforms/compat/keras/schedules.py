"""Keras's learning rate schedules, with its names, arguments and defaults.

Each is a function ``step -> learning rate`` of a scalar or an array, and therefore an Optax
schedule. It is also a frozen dataclass with a config in Keras's format.
"""

from collections.abc import Mapping
from typing import Any

from adam_transforms.compat.keras import _config
from adam_transforms.compat.keras._cosines import CosineDecay, CosineDecayRestarts
from adam_transforms.compat.keras._decays import (
    ExponentialDecay,
    InverseTimeDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
)

__all__ = [
    "CosineDecay",
    "CosineDecayRestarts",
    "ExponentialDecay",
    "InverseTimeDecay",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
    "deserialize",
    "serialize",
]

_SCHEDULES: dict[str, Any] = {
    schedule.__name__: schedule
    for schedule in (
        ExponentialDecay,
        PiecewiseConstantDecay,
        PolynomialDecay,
        InverseTimeDecay,
        CosineDecay,
        CosineDecayRestarts,
    )
}


def serialize(learning_rate_schedule: Any) -> dict[str, Any]:
    """A schedule in Keras's format, as JSON values.

    Raises:
      TypeError: the schedule has no `get_config`.

    >>> serialize(InverseTimeDecay(0.1, 10, 1.0))["class_name"]
    'InverseTimeDecay'
    """
    if not hasattr(learning_rate_schedule, "get_config"):
        raise TypeError(
            "a serializable learning rate schedule has a get_config, as do "
            f"{', '.join(_SCHEDULES)}; got {learning_rate_schedule!r}"
        )
    is_known = type(learning_rate_schedule) in _SCHEDULES.values()
    module = "keras.optimizers.schedules" if is_known else None
    return _config.serialized(learning_rate_schedule, module)


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
    """The schedule of a result of `serialize`, of this module or of Keras.

    Args:
      config: ``{"class_name": ..., "config": {...}}``; other keys (module, registered_name) are
        optional.
      custom_objects: {name: class} of custom schedules with a `from_config`.

    Raises:
      ValueError: the class, or a key of the config, is unknown.

    >>> deserialize(serialize(InverseTimeDecay(0.1, 10, 1.0)))
    InverseTimeDecay(initial_learning_rate=0.1, decay_steps=10, decay_rate=1.0, ...)
    """
    known = _SCHEDULES | dict(custom_objects or {})
    cls, arguments = _config.class_and_config("a learning rate schedule", config, known)
    return cls.from_config(arguments)


def __dir__() -> list[str]:
    return __all__
