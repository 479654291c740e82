"""Configs of Adam, in the forms of Keras 3 and of r2.0."""

from collections.abc import Mapping
from typing import Any

from adam_transforms.compat._optimizer import present
from adam_transforms.compat.keras import _config, schedules

_WEIGHT_DECAY_OF_ADAMW = 0.004
# Written by versions between r2.0's and 3; no part of the rule.
_OF_NO_EFFECT = ("jit_compile", "is_legacy_optimizer")


def config_of(adam: Any) -> dict[str, Any]:
    """What its `get_config` gives."""
    if adam.legacy:
        clips = ("clipnorm", "clipvalue", "global_clipnorm")
        fields = ["name", *(clip for clip in clips if getattr(adam, clip) is not None)]
        fields += ["learning_rate", "decay"]
    else:
        fields = ["name", "learning_rate", "weight_decay", "clipnorm", "global_clipnorm"]
        fields += ["clipvalue", "use_ema", "ema_momentum"]
        fields += ["ema_overwrite_frequency", "loss_scale_factor", "gradient_accumulation_steps"]
    fields += ["beta_1", "beta_2", "epsilon", "amsgrad"]
    return {field: _value(field, present(getattr(adam, field))) for field in fields}


def _value(field: str, value: Any) -> Any:
    if field == "learning_rate" and callable(value):
        return schedules.serialize(value)
    return _config.jsonable(field, value)


def serialized(adam: Any) -> dict[str, Any]:
    """As Keras's `optimizers.serialize` writes it."""
    module = "keras.optimizers.legacy" if adam.legacy else "keras.optimizers"
    return _config.serialized(adam, module)


def arguments_of(
    config: Any, custom_objects: Mapping[str, Any] | None, *, legacy: bool = False
) -> dict[str, Any]:
    """The arguments of `Adam` out of a config, which is r2.0's if it says so by its `decay`."""
    if not isinstance(config, Mapping):
        raise TypeError(f"the config of Adam must be a dictionary, got {config!r}")
    arguments = {key: value for key, value in config.items() if key not in _OF_NO_EFFECT}
    if "lr" in arguments:
        arguments["learning_rate"] = arguments.pop("lr")
    rate = arguments.get("learning_rate")
    if isinstance(rate, Mapping):
        arguments["learning_rate"] = schedules.deserialize(rate, custom_objects)
    if legacy or ("decay" in arguments and "use_ema" not in arguments):
        arguments["legacy"] = True
    return arguments


def arguments_of_serialized(
    config: Any, custom_objects: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The arguments of `Adam` out of what `serialized`, or Keras, wrote."""
    known = {"Adam": {}, "AdamW": {"weight_decay": _WEIGHT_DECAY_OF_ADAMW}}
    defaults, arguments = _config.class_and_config("an optimizer", config, known)
    legacy = str(config.get("module") or "").endswith(".legacy")
    return defaults | arguments_of(arguments, custom_objects, legacy=legacy)
