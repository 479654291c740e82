"""Keras's exponential, inverse time, polynomial and piecewise constant schedules."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adam_transforms._core import dtypes
from adam_transforms.compat.keras import _config
from adam_transforms.compat.keras._schedule import (
    AT_LEAST_0,
    LAST_STEP,
    POSITIVE,
    LearningRateSchedule,
    as_float,
    periods_at,
)


@dataclasses.dataclass(frozen=True)
class ExponentialDecay(LearningRateSchedule):
    r"""Multiplies the rate by `decay_rate` every `decay_steps` steps.

    .. math:: \eta_t = \eta_0\, r^{\,t / T}

    Args:
      initial_learning_rate: the rate at step 0.
      decay_steps: T > 0.
      decay_rate: r >= 0.
      staircase: round t / T down to an integer.
      name: part of the config only.

    Raises:
      ValueError, TypeError: an argument is out of range or of the wrong type.

    >>> rate = ExponentialDecay(0.1, decay_steps=10, decay_rate=0.5)
    >>> [round(float(rate(step)), 4) for step in (0, 10, 15)]
    [0.1, 0.05, 0.0354]
    """

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = "ExponentialDecay"

    def __post_init__(self) -> None:
        self.check(decay_steps=POSITIVE, decay_rate=AT_LEAST_0)

    def __call__(self, step: Any) -> jax.Array:
        # Not optax.exponential_decay, which interprets a decay_rate of 0 as no decay.
        periods = periods_at(step, self.decay_steps, whole=self.staircase)
        return self.initial_learning_rate * jnp.power(float(self.decay_rate), periods)


@dataclasses.dataclass(frozen=True)
class InverseTimeDecay(LearningRateSchedule):
    r"""Divides the rate by a linear function of the step.

    .. math:: \eta_t = \eta_0 / (1 + r\, t / T)

    Args:
      initial_learning_rate: the rate at step 0.
      decay_steps: T > 0.
      decay_rate: r.
      staircase: round t / T down to an integer.
      name: part of the config only.

    Raises:
      ValueError, TypeError: an argument is out of range or of the wrong type.

    >>> rate = InverseTimeDecay(0.1, decay_steps=10, decay_rate=1.0)
    >>> [round(float(rate(step)), 4) for step in (0, 10, 30)]
    [0.1, 0.05, 0.025]
    """

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = "InverseTimeDecay"

    def __post_init__(self) -> None:
        self.check(decay_steps=POSITIVE)

    def __call__(self, step: Any) -> jax.Array:
        periods = periods_at(step, self.decay_steps, whole=self.staircase)
        return self.initial_learning_rate / (1.0 + self.decay_rate * periods)


@dataclasses.dataclass(frozen=True)
class PolynomialDecay(LearningRateSchedule):
    r"""Decays to an end value with a power of the remaining fraction of steps.

    .. math:: \eta_t = (\eta_0 - \eta_{end})\,(1 - \min(t, T) / T)^p + \eta_{end}

    Args:
      initial_learning_rate: the rate at step 0.
      decay_steps: T > 0.
      end_learning_rate: the rate from step T on.
      power: p.
      cycle: replace T by its smallest multiple that is not less than t, instead of ending.
      name: part of the config only.

    Raises:
      ValueError, TypeError: an argument is out of range or of the wrong type.

    >>> rate = PolynomialDecay(0.1, decay_steps=10, end_learning_rate=0.02)
    >>> [round(float(rate(step)), 4) for step in (0, 5, 10, 15)]
    [0.1, 0.06, 0.02, 0.02]
    """

    initial_learning_rate: float
    decay_steps: float
    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    name: str | None = "PolynomialDecay"

    def __post_init__(self) -> None:
        self.check(decay_steps=POSITIVE)

    def __call__(self, step: Any) -> jax.Array:
        step, total = as_float(step), jnp.asarray(self.decay_steps, dtypes.scalar_dtype())
        if self.cycle:
            cycles = periods_at(step, float(self.decay_steps), whole=True)
            cycles = jnp.where(cycles * total < step, cycles + 1.0, cycles)
            total = total * jnp.maximum(cycles, 1.0)
        # optax.polynomial_schedule computes 1 - step / total, which may differ from 0 at the end by
        # a rounding error: a power below 1 magnifies it, and is NaN if it is negative.
        remaining = (total - jnp.minimum(step, total)) / total
        span = self.initial_learning_rate - self.end_learning_rate
        return span * remaining ** float(self.power) + self.end_learning_rate


@dataclasses.dataclass(frozen=True)
class PiecewiseConstantDecay(LearningRateSchedule):
    """``values[i]`` for steps up to ``boundaries[i]``, and ``values[-1]`` after the last boundary.

    The value changes after the boundary: step ``boundaries[0]`` still has ``values[0]``.
    (`optax.piecewise_constant_schedule` changes at the boundary, and multiplies.)

    Args:
      boundaries: numbers in strictly increasing order.
      values: numbers, one more than `boundaries`.
      name: part of the config only.

    Raises:
      ValueError, TypeError: an argument is out of range or of the wrong type.

    >>> rate = PiecewiseConstantDecay([2, 4], [1.0, 0.5, 0.1])
    >>> [round(float(rate(step)), 2) for step in range(6)]
    [1.0, 1.0, 1.0, 0.5, 0.5, 0.1]
    """

    boundaries: Sequence[float]
    values: Sequence[float]
    name: str | None = "PiecewiseConstant"

    def __post_init__(self) -> None:
        for field in ("boundaries", "values"):
            numbers = getattr(self, field)
            if isinstance(numbers, str) or not isinstance(numbers, Sequence):
                raise TypeError(f"{field} must be a list of numbers, got {numbers!r}")
            # A tuple: the schedule must be hashable.
            plain = tuple(_config.number(f"{field}[{i}]", x) for i, x in enumerate(numbers))
            object.__setattr__(self, field, plain)
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                "values must be one more than boundaries, "
                f"got {len(self.values)} and {len(self.boundaries)}"
            )
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(
                f"boundaries must be in strictly increasing order, got {list(self.boundaries)}"
            )

    def __call__(self, step: Any) -> jax.Array:
        step = jnp.asarray(step)
        rate = jnp.full(step.shape, self.values[0], dtypes.scalar_dtype())
        for boundary, value in zip(self.boundaries, self.values[1:], strict=True):
            if jnp.issubdtype(step.dtype, jnp.integer):
                # Compare integers, which are exact beyond 2^24.
                boundary = min(max(math.floor(boundary), -LAST_STEP), LAST_STEP)
            rate = jnp.where(step > boundary, float(value), rate)
        return rate
