r"""The interpolation of an idle row's pending update, in NumPy or JAX; see `missed_updates`.

The terms of the sum after the first K (the `window`) are negligible: the momentum is spent. As a
function of u = log x, 1/(q + e^u) is analytic in |Im u| < pi whatever q >= 0, so it is interpolated
at the Q Chebyshev nodes X_i(s) of the interval between x_1(s) and x_K(s), which do not depend on
the row:

    sum_j D A rho^j / (q + x_j)  ~  sum_{i=1}^{Q} W_i(s) / (q + X_i(s)),
    W_i(s) = sum_j D A rho^j L_i(log x_j(s)),    L_i: the Lagrange basis.
"""

import bisect
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from adam_transforms._core import arguments

_MOST_NODES = 80


@dataclasses.dataclass(frozen=True)
class Rule:
    """The static settings, made by `make_rule`: `max_of` is None for Adam; `window` is K, `nodes`
    is Q."""

    b1: float
    b2: float
    eps: float
    eps_hat: bool
    max_of: str | None
    max_idle: int
    window: int
    nodes: int

    @property
    def scalars(self) -> "Scalars":
        constant = self.eps_hat or self.max_of == "corrected"
        return Scalars(
            log_b1=_log(self.b1),
            log_b2=_log(self.b2),
            eps=self.eps,
            window=float(self.window),
            growth=0.0 if self.max_of else -0.5 * _log(self.b2),
            correction=0.0 if constant else 0.5,
        )

    @property
    def settings(self) -> dict[str, None]:
        """What distinguishes it from a rule by which a history cannot go on, as keys without
        leaves: they are a part of the structure of a state, and checkpoints keep them."""
        names = ("b1", "b2", "eps", "eps_hat", "max_of")
        return {f"{name}={getattr(self, name)}": None for name in names}

    @property
    def log_rho(self) -> float:
        return _log(self.b1) - (0.0 if self.max_of else 0.5 * _log(self.b2))


class Scalars(NamedTuple):
    """Numbers of a rule.

    Attributes:
      log_b1, log_b2, eps: of the rule.
      window: K.
      growth: of log x_j in j.
      correction: 1/2 if x_j has the factor sqrt(1-b2^(s+j)), else 0.
    """

    log_b1: Any
    log_b2: Any
    eps: Any
    window: Any
    growth: Any
    correction: Any


def make_rule(
    b1: float,
    b2: float,
    eps: float,
    *,
    eps_hat: bool = False,
    max_of: str | None = None,
    max_idle: int,
    dtype: Any,
) -> Rule:
    """The rule whose `window` and `nodes` are just enough for rows computed in `dtype`.

    Relative to the sum, 1e-10 of the terms' size at float64 (1e-9 at float32) is left out after
    the window, and the interpolation errs by less than 1e-8 (2e-7, some roundings), as measured
    here.

    Args:
      b1, b2: decay rates in [0, 1).
      eps: large enough for the square of any x_j(s) to be a normal float32: at least 1.3e-17 at the
        default rates, 4e-19 with `eps_hat`.
      eps_hat: epsilon as in the formula just before Section 2.1 of the paper.
      max_of: None for Adam, "raw" or "corrected" for AMSGrad.
      max_idle: the most steps that a row may idle.
      dtype: float32 or float64.

    Raises:
      ValueError: an argument out of range; ``b1 >= sqrt(b2)`` without AMSGrad; more than
        `max_idle` terms matter; more than 80 nodes would be needed.
    """
    b1 = arguments.scalar("b1", b1, at_least=0.0, below=1.0)
    b2 = arguments.scalar("b2", b2, at_least=0.0, below=1.0)
    eps = arguments.scalar("eps", eps, at_least=0.0)
    max_idle = arguments.positive_int("max_idle", max_idle)
    if max_of is None and b1 >= math.sqrt(b2):
        raise ValueError(
            f"b1 must be below sqrt(b2), got b1={b1:g}, b2={b2:g}: an idle row's first moment "
            "would outlive the root of its second and drive it for ever; AMSGrad has no such limit"
        )
    double = np.dtype(dtype) == np.float64
    rule = Rule(b1, b2, eps, eps_hat, max_of, max_idle, window=1, nodes=1)
    least_x = math.exp(min(_log_x(rule.scalars, 0.0, 1.0, np), 0.0))  # in units of eps
    arguments.scalar("eps", eps, at_least=4e-19 / least_x)
    window = max(1, math.ceil(math.log(1e-10 if double else 1e-9) / rule.log_rho))
    if window > max_idle:
        raise ValueError(
            f"max_idle must be at least {window} for b1={b1:g}, b2={b2:g}, "
            f"the steps until an idle row's momentum is spent; got {max_idle}"
        )
    rule = dataclasses.replace(rule, window=window)
    candidates = [dataclasses.replace(rule, nodes=n) for n in range(1, _MOST_NODES + 1)]
    tolerance = 1e-8 if double else 2e-7
    enough = bisect.bisect_left(candidates, True, key=lambda r: _error(r) < tolerance)
    if enough == len(candidates):
        raise ValueError(
            f"b2 is too small for this b1, got b1={b1:g}, b2={b2:g}: {_MOST_NODES} nodes leave an "
            f"error of {_error(candidates[-1]):.0e} in the pending update of an idle row"
        )
    return candidates[enough]


def _log(b: float) -> float:
    """log b; of 0 a number whose exponential is 0, finite because 0**0 is 1."""
    return math.log(b) if b > 0.0 else -1e4


def _log_x(scalars: Scalars, s: Any, j: Any, xp: Any) -> Any:
    """log(x_j(s) / eps), for floating s and j that broadcast."""
    return scalars.growth * j + scalars.correction * xp.log(-xp.expm1((s + j) * scalars.log_b2))


def _chebyshev_zeros(n: int) -> np.ndarray:
    return np.cos(np.pi * (np.arange(n) + 0.5) / n)


def nodes_of(scalars: Scalars, nodes: int, s: Any, xp: Any) -> Any:
    """X_1(s) to X_Q(s), Q = `nodes`, of steps (m,); (m, Q)."""
    low, high = (_log_x(scalars, s, j, xp)[:, None] for j in (1.0, scalars.window))
    fractions = xp.asarray(0.5 + 0.5 * _chebyshev_zeros(nodes)[None], dtype=low.dtype)
    return scalars.eps * xp.exp(low + fractions * (high - low))


def lagrange_polynomials(rule: Rule, s: Any, j: Any, xp: Any) -> Any:
    """L_1 to L_Q at log x_j(s), the interval of s mapped to [-1, 1]; (..., Q)."""
    scalars = rule.scalars
    low, high = _log_x(scalars, s, 1.0, xp), _log_x(scalars, s, scalars.window, xp)
    width = xp.maximum(high - low, 1e-30)  # it is 0 once e_t no longer changes
    z = xp.clip(2.0 * (_log_x(scalars, s, j, xp) - low) / width - 1.0, -1.0, 1.0)
    # By the recurrence of Chebyshev's T_0 to T_{Q-1}. A product of matrices as small as these takes
    # ten times as long to set up as to compute.
    z = z[..., None]
    total, polynomials = 0.0, (xp.ones_like(z), z)
    for row in _chebyshev_to_lagrange(rule.nodes):
        coefficients = xp.asarray(row.reshape([1] * (z.ndim - 1) + [-1]), dtype=z.dtype)
        total = total + polynomials[0] * coefficients
        polynomials = polynomials[1], 2.0 * z * polynomials[1] - polynomials[0]
    return total


def _chebyshev_to_lagrange(n: int) -> np.ndarray:
    """The (n, n) matrix that takes T_0(z) to T_{n-1}(z) to L_1(z) to L_n(z)."""
    k = np.arange(n)[:, None]
    return np.where(k == 0, 1.0, 2.0) / n * np.cos(k * np.arccos(_chebyshev_zeros(n)))


@functools.cache
def _error(rule: Rule) -> float:
    """The worst relative error of the interpolated sum at a constant learning rate: over steps s
    from 0 to 10^6, gaps from 1 to K, and q / eps from 0 to 10^4."""
    if rule.window == 1:
        return 0.0
    s = np.array([0, 1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 1e6])[:, None]
    # At most 500 of the terms: the first, and some that stand for their neighbours.
    first = np.arange(1, min(rule.window, 100) + 1)
    j = np.unique(np.round(np.concatenate([first, np.linspace(1, rule.window, 400)])))
    q = rule.eps * np.concatenate([[0.0], np.logspace(-3, 4, 29)])
    term = np.exp(j * rule.log_rho) * np.diff(j, prepend=0.0)
    term = term / -np.expm1((s + j) * _log(rule.b1))
    if rule.max_of != "corrected":
        term = term * np.sqrt(-np.expm1((s + j) * _log(rule.b2)))
    gaps = np.unique(np.geomspace(1, len(j), 24).astype(int)) - 1

    x = rule.eps * np.exp(_log_x(rule.scalars, s, j, np))
    exact = np.cumsum(term[..., None] / (q + x[..., None]), axis=1)[:, gaps]
    basis = lagrange_polynomials(rule, s, j, np)
    weights = np.cumsum(term[..., None] * basis, axis=1)[:, gaps]
    nodes = nodes_of(rule.scalars, rule.nodes, s[:, 0], np)
    return float(np.max(np.abs(weights @ (1.0 / (q + nodes[..., None])) / exact - 1.0)))
