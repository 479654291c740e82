r"""What dense Adam does to a row while its gradient is zero, at the cost of a few divisions.

A row that is up to date after step s, with moments m and v, is after the idle steps s+1..t

    nu = b2^(t-s) v,    mu = b1^(t-s) m,
    p_t = D(s,t) p_s - m * sum_{j=1}^{t-s} D(s+j,t) A_{s+j} rho^j / (q + x_j(s))

    D(s,t) = prod_{i=s+1}^{t} (1 - lr_i * weight_decay)
    A_t    = lr_t * sqrt(1-b2^t) / (1-b1^t)
    rho    = b1 / sqrt(b2),  q = sqrt(v)
    x_j(s) = e_{s+j} b2^(-j/2),  e_t = eps * sqrt(1-b2^t), or just eps with `eps_hat`.

Under AMSGrad the denominator's maximum stands still: q is its root, rho = b1 and x_j(s) = e_{s+j};
with ``max_of="corrected"`` moreover A_t = lr_t / (1-b1^t) and e_t = eps.

The terms after the first K (the `window`) are negligible: the momentum is spent. As a function of
u = log x, 1/(q + e^u) is analytic in |Im u| < pi whatever q >= 0, so it is interpolated at the Q
Chebyshev nodes X_i(s) of the interval between x_1(s) and x_K(s), which do not depend on the row:

    sum_j D A rho^j / (q + x_j)  ~  sum_{i=1}^{Q} W_i(s) / (q + X_i(s)),
    W_i(s) = sum_j D A rho^j L_i(log x_j(s)),    L_i: the Lagrange basis.

The weights W are linear in the terms, so each step adds one term to those of the K steps before it.
They are kept in a ring, for the last `max_idle` steps, whatever the number of rows.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from adam_transforms import _arguments, _numerics
from adam_transforms.sparse._rows import explicit_sharding

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
    def log_rho(self) -> float:
        return _log(self.b1) - (0.0 if self.max_of else 0.5 * _log(self.b2))


class Ring(NamedTuple):
    """What idle rows are owed, by the step s since which they idle: entry s mod (max_idle + 1).

    It holds all that `missed` needs, so that tables can be read with a state alone.

    Attributes:
      weights: W(s), (max_idle + 1, Q).
      log_decay: log D(0,s) as an unevaluated sum of two floats, (max_idle + 1, 2): one float32
        would round away the decay of a step. None for tables that do not decay.
      scalars: the numbers of the rule that `missed` needs.

    All in float32 (float64 in x64 mode).
    """

    weights: jax.Array
    log_decay: jax.Array | None
    scalars: "Scalars"


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


class Missed(NamedTuple):
    """The steps that n rows missed. Each of the methods brings rows (n, D...) up to date, in the
    dtype of `move` at least; what missed nothing comes out bit for bit.

    Attributes:
      idle: whether any step was missed, bool (n,).
      decay, mu, nu: D(s,t), b1^(t-s) and b2^(t-s), each an unevaluated sum of two floats, (n, 2):
        0.999 rounded to float32, applied step by step, would bias nu by 1.3e-5. `decay` is None
        where there is none.
      move: what the momentum takes from the parameters, (n, D...).
      witness: what depends on all that was read from the ring (`_numerics.after`).
    """

    idle: jax.Array
    decay: jax.Array | None
    mu: jax.Array
    nu: jax.Array
    move: jax.Array
    witness: tuple[jax.Array, ...]

    def p_now(self, p: jax.Array) -> jax.Array:
        if self.decay is not None:
            return self._now(p, self.decay, self.move)
        p = p.astype(_numerics.promote(p.dtype, self.move.dtype))
        return jnp.where(_column(self.idle, p.ndim), p - self.move.astype(p.dtype), p)

    def p_change(self, p: jax.Array) -> jax.Array:
        """``p_now(p) - p``, without `p` where there is no decay: XLA then does not read it."""
        if self.decay is not None:
            now = self.p_now(p)
            return now - p.astype(now.dtype)
        zero = jnp.zeros((), self.move.dtype)
        return jnp.where(_column(self.idle, self.move.ndim), -self.move, zero)

    def mu_now(self, mu: jax.Array) -> jax.Array:
        return self._now(mu, self.mu, jnp.zeros((), self.move.dtype))

    def nu_now(self, nu: jax.Array) -> jax.Array:
        return self._now(nu, self.nu, jnp.zeros((), _numerics.real_dtype(self.move.dtype)))

    def _now(self, x: jax.Array, pair: jax.Array, move: jax.Array) -> jax.Array:
        """``pair * x - move`` where idle, else `x`."""
        x = x.astype(_numerics.promote(x.dtype, move.dtype))
        pair = pair.astype(_numerics.real_dtype(x.dtype))
        high, low = (_column(pair[:, i], x.ndim) for i in (0, 1))
        now = _numerics.scale(x, high) + (_numerics.scale(x, low) - move.astype(x.dtype))
        return jnp.where(_column(self.idle, x.ndim), now, x)


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
    the window, and the interpolation errs by less than 1e-8 (4e-8), as measured here.

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
    b1 = _arguments.scalar("b1", b1, at_least=0.0, below=1.0)
    b2 = _arguments.scalar("b2", b2, at_least=0.0, below=1.0)
    eps = _arguments.scalar("eps", eps, at_least=0.0)
    max_idle = _arguments.positive_int("max_idle", max_idle)
    if max_of is None and b1 >= math.sqrt(b2):
        raise ValueError(
            f"b1 must be below sqrt(b2), got b1={b1:g}, b2={b2:g}: an idle row's first moment "
            "would outlive the root of its second and drive it for ever; AMSGrad has no such limit"
        )
    double = np.dtype(dtype) == np.float64
    rule = Rule(b1, b2, eps, eps_hat, max_of, max_idle, window=1, nodes=1)
    _arguments.scalar(
        "eps", eps, at_least=4e-19 * math.exp(-min(_log_x(rule.scalars, 0.0, 1.0, np), 0.0))
    )
    window = max(1, math.ceil(math.log(1e-10 if double else 1e-9) / rule.log_rho))
    if window > max_idle:
        raise ValueError(
            f"max_idle must be at least {window} for b1={b1:g}, b2={b2:g}, "
            f"the steps until an idle row's momentum is spent; got {max_idle}"
        )
    rule = dataclasses.replace(rule, window=window)
    candidates = [dataclasses.replace(rule, nodes=n) for n in range(1, _MOST_NODES + 1)]
    tolerance = 1e-8 if double else 4e-8
    enough = bisect.bisect_left(candidates, True, key=lambda r: _error(r) < tolerance)
    if enough == len(candidates):
        raise ValueError(
            f"b2 is too small for this b1, got b1={b1:g}, b2={b2:g}: {_MOST_NODES} nodes leave an "
            f"error of {_error(candidates[-1]):.0e} in what an idle row is owed"
        )
    return candidates[enough]


def empty_ring(rule: Rule, *, decays: bool = True) -> Ring:
    """The ring before the first step, of tables that decay or of such that do not."""
    size, dtype = rule.max_idle + 1, _numerics.scalar_dtype()
    scalars = Scalars(*(jnp.asarray(x, dtype) for x in rule.scalars))
    log_decay = jnp.zeros((size, 2), dtype) if decays else None
    return Ring(jnp.zeros((size, rule.nodes), dtype), log_decay, scalars)


def advance(
    rule: Rule,
    ring: Ring,
    count: jax.Array,
    learning_rate: Any,
    weight_decay: Any,
    witness: Sequence[jax.Array] = (),
) -> Ring:
    """The ring after one more step: O(window * nodes**2), in place where the ring is donated.

    Args:
      count: int32 (), the number of the step: 1 for the first.
      learning_rate, weight_decay: of this step; `weight_decay` counts only for a ring of tables
        that decay. Their product is below 1: from 1 on, where dense Adam would turn a parameter's
        sign, the row comes out as without its parameter.
      witness: of what was read from the ring before this.
    """
    ring = _as_arrays(ring)
    dtype, size = ring.weights.dtype, rule.max_idle + 1
    learning_rate = jnp.asarray(learning_rate, dtype)

    # Entry s = t - j gets the j-th term of its sum; for j = 0 it is opened.
    j = jnp.arange(rule.window + 1, dtype=jnp.int32)
    s = count - j
    factor = learning_rate / _numerics.bias_correction(rule.b1, count).astype(dtype)
    if rule.max_of != "corrected":
        factor = factor * jnp.sqrt(_numerics.bias_correction(rule.b2, count).astype(dtype))
    term = factor * jnp.exp(j.astype(dtype) * rule.log_rho)
    polynomials = _polynomials(rule, jnp.maximum(s, 0).astype(dtype), j.astype(dtype), jnp)
    # Not `matmul`, which for so small a product takes ten times as long to set up as to compute.
    basis = jnp.sum(polynomials[:, :, None] * _to_lagrange(rule.nodes)[None].astype(dtype), axis=1)
    slots = jnp.mod(s, size)
    was = ring.weights.at[slots].get(mode="promise_in_bounds")
    change = term[:, None] * basis
    log_decay = None
    if ring.log_decay is not None:
        loss = jnp.minimum(learning_rate * jnp.asarray(weight_decay, dtype), 1.0)
        change = change - loss * was
        before = ring.log_decay.at[jnp.mod(count - 1, size)].get(mode="promise_in_bounds")
        after = _numerics.after(witness, _add(before, jnp.maximum(jnp.log1p(-loss), -100.0)))
        at = ring.log_decay.at[jnp.mod(count, size)]
        log_decay = at.set(after, mode="promise_in_bounds")
    now = was + change
    now = _numerics.after(witness, jnp.where(((j > 0) & (s >= 0))[:, None], now, 0.0))
    weights = ring.weights.at[slots].set(now, mode="promise_in_bounds", unique_indices=True)
    return Ring(weights, log_decay, ring.scalars)


def missed(ring: Ring, mu: jax.Array, nu: jax.Array, last: jax.Array, count: jax.Array) -> Missed:
    """What rows missed in the steps after `last`, up to `count`, computed in at least float32.

    Args:
      mu: (n, D...), the first moments.
      nu: (n, D...), the second moments; with AMSGrad their maxima.
      last: int32 (n,), the step after which each row is up to date; at most `max_idle` ago.
      count: int32 (), the steps made.
    """
    ring, mu, nu, last, count = _as_arrays((ring, mu, nu, last, count))
    dtype = _numerics.compute_dtype(mu.dtype, nu.dtype)
    real = _numerics.real_dtype(dtype)
    size, scalars = ring.weights.shape[0], ring.scalars

    def read(array: jax.Array, step: jax.Array) -> jax.Array:
        """What a ring holds for each step, sharded as the steps are."""
        sharding = explicit_sharding(step)
        if sharding is not None:
            spec = PartitionSpec(*sharding.spec, *[None] * (array.ndim - 1))
            sharding = NamedSharding(sharding.mesh, spec)
        at = array.at[jnp.mod(step, size)]
        return at.get(mode="promise_in_bounds", out_sharding=sharding)

    weights = _numerics.computed_once(read(ring.weights, last))
    decay, were_read = None, [weights]
    if ring.log_decay is not None:
        # The weights are those of the last step of the window.
        end = jnp.minimum(last + scalars.window.astype(jnp.int32), count)
        now, then, end = (
            _numerics.computed_once(read(ring.log_decay, step)) for step in (count, last, end)
        )
        were_read += [now, then, end]
        weights = weights * jnp.exp(_difference(now, end))[:, None]
        decay = _exp(_difference(now, then))

    nodes = _nodes(scalars, weights.shape[1], last.astype(ring.weights.dtype), jnp).astype(real)
    root = jnp.sqrt(_numerics.real(nu).astype(real))
    total = _sum_of_fractions(weights.astype(real), nodes, root)

    gap = (count - last).astype(ring.weights.dtype)
    return Missed(
        idle=gap > 0,
        decay=decay,
        mu=_exp(gap * scalars.log_b1),
        nu=_exp(gap * scalars.log_b2),
        move=_numerics.scale(mu.astype(dtype), total),
        witness=tuple(map(_numerics.witness, were_read)),
    )


def _as_arrays(tree: Any) -> Any:
    """Of NumPy's arrays, as restored, and of Flax's variables around arrays, the JAX arrays."""
    return jax.tree.map(jnp.asarray, tree, is_leaf=lambda x: hasattr(x, "__jax_array__"))


# ---- the interpolation, in NumPy or JAX ---------------------------------------------------------


def _log(b: float) -> float:
    """log b; of 0 a number whose exponential is 0, finite because 0**0 is 1."""
    return math.log(b) if b > 0.0 else -1e4


def _log_x(scalars: Scalars, s: Any, j: Any, xp: Any) -> Any:
    """log(x_j(s) / eps), for floating s and j that broadcast."""
    return scalars.growth * j + scalars.correction * xp.log(-xp.expm1((s + j) * scalars.log_b2))


def _chebyshev_zeros(n: int) -> np.ndarray:
    return np.cos(np.pi * (np.arange(n) + 0.5) / n)


def _nodes(scalars: Scalars, n: int, s: Any, xp: Any) -> Any:
    """X_1(s) to X_n(s) of steps (m,); (m, n)."""
    low, high = (_log_x(scalars, s, j, xp)[:, None] for j in (1.0, scalars.window))
    fractions = xp.asarray(0.5 + 0.5 * _chebyshev_zeros(n)[None], dtype=low.dtype)
    return scalars.eps * xp.exp(low + fractions * (high - low))


def _polynomials(rule: Rule, s: Any, j: Any, xp: Any) -> Any:
    """T_0 to T_{Q-1} at log x_j(s), the interval of s mapped to [-1, 1]; (..., Q)."""
    scalars = rule.scalars
    low, high = _log_x(scalars, s, 1.0, xp), _log_x(scalars, s, scalars.window, xp)
    width = xp.maximum(high - low, 1e-30)  # it is 0 once e_t no longer changes
    z = xp.clip(2.0 * (_log_x(scalars, s, j, xp) - low) / width - 1.0, -1.0, 1.0)
    polynomials = [xp.ones_like(z), z]
    while len(polynomials) < rule.nodes:
        polynomials.append(2.0 * z * polynomials[-1] - polynomials[-2])
    return xp.stack(polynomials[: rule.nodes], axis=-1)


def _to_lagrange(n: int) -> np.ndarray:
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
    basis = _polynomials(rule, s, j, np) @ _to_lagrange(rule.nodes)
    weights = np.cumsum(term[..., None] * basis, axis=1)[:, gaps]
    nodes = _nodes(rule.scalars, rule.nodes, s[:, 0], np)
    return float(np.max(np.abs(weights @ (1.0 / (q + nodes[..., None])) / exact - 1.0)))


def _sum_of_fractions(weights: jax.Array, nodes: jax.Array, root: jax.Array) -> jax.Array:
    """sum_i W_i / (q + X_i), two fractions a division: divisions are most of what a row costs.

    Args:
      weights, nodes: W and X of each row, (n, Q).
      root: q, (n, D...).
    """
    # Unrolled, so that XLA makes it one loop over the elements without an array of (n, D, Q).
    fractions = [
        (_column(weights[:, i], root.ndim), root + _column(nodes[:, i], root.ndim))
        for i in range(nodes.shape[1])
    ]
    total = jnp.zeros((), root.dtype)
    for (a, x), (b, y) in zip(fractions[::2], fractions[1::2], strict=False):
        total = total + (a * y + b * x) / (x * y)
    if len(fractions) % 2:
        a, x = fractions[-1]
        total = total + a / x
    return total


# ---- sums of two floats, (..., 2) ---------------------------------------------------------------


def _add(pair: jax.Array, x: jax.Array) -> jax.Array:
    """pair + x, (2,), right to nearly twice the precision (Knuth's two-sum)."""
    high, low = pair[0], pair[1]
    total = high + x
    shift = total - high
    low = low + ((high - (total - shift)) + (x - shift))
    rounded = total + low
    return jnp.stack([rounded, low - (rounded - total)])


def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    """a - b, as one float."""
    return (a[..., 0] - b[..., 0]) + (a[..., 1] - b[..., 1])


def _exp(x: jax.Array) -> jax.Array:
    """e^x for x <= 0: 1 + expm1(x) while that is the more accurate."""
    near = x > -0.5
    high = jnp.where(near, 1.0, jnp.exp(x))
    return jnp.stack([high, jnp.where(near, jnp.expm1(x), 0.0)], axis=-1)


def _column(x: jax.Array, ndim: int) -> jax.Array:
    """(n,) as (n, 1, ...)."""
    return x.reshape(-1, *[1] * (ndim - 1))
