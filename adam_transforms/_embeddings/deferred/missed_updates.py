r"""What dense Adam does to a row while its gradient is zero, at the cost of a few divisions.

A row that is synchronized after step s, with moments m and v, is after the idle steps s+1..t

    nu = b2^(t-s) v,    mu = b1^(t-s) m,
    p_t = D(s,t) p_s - m * sum_{j=1}^{t-s} D(s+j,t) A_{s+j} rho^j / (q + x_j(s))

    D(s,t) = prod_{i=s+1}^{t} (1 - lr_i * weight_decay)
    A_t    = lr_t * sqrt(1-b2^t) / (1-b1^t)
    rho    = b1 / sqrt(b2),  q = sqrt(v)
    x_j(s) = e_{s+j} b2^(-j/2),  e_t = eps * sqrt(1-b2^t), or just eps with `eps_hat`.

Under AMSGrad the denominator's maximum stands still: q is its root, rho = b1 and x_j(s) = e_{s+j};
with ``max_of="corrected"`` moreover A_t = lr_t / (1-b1^t) and e_t = eps.

The sum over j is interpolated in x (`chebyshev`): for a row it is one of Q fractions,

    sum_j D A rho^j / (q + x_j)  ~  sum_{i=1}^{Q} W_i(s) / (q + X_i(s)),

with nodes X that depend on s alone. The weights W(s) are sums of one term for each step
after s. A step therefore adds its term to the weights of the K steps before it. A ring buffer keeps
both for the last `max_idle` steps, whatever the number of rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from adam_transforms._core import dtypes
from adam_transforms._core.serialization import serializable_tuple
from adam_transforms._core.sparse_rows import explicit_sharding
from adam_transforms._embeddings.deferred.chebyshev import (
    Rule,
    Scalars,
    lagrange_polynomials,
    nodes_of,
)
from adam_transforms._transforms import numerics
from adam_transforms._xla.scheduling import materialize


@serializable_tuple
class UpdateHistory(NamedTuple):
    """The effect of the last steps on an idle row: entry s mod (max_idle + 1) holds that of the
    steps after s.

    It contains all that `pending_update` needs, so that a state alone is enough to read tables.

    Attributes:
      weights, nodes: W(s) and X(s), (max_idle + 1, Q).
      log_decay: log D(0,s) as an unevaluated sum of two floats, (max_idle + 1, 2): one float32
        would round away the decay of a step. None for tables without weight decay.
      scalars: the numbers of the rule: those that `pending_update` needs, and all that distinguish
        it from another rule.
      settings: ``{"b1=0.9": None, ...}`` (`Rule.settings`); None in states that have none yet.

    All arrays are in float32 (float64 in x64 mode).
    """

    weights: jax.Array
    nodes: jax.Array
    log_decay: jax.Array | None
    scalars: Scalars
    settings: dict[str, None] | None = None


class HistoryRows(NamedTuple):
    """The entries of an `UpdateHistory` for n rows.

    Attributes:
      gap: int32 (n,), the steps that each row has been idle.
      weights, nodes: (n, Q), of the row's last step.
      log_decay: (n, 2) at the present step, at the row's last step, and at the end of its window;
        None without weight decay.
      scalars: as in the history.
    """

    gap: jax.Array
    weights: jax.Array
    nodes: jax.Array
    log_decay: tuple[jax.Array, jax.Array, jax.Array] | None
    scalars: Scalars

    def arrays(self) -> tuple[Any, ...]:
        """All that was read of the history."""
        return self.weights, self.nodes, self.log_decay


class PendingUpdate(NamedTuple):
    """The updates that n rows missed while idle.

    Each method applies the pending updates, in at least `move`'s dtype. Rows without any are
    returned unchanged, bit for bit.

    Attributes:
      idle: bool (n,), whether any step was missed.
      decay, mu, nu: D(s,t), b1^(t-s) and b2^(t-s), each an unevaluated sum of two floats, (n, 2):
        0.999 rounded to float32, applied step by step, would bias nu by 1.3e-5. `decay` is None
        without weight decay.
      move: (n, D...), the movement of the parameters on their momentum.
    """

    idle: jax.Array
    decay: jax.Array | None
    mu: jax.Array
    nu: jax.Array
    move: jax.Array

    def apply_to_params(self, p: jax.Array) -> jax.Array:
        if self.decay is not None:
            return self._where_idle(p, self.decay, self.move)
        p = p.astype(dtypes.promote(p.dtype, self.move.dtype))
        return jnp.where(_column(self.idle, p.ndim), p - self.move.astype(p.dtype), p)

    def delta(self, p: jax.Array) -> jax.Array:
        """``apply_to_params(p) - p``; without weight decay `p` is not read."""
        if self.decay is not None:
            now = self.apply_to_params(p)
            return now - p.astype(now.dtype)
        zero = jnp.zeros((), self.move.dtype)
        return jnp.where(_column(self.idle, self.move.ndim), -self.move, zero)

    def apply_to_slots(self, slots: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """mu, nu and perhaps nu_max after the pending updates."""
        mu, nu, *nu_max = slots
        return self.decay_mu(mu), self.decay_nu(nu), *nu_max

    def decay_mu(self, mu: jax.Array) -> jax.Array:
        return self._where_idle(mu, self.mu, jnp.zeros((), self.move.dtype))

    def decay_nu(self, nu: jax.Array) -> jax.Array:
        now = self._where_idle(nu, self.nu, jnp.zeros((), dtypes.real_dtype(self.move.dtype)))
        # The sum of two floats, times an infinity, would be infinity minus infinity.
        return jnp.where(jnp.isinf(nu), nu.astype(now.dtype), now)

    def _where_idle(self, x: jax.Array, factor: jax.Array, move: jax.Array) -> jax.Array:
        return _where_idle(self.idle, jnp.asarray(x), factor, move)


@jax.jit
def _where_idle(idle: jax.Array, x: jax.Array, factor: jax.Array, move: jax.Array) -> jax.Array:
    """``factor * x - move`` where idle, else `x`."""
    x = x.astype(dtypes.promote(x.dtype, move.dtype))
    factor = factor.astype(dtypes.real_dtype(x.dtype))
    high, low = (_column(factor[:, i], x.ndim) for i in (0, 1))
    now = dtypes.scale(x, high) + (dtypes.scale(x, low) - move.astype(x.dtype))
    return jnp.where(_column(idle, x.ndim), now, x)


def empty_history(rule: Rule, *, decays: bool = True) -> UpdateHistory:
    """The history before the first step; `decays` says whether the tables have weight decay."""
    size, dtype = rule.max_idle + 1, dtypes.scalar_dtype()
    scalars = Scalars(*(jnp.asarray(x, dtype) for x in rule.scalars))
    log_decay = jnp.zeros((size, 2), dtype) if decays else None
    first = nodes_of(rule.scalars, rule.nodes, jnp.zeros((1,), dtype), jnp)
    nodes = jnp.broadcast_to(first, (size, rule.nodes))
    return UpdateHistory(jnp.zeros_like(nodes), nodes, log_decay, scalars, rule.settings)


def restarted(history: UpdateHistory, count: jax.Array) -> UpdateHistory:
    """The history after `count` steps, for rows that are synchronized after all of them."""
    history = _as_arrays(history)
    size, num_nodes = history.nodes.shape
    s = count.astype(history.nodes.dtype)[None]
    first = nodes_of(history.scalars, num_nodes, s, jnp)
    log_decay = history.log_decay
    return history._replace(
        weights=jnp.zeros_like(history.weights),
        nodes=history.nodes.at[jnp.mod(count, size)].set(first[0]),
        log_decay=None if log_decay is None else jnp.zeros_like(log_decay),
    )


def advance(
    rule: Rule, history: UpdateHistory, count: jax.Array, learning_rate: Any, weight_decay: Any
) -> UpdateHistory:
    """The history after one more step: O(window * nodes**2), in place where it is donated.

    Args:
      count: int32 (), the number of the step: 1 for the first.
      learning_rate, weight_decay: of this step; `weight_decay` counts only where tables decay.
        Their product is below 1: from 1 on, where dense Adam would turn a parameter's sign, the
        parameter counts as zero.
    """
    history = _as_arrays(history)
    dtype, size = history.weights.dtype, rule.max_idle + 1
    learning_rate = jnp.asarray(learning_rate, dtype)

    # Entry s = t - j gets the j-th term of its sum; for j = 0 it starts.
    j = jnp.arange(rule.window + 1, dtype=jnp.int32)
    s = count - j
    factor = learning_rate / numerics.bias_correction(rule.b1, count).astype(dtype)
    if rule.max_of != "corrected":
        factor = factor * jnp.sqrt(numerics.bias_correction(rule.b2, count).astype(dtype))
    term = factor * jnp.exp(j.astype(dtype) * rule.log_rho)
    basis = lagrange_polynomials(rule, jnp.maximum(s, 0).astype(dtype), j.astype(dtype), jnp)
    entries = jnp.mod(s, size)
    before = history.weights.at[entries].get(mode="promise_in_bounds")
    change = term[:, None] * basis
    log_decay = None
    if history.log_decay is not None:
        loss = jnp.minimum(learning_rate * jnp.asarray(weight_decay, dtype), 1.0)
        change = change - loss * before
        last = history.log_decay.at[jnp.mod(count - 1, size)].get(mode="promise_in_bounds")
        now = _add(last, jnp.maximum(jnp.log1p(-loss), -100.0))
        at = history.log_decay.at[jnp.mod(count, size)]
        log_decay = at.set(now, mode="promise_in_bounds")
    after = jnp.where(((j > 0) & (s >= 0))[:, None], before + change, 0.0)
    weights = history.weights.at[entries].set(after, mode="promise_in_bounds", unique_indices=True)
    first = nodes_of(rule.scalars, rule.nodes, count.astype(dtype)[None], jnp)
    nodes = history.nodes.at[entries[:1]].set(first, mode="promise_in_bounds")
    return history._replace(weights=weights, nodes=nodes, log_decay=log_decay)


def next_count(count: jax.Array, size: int) -> jax.Array:
    """``count + 1``; after the largest integer, the one that is `size` below its successor.

    A history of `size` entries, and gaps between counts modulo `size`, do not see the difference,
    nor does the round robin; bias corrections have long been 1.
    """
    largest = jnp.iinfo(count.dtype).max
    return jnp.where(count == largest, largest - size + 1, count + 1)


def gap_of(last_step: jax.Array, count: jax.Array, size: int) -> jax.Array:
    """The steps from `last_step` to `count`, less than `size`; see `next_count`."""
    gap = count - last_step
    return jnp.where(gap < 0, gap + size, gap)


def gather_history(history: UpdateHistory, last_step: jax.Array, count: jax.Array) -> HistoryRows:
    """The entries of the history for rows that are synchronized after `last_step`.

    Args:
      last_step: int32 (n,), at most `max_idle` steps ago.
      count: int32 (), the steps made.
    """
    return _gather_history(*_as_arrays((history, last_step, count)))


# Jitted, as are those below: a program of many tables contains each once.
@jax.jit
def _gather_history(history: UpdateHistory, last_step: jax.Array, count: jax.Array) -> HistoryRows:
    size = history.weights.shape[0]

    def entries(array: jax.Array, step: jax.Array) -> jax.Array:
        """The entry of each step, sharded as the steps are."""
        sharding = explicit_sharding(step)
        if sharding is not None:
            spec = PartitionSpec(*sharding.spec, *[None] * (array.ndim - 1))
            sharding = NamedSharding(sharding.mesh, spec)
        at = array.at[jnp.mod(step, size)]
        return materialize(at.get(mode="promise_in_bounds", out_sharding=sharding))

    weights, nodes = (entries(array, last_step) for array in (history.weights, history.nodes))
    gap, log_decay = gap_of(last_step, count, size), None
    if history.log_decay is not None:
        # The weights are those of the last step of the window.
        end = count - jnp.maximum(gap - history.scalars.window.astype(jnp.int32), 0)
        now, then, end = (entries(history.log_decay, step) for step in (count, last_step, end))
        log_decay = (now, then, end)
    return HistoryRows(gap, weights, nodes, log_decay, history.scalars)


def pending_update(rows: HistoryRows, mu: jax.Array, nu: jax.Array) -> PendingUpdate:
    """The updates that rows missed, computed in at least float32.

    Args:
      rows: their entries of the history.
      mu: (n, D...), the first moments.
      nu: (n, D...), the second moments; with AMSGrad their maxima.
    """
    return _pending_update(rows, *_as_arrays((mu, nu)))


@jax.jit
def _pending_update(rows: HistoryRows, mu: jax.Array, nu: jax.Array) -> PendingUpdate:
    dtype = dtypes.compute_dtype(mu.dtype, nu.dtype)
    real = dtypes.real_dtype(dtype)
    weights, decay = rows.weights, None
    if rows.log_decay is not None:
        now, then, end = rows.log_decay
        weights = weights * jnp.exp(_difference(now, end))[:, None]
        decay = _exp(_difference(now, then))
    root = jnp.sqrt(dtypes.real(nu).astype(real))
    total = _sum_of_fractions(weights.astype(real), rows.nodes.astype(real), root)
    total = jnp.where(jnp.isinf(root), 0.0, total)
    gap = rows.gap.astype(rows.weights.dtype)
    return PendingUpdate(
        idle=rows.gap > 0,
        decay=decay,
        mu=_exp(gap * rows.scalars.log_b1),
        nu=_exp(gap * rows.scalars.log_b2),
        move=dtypes.scale(mu.astype(dtype), total),
    )


def _as_arrays(tree: Any) -> Any:
    """JAX arrays in place of NumPy's, as restored, and of Flax's variables around arrays."""
    return jax.tree.map(jnp.asarray, tree, is_leaf=lambda x: hasattr(x, "__jax_array__"))


def _sum_of_fractions(weights: jax.Array, nodes: jax.Array, root: jax.Array) -> jax.Array:
    """sum_i W_i / (q + X_i), two fractions a division: divisions are most of what a row costs.

    Args:
      weights, nodes: W and X of each row, (n, Q).
      root: q, (n, D...).
    """
    # One expression of Q terms: a sum over an axis would need an array of (n, D, Q).
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
