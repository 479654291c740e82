"""What Keras's learning rate schedules share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._core import arguments, dtypes
from adam_transforms.compat.keras import _config

# The largest step: JAX counts in 32 bits.
LAST_STEP = 2**31 - 1

POSITIVE = {"above": 0.0}
AT_LEAST_0 = {"at_least": 0.0}


class LearningRateSchedule:
    """What the schedules have in common: a config."""

    def __call__(self, step: Any) -> jax.Array:
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The arguments, as Keras's get_config gives them; `from_config` takes them back."""
        return {
            field.name: _config.jsonable(f"{type(self).__name__}.{field.name}", value)
            for field in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
            for value in [getattr(self, field.name)]
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """The schedule of a config that `get_config`, ours or Keras's, gave.

        Raises:
          ValueError: the config holds what the schedule has not, or lacks what it needs.
        """
        return _config.construct(cls, config)

    def check(self, **limits: Mapping[str, float]) -> None:
        """Checks the arguments, those named within their limits."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if field.type is bool:
                arguments.flag(field.name, value)
            elif field.type is float:
                value = _config.number(field.name, value, **limits.get(field.name, {}))
                object.__setattr__(self, field.name, value)


def as_float(step: Any) -> jax.Array:
    """The step in the float that rates are computed in: float32, or float64 in x64 mode."""
    return jnp.asarray(step).astype(dtypes.scalar_dtype())


def periods_at(step: Any, length: float, *, whole: bool) -> jax.Array:
    """Periods of this length that are over at a step; without `whole`, as a fraction."""
    step = as_float(step)
    periods = step / length
    if not whole:
        return periods
    # Divided by a constant, which XLA makes a product with its inverse, a step that ends a period
    # may come out just below it.
    periods = jnp.floor(periods)
    periods = jnp.where((periods + 1.0) * length <= step, periods + 1.0, periods)
    return jnp.where(periods * length > step, periods - 1.0, periods)
