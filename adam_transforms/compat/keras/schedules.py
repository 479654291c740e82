"""Keras's learning rate schedules, under its names and with its arguments and defaults.

Each is a function ``step -> learning rate`` of a scalar, or an array, of steps, so that it is an
Optax schedule wherever one is wanted; and a frozen dataclass whose config Keras reads and writes.
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
    """A schedule as Keras writes it, in what JSON has.

    Raises:
      TypeError: it is no schedule with a `get_config`.

    >>> serialize(InverseTimeDecay(0.1, 10, 1.0))["class_name"]
    'InverseTimeDecay'
    """
    if not hasattr(learning_rate_schedule, "get_config"):
        raise TypeError(
            f"a learning rate schedule that a config can hold has a get_config, as "
            f"{', '.join(_SCHEDULES)} have; got {learning_rate_schedule!r}"
        )
    known = type(learning_rate_schedule) in _SCHEDULES.values()
    module = "keras.optimizers.schedules" if known else None
    return _config.serialized(learning_rate_schedule, module)


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
    """The schedule that Keras, or `serialize`, wrote.

    Args:
      config: ``{"class_name": ..., "config": {...}}``; what else there is of it (module,
        registered_name) may be missing.
      custom_objects: schedules of your own: their classes by name, with a `from_config`.

    Raises:
      ValueError: the class is unknown, or what the config holds is.

    >>> deserialize(serialize(InverseTimeDecay(0.1, 10, 1.0)))
    InverseTimeDecay(initial_learning_rate=0.1, decay_steps=10, decay_rate=1.0, ...)
    """
    known = _SCHEDULES | dict(custom_objects or {})
    cls, arguments = _config.class_and_config("a learning rate schedule", config, known)
    return cls.from_config(arguments)
