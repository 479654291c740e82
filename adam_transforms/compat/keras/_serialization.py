"""Optimizers as Keras writes them."""

from collections.abc import Mapping
from typing import Any

from adam_transforms.compat.keras import _adam_config, _config
from adam_transforms.compat.keras._adam import Adam
from adam_transforms.compat.keras._loss_scale import LossScaleOptimizer


def serialize(optimizer: Adam | LossScaleOptimizer) -> dict[str, Any]:
    """An optimizer as `keras.optimizers.serialize` writes it, in what JSON has.

    >>> serialize(Adam(0.5))["config"]["learning_rate"]
    0.5
    """
    if isinstance(optimizer, LossScaleOptimizer):
        return _config.serialized(optimizer, "keras.optimizers")
    if not isinstance(optimizer, Adam):
        raise TypeError(f"optimizer must be one of this module, got {optimizer!r}")
    return _adam_config.serialized(optimizer)


def deserialize(
    config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
) -> Adam | LossScaleOptimizer:
    """The optimizer that Keras, or `serialize`, wrote.

    Args:
      config: ``{"class_name": ..., "config": {...}}`` of an Adam, an AdamW or a
        LossScaleOptimizer.
      custom_objects: schedules of your own: their classes by name.

    Raises:
      ValueError: the config is of another optimizer, or holds an unknown key.

    >>> deserialize({"class_name": "AdamW", "config": {}}).weight_decay
    0.004
    """
    known = {"Adam": Adam, "AdamW": Adam, "LossScaleOptimizer": LossScaleOptimizer}
    cls, arguments = _config.class_and_config("an optimizer", config, known)
    if cls is LossScaleOptimizer:
        return LossScaleOptimizer.from_config(arguments, custom_objects)
    arguments = _adam_config.arguments_of_serialized(config, custom_objects)
    return _config.construct(Adam, arguments)
