"""The base class and helpers of Keras's learning rate schedules."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._core import arguments, dtypes
from adam_transforms.compat.keras import _config

# The largest step: JAX integers have 32 bits.
LAST_STEP = 2**31 - 1

POSITIVE = {"above": 0.0}
AT_LEAST_0 = {"at_least": 0.0}


class LearningRateSchedule:
    """A schedule with a Keras config; subclasses are dataclasses."""

    def __call__(self, step: Any) -> jax.Array:
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The arguments in the format of Keras's get_config; the inverse of `from_config`."""
        return {
            field.name: _config.jsonable(f"{type(self).__name__}.{field.name}", value)
            for field in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
            for value in [getattr(self, field.name)]
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """The schedule of a config from `get_config`, of this class or of Keras.

        Raises:
          ValueError: a key of the config is unknown, or a required one is missing.
        """
        return _config.construct(cls, config)

    def check(self, **limits: Mapping[str, float]) -> None:
        """Checks the types of all arguments, and the limits of those named."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if field.type is bool:
                arguments.flag(field.name, value)
            elif field.type is float:
                value = _config.number(field.name, value, **limits.get(field.name, {}))
                object.__setattr__(self, field.name, value)


def as_float(step: Any) -> jax.Array:
    """The step in the dtype of rates: float32, or float64 in x64 mode."""
    return jnp.asarray(step).astype(dtypes.scalar_dtype())


def periods_at(step: Any, length: float, *, whole: bool) -> jax.Array:
    """``step / length``, the number of completed periods; rounded down if `whole`."""
    step = as_float(step)
    periods = step / length
    if not whole:
        return periods
    # XLA replaces division by a constant by multiplication by its inverse. The quotient of a step
    # at the end of a period may then be just below an integer.
    periods = jnp.floor(periods)
    periods = jnp.where((periods + 1.0) * length <= step, periods + 1.0, periods)
    return jnp.where(periods * length > step, periods - 1.0, periods)
