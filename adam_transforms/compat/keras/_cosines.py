"""Keras's cosine schedules."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
class CosineDecay(LearningRateSchedule):
    r"""Half a cosine from the peak down to a fraction of it, after an optional linear warm-up.

    .. math::
      \eta_t = \eta_0 + (\eta_w - \eta_0)\, t / W \quad (t < W), \qquad
      \eta_t = \eta_w \big(\alpha + (1-\alpha) \tfrac12
               (1 + \cos(\pi \min(t - W, T) / T))\big)

    `decay_steps` count from the end of the warm-up; in `optax.warmup_cosine_decay_schedule` they
    include it. Without `warmup_target`, `warmup_steps` is ignored, W is 0 and the peak is the
    initial rate.

    Args:
      initial_learning_rate: the rate at step 0.
      decay_steps: T > 0.
      alpha: the final rate as a fraction of the peak.
      name: part of the config only.
      warmup_target: the peak, reached after the warm-up; None for no warm-up.
      warmup_steps: W >= 0.

    Raises:
      ValueError, TypeError: an argument is out of range or of the wrong type.

    >>> rate = CosineDecay(0.0, decay_steps=10, warmup_target=0.1, warmup_steps=4)
    >>> [round(float(rate(step)), 4) for step in (0, 2, 4, 9, 14)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """

    initial_learning_rate: float
    decay_steps: float
    alpha: float = 0.0
    name: str | None = "CosineDecay"
    warmup_target: float | None = None
    warmup_steps: float = 0

    def __post_init__(self) -> None:
        self.check(decay_steps=POSITIVE, warmup_steps=AT_LEAST_0)
        if self.warmup_target is not None:
            target = _config.number("warmup_target", self.warmup_target)
            object.__setattr__(self, "warmup_target", target)

    def __call__(self, step: Any) -> jax.Array:
        step, initial = as_float(step), float(self.initial_learning_rate)
        if self.warmup_target is None:
            return self._cosine(initial, step)
        peak, warmup = float(self.warmup_target), self.warmup_steps
        rising = (peak - initial) * (step / (warmup or 1.0)) + initial
        return jnp.where(step < warmup, rising, self._cosine(peak, step - warmup))

    def _cosine(self, peak: float, step: jax.Array) -> jax.Array:
        steps: Any = self.decay_steps
        return jnp.asarray(optax.cosine_decay_schedule(peak, steps, self.alpha)(step))


@dataclasses.dataclass(frozen=True)
class CosineDecayRestarts(LearningRateSchedule):
    r"""A sequence of half cosines, each `t_mul` times as long as the previous one (SGDR).

    .. math::
      \eta_t = \eta_0 \big(\alpha + (1-\alpha)\, m^i\, \tfrac12 (1 + \cos(\pi x))\big)

    where i is the number of restarts up to step t, and x in [0, 1) is the completed fraction of the
    period of :math:`T\, s^i` steps.

    Args:
      initial_learning_rate: the rate at step 0.
      first_decay_steps: T > 0.
      t_mul: s >= 1, the factor of the length of each period over the previous one. (Below 1 the
        periods have a finite total length, beyond which Keras's rate is NaN.)
      m_mul: m >= 0, the factor of the initial rate of each period over the previous one.
      alpha: the rate at the end of a period, as a fraction of the initial rate.
      name: part of the config only.

    Raises:
      ValueError, TypeError: an argument is out of range or of the wrong type.

    References:
      Loshchilov & Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017.

    >>> rate = CosineDecayRestarts(0.1, first_decay_steps=4, m_mul=0.5)
    >>> [round(float(rate(step)), 4) for step in (0, 2, 4, 8, 12)]
    [0.1, 0.05, 0.05, 0.025, 0.025]
    """

    initial_learning_rate: float
    first_decay_steps: float
    t_mul: float = 2.0
    m_mul: float = 1.0
    alpha: float = 0.0
    name: str | None = "SGDRDecay"

    def __post_init__(self) -> None:
        self.check(first_decay_steps=POSITIVE, t_mul={"at_least": 1.0}, m_mul=AT_LEAST_0)

    def __call__(self, step: Any) -> jax.Array:
        length = float(self.first_decay_steps)
        if self.t_mul == 1.0:
            restarts = periods_at(step, length, whole=True)
            x = (as_float(step) - restarts * length) / length
        else:
            restarts, start, length = self._period_of(jnp.asarray(step))
            x = (as_float(step) - start) / length
        cosine = 0.5 * jnp.power(float(self.m_mul), restarts) * (1.0 + jnp.cos(jnp.pi * x))
        return self.initial_learning_rate * ((1.0 - self.alpha) * cosine + self.alpha)

    def _period_of(self, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(index, first step, length) of the period that contains a step.

        A search in the list of all periods. Keras takes a logarithm of the step instead, which may
        round to the wrong side of a restart.
        """
        first, growth = float(self.first_decay_steps), float(self.t_mul)
        count = math.ceil(math.log1p(LAST_STEP * (growth - 1.0) / first) / math.log(growth))
        lengths = first * growth ** np.arange(count, dtype=np.float64)
        starts = first * np.expm1(np.arange(count) * math.log(growth)) / (growth - 1.0)
        rounded = np.round(starts)
        starts = np.where(np.isclose(starts, rounded, rtol=1e-12, atol=1e-9), rounded, starts)
        bounds: Any = starts
        if jnp.issubdtype(step.dtype, jnp.integer):
            bounds = np.minimum(np.ceil(starts), LAST_STEP).astype(step.dtype)
        bounds = jnp.asarray(bounds, step.dtype)
        i = jnp.searchsorted(bounds, step, side="right", method="scan_unrolled") - 1
        i = jnp.maximum(i, 0)
        dtype = dtypes.scalar_dtype()
        return i.astype(dtype), jnp.asarray(starts, dtype)[i], jnp.asarray(lengths, dtype)[i]
