"""Configs of Adam, in the formats of Keras 3 and r2.0."""

from collections.abc import Mapping
from typing import Any

from adam_transforms.compat._optimizer import current_value
from adam_transforms.compat.keras import _config, schedules

# Keys of versions between r2.0 and 3, without an effect on the update.
_IGNORED = ("jit_compile", "is_legacy_optimizer")


def config_of(adam: Any) -> dict[str, Any]:
    """The result of `Adam.get_config`."""
    if adam.legacy:
        clips = ("clipnorm", "clipvalue", "global_clipnorm")
        fields = ["name", *(clip for clip in clips if getattr(adam, clip) is not None)]
        fields += ["learning_rate", "decay"]
    else:
        fields = ["name", "learning_rate", "weight_decay", "clipnorm", "global_clipnorm"]
        fields += ["clipvalue", "use_ema", "ema_momentum"]
        fields += ["ema_overwrite_frequency", "loss_scale_factor", "gradient_accumulation_steps"]
    fields += ["beta_1", "beta_2", "epsilon", "amsgrad"]
    return {field: _value(field, current_value(getattr(adam, field))) for field in fields}


def _value(field: str, value: Any) -> Any:
    if field == "learning_rate" and callable(value):
        return schedules.serialize(value)
    return _config.jsonable(field, value)


def serialized(adam: Any) -> dict[str, Any]:
    """`adam` in the format of Keras's `optimizers.serialize`."""
    module = "keras.optimizers.legacy" if adam.legacy else "keras.optimizers"
    return _config.serialized(adam, module)


def arguments_of(
    config: Any, custom_objects: Mapping[str, Any] | None, *, legacy: bool = False
) -> dict[str, Any]:
    """The arguments of `Adam` in a config; one with `decay` or `lr` is r2.0's."""
    if not isinstance(config, Mapping):
        raise TypeError(f"the config of Adam must be a dictionary, got {config!r}")
    arguments = {key: value for key, value in config.items() if key not in _IGNORED}
    is_r2 = not arguments.keys().isdisjoint(("decay", "lr")) and "use_ema" not in arguments
    if "lr" in arguments and (legacy or is_r2):
        arguments["learning_rate"] = arguments.pop("lr")
    rate = arguments.get("learning_rate")
    if isinstance(rate, Mapping):
        arguments["learning_rate"] = schedules.deserialize(rate, custom_objects)
    if legacy or is_r2:
        arguments["legacy"] = True
    return arguments
