"""The rules this package promises, in plain float64 NumPy: readable, slow, and independent of JAX.

Trees are flat dictionaries from a parameter's name to its array, which may be `Bounded`: then the
results are. A number that may be scheduled is either a number or a function of the count of steps
taken before this one.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from bounds import Bounded, overflowing

Tree = dict[str, np.ndarray]
Scheduled = float | Callable[[int], float]


def value_at(value: Scheduled, count: int) -> float:
    return float(value(count)) if callable(value) else float(value)


def as_float64(tree: Mapping[str, np.ndarray]) -> Tree:
    """A copy in float64, or in complex128 where the array is complex."""
    return {
        k: x if isinstance(x, Bounded) else np.array(x, np.result_type(x, np.float64))
        for k, x in tree.items()
    }


# Adam


class Adam:
    """Adam's direction, without sign or learning rate, and its moments.

    `eps_hat` puts epsilon beside the uncorrected root of the second moment. `max_of` makes it
    AMSGrad: the maximum is over "corrected" or "raw" second moments. Under scheduled betas the bias
    correction is one minus the product of the betas so far, and Nesterov's momentum is the next
    step's (Dozat 2016). `nu_per_row` takes the mean of squares over the last axis, of two or more.
    """

    def __init__(
        self,
        b1: Scheduled = 0.9,
        b2: Scheduled = 0.999,
        eps: Scheduled = 1e-8,
        eps_root: Scheduled = 0.0,
        *,
        eps_hat: bool = False,
        nesterov: bool = False,
        max_of: str | None = None,
        bias_correction_mu: bool = True,
        bias_correction_nu: bool = True,
        nu_per_row: bool = False,
    ):
        self.b1, self.b2, self.eps, self.eps_root = b1, b2, eps, eps_root
        self.eps_hat, self.nesterov, self.max_of = eps_hat, nesterov, max_of
        self.bias_correction_mu, self.bias_correction_nu = bias_correction_mu, bias_correction_nu
        self.nu_per_row = nu_per_row
        self.count = 0
        self.b1_product = self.b2_product = 1.0
        self.mu: Tree = {}
        self.nu: Tree = {}
        self.nu_max: Tree = {}

    def direction(self, grads: Mapping[str, np.ndarray]) -> Tree:
        numbers = (self.b1, self.b2, self.eps, self.eps_root)
        b1, b2, eps, eps_root = (value_at(x, self.count) for x in numbers)
        self.count += 1
        b1_next = value_at(self.b1, self.count)
        self.b1_product *= b1
        self.b2_product *= b2
        correction_1 = 1.0 - self.b1_product if self.bias_correction_mu else 1.0
        correction_2 = 1.0 - self.b2_product if self.bias_correction_nu else 1.0
        result = {}
        for name, g in as_float64(grads).items():
            squared = np.square(np.abs(g))
            if self.nu_per_row and g.ndim > 1:
                squared = squared.mean(axis=-1, keepdims=True)
            m = b1 * self.mu.get(name, np.zeros_like(g)) + (1 - b1) * g
            v = b2 * self.nu.get(name, np.zeros_like(squared)) + (1 - b2) * squared
            v = overflowing(v)
            self.mu[name], self.nu[name] = m, v
            if self.nesterov:
                look_ahead = b1_next * m / (1.0 - self.b1_product * b1_next)
                m_hat = look_ahead + (1 - b1) * g / correction_1
            else:
                m_hat = m / correction_1
            if self.max_of == "corrected":
                v = overflowing(v / correction_2)
            if self.max_of is not None:
                v = np.maximum(self.nu_max.get(name, np.zeros_like(v)), v)
                self.nu_max[name] = v
            if self.max_of == "corrected":
                root = np.sqrt(v + eps_root) + eps
            elif self.eps_hat:
                root = (np.sqrt(v + eps_root) + eps) / np.sqrt(correction_2)
            else:
                root = np.sqrt(v / correction_2 + eps_root) + eps
            result[name] = m_hat / root
        return result


# Gradients, before Adam


def global_norm(tree: Mapping[str, np.ndarray]) -> float:
    return np.sqrt(sum(np.sum(np.square(np.abs(x))) for x in as_float64(tree).values()))


def clip_by_value(grads: Mapping[str, np.ndarray], limit: float) -> Tree:
    """The real and the imaginary part each on its own."""

    def clip(g: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(g):
            return clip(np.real(g)) + 1j * clip(np.imag(g))
        return np.clip(g, -limit, limit)

    return {k: clip(g) for k, g in as_float64(grads).items()}


def clip_by_norm(grads: Mapping[str, np.ndarray], max_norm: float) -> Tree:
    """Each array on its own."""
    return {k: clip_by_global_norm({k: g}, max_norm)[k] for k, g in grads.items()}


def clip_by_global_norm(grads: Mapping[str, np.ndarray], max_norm: float) -> Tree:
    factor = max_norm / np.maximum(global_norm(grads), max_norm)
    return {k: g * factor for k, g in as_float64(grads).items()}


class Accumulation:
    """Collects `every` gradients; `add` gives their mean (or sum) on the last, else None.

    A name that lacks a gradient adds nothing to its sum; on the last, it has no mean either. A
    gradient of weight zero counts for nothing, and a cycle of them gives none. `every` may be
    scheduled by the number of cycles.
    """

    def __init__(self, every: Scheduled, *, average: bool = True):
        self.every, self.average = every, average
        self.mini_step = self.cycles = 0
        self.weight = 0.0
        self.total: Tree = {}

    def add(
        self, grads: Mapping[str, np.ndarray], weight: float = 1.0, emit: bool = False
    ) -> Tree | None:
        if self.mini_step == 0:
            self.total, self.weight = {}, 0.0
        for name, g in as_float64(grads).items():
            weighed = g * weight if weight else np.zeros_like(g)
            self.total[name] = self.total[name] + weighed if name in self.total else weighed
        self.weight += weight
        self.mini_step += 1
        if self.mini_step < value_at(self.every, self.cycles) and not emit:
            return None
        return self.end(grads)

    def end(self, names: Collection[str]) -> Tree | None:
        """The mean of the cycle so far, for these names."""
        self.mini_step = 0
        if not self.weight:
            return None
        self.cycles += 1
        return {k: self.total[k] / (self.weight if self.average else 1.0) for k in names}


class LossScale:
    """Keras's dynamic loss scale; `unscale` gives None for a step that is to be skipped."""

    def __init__(
        self,
        scale: float,
        growth_interval: int,
        factor: float = 2.0,
        min_scale: float = 1.0,
        max_scale: float = np.inf,
    ):
        self.scale, self.growth_interval = scale, growth_interval
        self.factor, self.min_scale, self.max_scale = factor, min_scale, max_scale
        self.finite_steps = self.skipped = 0

    def unscale(self, grads: Mapping[str, np.ndarray]) -> Tree | None:
        used = self.scale
        if not all(np.all(np.isfinite(g)) for g in grads.values()):
            lower_bound = np.minimum(self.scale, self.min_scale)
            self.scale = np.maximum(self.scale / self.factor, lower_bound)
            self.finite_steps = 0
            self.skipped += 1
            return None
        self.finite_steps += 1
        if self.finite_steps == self.growth_interval:
            self.scale = np.minimum(self.scale * self.factor, self.max_scale)
            self.finite_steps = 0
        return {k: g / used for k, g in as_float64(grads).items()}


# Parameters, after Adam


def never(count: int) -> bool:
    return False


def on_every(n: int) -> Callable[[int], bool]:
    """On the n-th step, the 2n-th, and so on."""
    return lambda count: (count + 1) % n == 0


class Ema:
    """The average of the parameters. The first is a copy, unless `debias` starts from zero, or
    `start` is what the average starts from."""

    def __init__(
        self,
        decay: Scheduled,
        overwrite_when: Callable[[int], bool] = never,
        *,
        debias: bool = False,
        start: Mapping[str, np.ndarray] | None = None,
    ):
        self.decay, self.overwrite_when, self.debias = decay, overwrite_when, debias
        self.count = 0
        self.decay_product = 1.0
        self.average: Tree = {} if start is None else as_float64(start)

    def values(self) -> Tree:
        weight = 1.0 - self.decay_product if self.debias else 1.0
        return {k: x / weight for k, x in self.average.items()}

    def update(self, params: Mapping[str, np.ndarray]) -> Tree:
        """Takes the updated parameters; gives them back, or the average that overwrites them."""
        decay = value_at(self.decay, self.count)
        params = as_float64(params)
        if not self.average:
            self.average = {k: np.zeros_like(p) for k, p in params.items()}
            decay = decay if self.debias else 0.0
        self.decay_product *= decay
        self.average = {k: decay * self.average[k] + (1 - decay) * p for k, p in params.items()}
        overwrite = self.overwrite_when(self.count)
        self.count += 1
        return self.values() if overwrite else params


# All of it together


class Training:
    """One run: unscale, accumulate, clip, decay, Adam, average, in that order (Keras's).

    `average_every_call` puts the average outside accumulation, where Keras has it: it is then taken
    after held steps as well. `learning_rate` may be a mapping from names to rates.
    """

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        adam: Adam,
        learning_rate: Scheduled | Mapping[str, float],
        *,
        maximize: bool = False,
        loss_scale: LossScale | float = 1.0,
        accumulation: Accumulation | None = None,
        clips: Sequence[Callable[[Tree], Tree]] = (),
        l2: float = 0.0,
        weight_decay: float = 0.0,
        decayed: Collection[str] | None = None,
        ema: Ema | None = None,
        average_every_call: bool = False,
    ):
        self.params = as_float64(params)
        self.adam, self.learning_rate = adam, learning_rate
        self.sign = -1.0 if maximize else 1.0
        self.loss_scale = loss_scale
        self.accumulation = Accumulation(1) if accumulation is None else accumulation
        self.clips, self.l2, self.weight_decay = clips, l2, weight_decay
        self.decayed = frozenset(params) if decayed is None else frozenset(decayed)
        self.ema, self.average_every_call = ema, average_every_call

    def step(self, grads: Mapping[str, np.ndarray]) -> Tree:
        """Takes one gradient, gives the parameters after it."""
        if isinstance(self.loss_scale, LossScale):
            unscaled = self.loss_scale.unscale(grads)
        else:
            unscaled = {k: g / self.loss_scale for k, g in as_float64(grads).items()}
        if unscaled is None:
            return self.params
        total = self.accumulation.add(unscaled)
        if total is not None:
            self._update(total)
        if self.ema is not None and (total is not None or self.average_every_call):
            self.params = self.ema.update(self.params)
        return self.params

    def _update(self, grads: Tree) -> None:
        for clip in self.clips:
            grads = clip(grads)
        grads = {k: self.sign * g + self.l2 * self.params[k] for k, g in grads.items()}
        count = self.adam.count
        params = {}
        for name, direction in self.adam.direction(grads).items():
            if isinstance(self.learning_rate, Mapping):
                rate = self.learning_rate[name]
            else:
                rate = value_at(self.learning_rate, count)
            p = self.params[name]
            decay = self.weight_decay if name in self.decayed else 0.0
            params[name] = p - rate * (direction + decay * p)
        self.params = params


# Learning rates


def exponential_decay(
    initial: float, decay_steps: float, decay_rate: float, staircase: bool = False
) -> Callable[[int], float]:
    def rate(count):
        periods = count / decay_steps
        return initial * decay_rate ** (np.floor(periods) if staircase else periods)

    return rate


def cosine_decay(
    initial: float,
    decay_steps: int,
    alpha: float = 0.0,
    warmup_target: float | None = None,
    warmup_steps: int = 0,
) -> Callable[[int], float]:
    """Keras's: `decay_steps` do not count the linear warm-up, which there is only with a target."""
    peak, warmup = (initial, 0) if warmup_target is None else (warmup_target, warmup_steps)

    def rate(count):
        if count < warmup:
            return initial + (peak - initial) * count / warmup
        done = min(count - warmup, decay_steps) / decay_steps
        return peak * (alpha + (1 - alpha) * 0.5 * (1 + np.cos(np.pi * done)))

    return rate


def inverse_time_decay(initial: Scheduled, decay: float) -> Callable[[int], float]:
    return lambda count: value_at(initial, count) / (1 + decay * count)
