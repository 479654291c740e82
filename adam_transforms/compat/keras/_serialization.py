"""Serialization of optimizers in Keras's format."""

from collections.abc import Mapping
from typing import Any

from adam_transforms.compat.keras import _adam_config, _config
from adam_transforms.compat.keras._adam import Adam
from adam_transforms.compat.keras._adamw import ADAM_CLASSES, deserialized
from adam_transforms.compat.keras._loss_scale import LossScaleOptimizer
from adam_transforms.compat.keras._surface import KerasOptimizer

_CLASSES: dict[str, Any] = {**ADAM_CLASSES, "LossScaleOptimizer": LossScaleOptimizer}


def serialize(optimizer: Adam | LossScaleOptimizer) -> dict[str, Any]:
    """An optimizer in the format of `keras.optimizers.serialize`, as JSON values.

    >>> serialize(Adam(0.5))["config"]["learning_rate"]
    0.5
    """
    if isinstance(optimizer, LossScaleOptimizer):
        return _config.serialized(optimizer, "keras.optimizers")
    if not isinstance(optimizer, Adam):
        raise TypeError(f"optimizer must be an optimizer of this module, got {optimizer!r}")
    return _adam_config.serialized(optimizer)


def deserialize(
    config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
) -> Adam | LossScaleOptimizer:
    """The optimizer of a result of `serialize`, of this module or of Keras.

    Args:
      config: ``{"class_name": ..., "config": {...}}`` of an Adam, an AdamW or a
        LossScaleOptimizer.
      custom_objects: {name: class} of custom schedules.

    Raises:
      ValueError: the config belongs to another optimizer, or has an unknown key.

    >>> deserialize({"class_name": "AdamW", "config": {}}).weight_decay
    0.004
    """
    cls, fields = _config.class_and_config("an optimizer", config, _CLASSES)
    if cls is LossScaleOptimizer:
        return LossScaleOptimizer.from_config(fields, custom_objects)
    return deserialized(config, custom_objects)


def get(identifier: Any) -> KerasOptimizer | None:
    """The optimizer that `identifier` stands for, as in `keras.optimizers.get`.

    Args:
      identifier: a class name in any letter case ("adam", "adamw"), a config as for `deserialize`,
        an optimizer (returned as it is), or None (returned too).

    Returns:
      The optimizer.

    Raises:
      ValueError: `identifier` is none of these, or the config of another optimizer.

    >>> get("adamw").weight_decay
    0.004
    """
    if identifier is None or isinstance(identifier, KerasOptimizer):
        return identifier
    if isinstance(identifier, Mapping):
        return deserialize(identifier)
    if isinstance(identifier, str):
        return deserialize({"class_name": identifier, "config": {}})
    raise ValueError(
        f"an optimizer must be one of {', '.join(map(repr, _CLASSES))}, a dictionary with a "
        f"class_name and a config, or an optimizer of this module, got {identifier!r}"
    )
