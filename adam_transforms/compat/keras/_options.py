"""Checks of the arguments of Keras's Adam."""

import re
from collections.abc import Mapping
from typing import Any

from adam_transforms._core import arguments
from adam_transforms._core.patterns import compile_patterns
from adam_transforms.compat.keras import _config

# The arguments that r2.0's Adam does not have, with their defaults.
_NOT_LEGACY: Mapping[str, Any] = {
    "weight_decay": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}
_NUMBERS: Mapping[str, Mapping[str, float]] = {
    "weight_decay": {},
    "clipnorm": {"at_least": 0.0},
    "clipvalue": {"at_least": 0.0},
    "global_clipnorm": {"at_least": 0.0},
    "ema_momentum": {"at_least": 0.0},
    "loss_scale_factor": {"above": 0.0},
    "decay": {"at_least": 0.0},
}
_LEGACY_EPSILON = 1e-7


def checked(adam: Any) -> dict[str, Any]:
    """Checks all arguments; returns the fields to replace by a normalized value.

    Raises:
      ValueError, TypeError: an argument is out of range, of the wrong type, or conflicts with
        another.
    """
    fields: dict[str, Any] = {}
    for field in ("legacy", "amsgrad", "use_ema"):
        arguments.flag(field, getattr(adam, field))
    fields["name"] = _name(adam)
    arguments.scalar_or_schedule("learning_rate", adam.learning_rate)
    arguments.decay_rate("beta_1", adam.beta_1)
    arguments.decay_rate("beta_2", adam.beta_2)
    epsilon = adam.epsilon
    if adam.legacy and (epsilon is None or isinstance(epsilon, int | float) and epsilon == 0):
        fields["epsilon"] = epsilon = _LEGACY_EPSILON
    arguments.scalar_or_schedule("epsilon", epsilon, at_least=0.0)
    for field, limits in _NUMBERS.items():
        value = getattr(adam, field)
        if value is not None:
            fields[field] = _config.number(field, value, **limits)
    if not isinstance(adam.ema_momentum, int | float) or adam.ema_momentum > 1:
        raise ValueError(f"ema_momentum must be in [0, 1], got {adam.ema_momentum!r}")
    for field, least in (("ema_overwrite_frequency", 1), ("gradient_accumulation_steps", 2)):
        steps = getattr(adam, field)
        if steps is not None and arguments.positive_int(field, steps) < least:
            raise ValueError(f"{field} must be at least {least}, got {steps}")
    excluded = adam.excluded_from_weight_decay
    if excluded:
        compile_patterns("excluded_from_weight_decay", excluded)
    is_single = isinstance(excluded, str | re.Pattern)
    fields["excluded_from_weight_decay"] = (excluded,) if is_single else tuple(excluded)
    _check_conflicts(adam)
    return fields


def _name(adam: Any) -> str:
    if adam.name is None:
        return "Adam" if adam.legacy else adam.default_name
    if not isinstance(adam.name, str):
        raise TypeError(f"name must be a string, got {adam.name!r}")
    return adam.name


def _check_conflicts(adam: Any) -> None:
    """Raises ValueError if two arguments exclude each other."""
    norms = ["clipnorm", "global_clipnorm"]
    exclusive = norms if adam.legacy else ["clipnorm", "clipvalue", "global_clipnorm"]
    clips = [field for field in exclusive if getattr(adam, field) is not None]
    if len(clips) > 1:
        raise ValueError(
            f"at most one of {', '.join(exclusive)} may be given, got {' and '.join(clips)}"
        )
    if not adam.legacy:
        if adam.decay:
            raise ValueError(f"decay needs legacy=True, got decay={adam.decay:g} and legacy=False")
        return
    for field, default in _NOT_LEGACY.items():
        if getattr(adam, field) != default:
            raise ValueError(f"legacy=True has no {field}, got {getattr(adam, field)!r}")
    for field in [*norms, "clipvalue"]:
        if getattr(adam, field) == 0:
            # 0 disables clipping in Keras 3, but sets every gradient to zero in r2.0.
            raise ValueError(f"{field} must be > 0 with legacy=True, got 0")
