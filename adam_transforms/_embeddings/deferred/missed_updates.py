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

The sum over j is interpolated in x (`_interpolation`): for a row it is one of Q fractions,

    sum_j D A rho^j / (q + x_j)  ~  sum_{i=1}^{Q} W_i(s) / (q + X_i(s)),

with nodes X that depend on s alone. The weights W are linear in the terms, so each step adds one
term to those of the K steps before it. Both are kept in a ring, for the last `max_idle` steps,
whatever the number of rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from adam_transforms._core import dtypes
from adam_transforms._core.sparse_rows import explicit_sharding
from adam_transforms._embeddings.deferred.chebyshev import (
    Rule,
    Scalars,
    lagrange_polynomials,
    nodes_of,
)
from adam_transforms._transforms import numerics
from adam_transforms._xla import scheduling


class Ring(NamedTuple):
    """What idle rows are owed, by the step s since which they idle: entry s mod (max_idle + 1).

    It holds all that `missed` needs, so that tables can be read with a state alone.

    Attributes:
      weights, nodes: W(s) and X(s), (max_idle + 1, Q).
      log_decay: log D(0,s) as an unevaluated sum of two floats, (max_idle + 1, 2): one float32
        would round away the decay of a step. None for tables that do not decay.
      scalars: the numbers of the rule: some that `missed` needs, and all that tell it from another.

    All in float32 (float64 in x64 mode).
    """

    weights: jax.Array
    nodes: jax.Array
    log_decay: jax.Array | None
    scalars: Scalars


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
        p = p.astype(dtypes.promote(p.dtype, self.move.dtype))
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
        return self._now(nu, self.nu, jnp.zeros((), dtypes.real_dtype(self.move.dtype)))

    def _now(self, x: jax.Array, pair: jax.Array, move: jax.Array) -> jax.Array:
        """``pair * x - move`` where idle, else `x`."""
        x = x.astype(dtypes.promote(x.dtype, move.dtype))
        pair = pair.astype(dtypes.real_dtype(x.dtype))
        high, low = (_column(pair[:, i], x.ndim) for i in (0, 1))
        now = dtypes.scale(x, high) + (dtypes.scale(x, low) - move.astype(x.dtype))
        return jnp.where(_column(self.idle, x.ndim), now, x)


def empty_ring(rule: Rule, *, decays: bool = True) -> Ring:
    """The ring before the first step, of tables that decay or of such that do not."""
    size, dtype = rule.max_idle + 1, dtypes.scalar_dtype()
    scalars = Scalars(*(jnp.asarray(x, dtype) for x in rule.scalars))
    log_decay = jnp.zeros((size, 2), dtype) if decays else None
    first = nodes_of(rule, jnp.zeros((1,), dtype), jnp)
    nodes = jnp.broadcast_to(first, (size, rule.nodes))
    return Ring(jnp.zeros_like(nodes), nodes, log_decay, scalars)


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
    factor = learning_rate / numerics.bias_correction(rule.b1, count).astype(dtype)
    if rule.max_of != "corrected":
        factor = factor * jnp.sqrt(numerics.bias_correction(rule.b2, count).astype(dtype))
    term = factor * jnp.exp(j.astype(dtype) * rule.log_rho)
    basis = lagrange_polynomials(rule, jnp.maximum(s, 0).astype(dtype), j.astype(dtype), jnp)
    slots = jnp.mod(s, size)
    was = ring.weights.at[slots].get(mode="promise_in_bounds")
    change = term[:, None] * basis
    log_decay = None
    if ring.log_decay is not None:
        loss = jnp.minimum(learning_rate * jnp.asarray(weight_decay, dtype), 1.0)
        change = change - loss * was
        before = ring.log_decay.at[jnp.mod(count - 1, size)].get(mode="promise_in_bounds")
        after = scheduling.after(witness, _add(before, jnp.maximum(jnp.log1p(-loss), -100.0)))
        at = ring.log_decay.at[jnp.mod(count, size)]
        log_decay = at.set(after, mode="promise_in_bounds")
    now = was + change
    now = scheduling.after(witness, jnp.where(((j > 0) & (s >= 0))[:, None], now, 0.0))
    weights = ring.weights.at[slots].set(now, mode="promise_in_bounds", unique_indices=True)
    opened = scheduling.after(witness, nodes_of(rule, count.astype(dtype)[None], jnp))
    nodes = ring.nodes.at[slots[:1]].set(opened, mode="promise_in_bounds")
    return Ring(weights, nodes, log_decay, ring.scalars)


def missed(ring: Ring, mu: jax.Array, nu: jax.Array, last: jax.Array, count: jax.Array) -> Missed:
    """What rows missed in the steps after `last`, up to `count`, computed in at least float32.

    Args:
      mu: (n, D...), the first moments.
      nu: (n, D...), the second moments; with AMSGrad their maxima.
      last: int32 (n,), the step after which each row is up to date; at most `max_idle` ago.
      count: int32 (), the steps made.
    """
    ring, mu, nu, last, count = _as_arrays((ring, mu, nu, last, count))
    dtype = dtypes.compute_dtype(mu.dtype, nu.dtype)
    real = dtypes.real_dtype(dtype)
    size, scalars = ring.weights.shape[0], ring.scalars

    def read(array: jax.Array, step: jax.Array) -> jax.Array:
        """What a ring holds for each step, sharded as the steps are."""
        sharding = explicit_sharding(step)
        if sharding is not None:
            spec = PartitionSpec(*sharding.spec, *[None] * (array.ndim - 1))
            sharding = NamedSharding(sharding.mesh, spec)
        at = array.at[jnp.mod(step, size)]
        return at.get(mode="promise_in_bounds", out_sharding=sharding)

    weights, nodes = (
        scheduling.computed_once(read(array, last), instructions=4)
        for array in (ring.weights, ring.nodes)
    )
    decay, were_read = None, [weights, nodes]
    if ring.log_decay is not None:
        # The weights are those of the last step of the window.
        end = jnp.minimum(last + scalars.window.astype(jnp.int32), count)
        now, then, end = (
            scheduling.computed_once(read(ring.log_decay, step), instructions=4)
            for step in (count, last, end)
        )
        were_read += [now, then, end]
        weights = weights * jnp.exp(_difference(now, end))[:, None]
        decay = _exp(_difference(now, then))

    root = jnp.sqrt(dtypes.real(nu).astype(real))
    total = _sum_of_fractions(weights.astype(real), nodes.astype(real), root)

    gap = (count - last).astype(ring.weights.dtype)
    return Missed(
        idle=gap > 0,
        decay=decay,
        mu=_exp(gap * scalars.log_b1),
        nu=_exp(gap * scalars.log_b2),
        move=dtypes.scale(mu.astype(dtype), total),
        witness=tuple(map(_witness, were_read)),
    )


def _witness(x: jax.Array) -> jax.Array:
    """Of all of an array that is computed once: by its first row, if every device has that."""
    return scheduling.witness(x if explicit_sharding(x) else x[:1])


def _as_arrays(tree: Any) -> Any:
    """Of NumPy's arrays, as restored, and of Flax's variables around arrays, the JAX arrays."""
    return jax.tree.map(jnp.asarray, tree, is_leaf=lambda x: hasattr(x, "__jax_array__"))


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
