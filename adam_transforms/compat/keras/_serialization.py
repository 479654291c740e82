"""Serialization of optimizers in Keras's format."""

from collections.abc import Mapping
from typing import Any

from adam_transforms.compat.keras import _adam_config, _config
from adam_transforms.compat.keras._adam import Adam
from adam_transforms.compat.keras._loss_scale import LossScaleOptimizer


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
    known = {"Adam": Adam, "AdamW": Adam, "LossScaleOptimizer": LossScaleOptimizer}
    cls, arguments = _config.class_and_config("an optimizer", config, known)
    if cls is LossScaleOptimizer:
        return LossScaleOptimizer.from_config(arguments, custom_objects)
    arguments = _adam_config.arguments_of_serialized(config, custom_objects)
    return _config.construct(Adam, arguments)
