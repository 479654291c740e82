import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import assert_bits_equal, in_tiers, types, x64

from adam_transforms._embeddings.deferred.chebyshev import Rule, make_rule
from adam_transforms._embeddings.deferred.missed_updates import (
    PendingUpdate,
    UpdateHistory,
    advance,
    empty_history,
    gather_history,
    pending_update,
)

EPS = 1e-8
FORMS: dict[str, dict[str, Any]] = {
    "eps": {},
    "eps hat": {"eps_hat": True},
    "AMSGrad corrected": {"max_of": "corrected"},
    "AMSGrad raw": {"max_of": "raw"},
    "AMSGrad raw, eps hat": {"max_of": "raw", "eps_hat": True},
}


def rule_of(
    form: str = "eps",
    b1: float = 0.9,
    b2: float = 0.999,
    max_idle: int = 3000,
    dtype: Any = np.float32,
    eps: float = EPS,
) -> Rule:
    return make_rule(b1, b2, eps, max_idle=max_idle, dtype=dtype, **FORMS[form])


def pending(history: Any, mu: Any, nu: Any, last: Any, count: Any) -> PendingUpdate:
    """The updates that rows missed in the steps after `last`, up to `count`."""
    return pending_update(gather_history(history, last, count), mu, nu)


read = jax.jit(pending)


def column(x: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Rows of one element."""
    return jnp.asarray(np.asarray(x)[:, None], dtype)


def steps(*x: int) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


@functools.cache
def runner(rule: Rule) -> Any:
    """Advances a history through steps `first` to `last`, at learning rates ``rates[t]``."""

    @jax.jit
    def run(
        history: UpdateHistory, first: Any, last: Any, rates: Any, weight_decay: Any
    ) -> UpdateHistory:
        def step(t: Any, history: UpdateHistory) -> UpdateHistory:
            return advance(rule, history, t.astype(jnp.int32), rates[t], weight_decay)

        return jax.lax.fori_loop(first, last + 1, step, history)

    return run


def history_after(
    rule: Rule, count: int, rate: float = 0.01, weight_decay: float = 0.0
) -> UpdateHistory:
    rates = jnp.full(count + 1, rate)
    return runner(rule)(empty_history(rule), 1, count, rates, jnp.asarray(weight_decay))


# Trajectories: dense Adam in float64 with zero gradients from each of the starts on.

STARTS = np.array([0, 5, 1000])
GAPS = np.array([1, 2, 3, 10, 40, 150, 500, 1200, 2300, 3000])
STEPS = 3300  # more than the history holds
T = np.arange(STEPS + 1) - 1  # a schedule sees the number of steps before
RATES = 0.01 * np.stack([T**0, 0.5 + 0.5 * np.cos(np.pi * T / 4000), np.minimum(T / 500, 1)])
WEIGHT_DECAY = np.array([0.0, 0.1, 0.1])
NU = np.concatenate([[0.0], np.logspace(-20, 4, 13)]).astype(np.float32).astype(np.float64)
NORMAL = np.random.default_rng(0).standard_normal((2, len(NU)))
MU = (NORMAL[0] * np.where(NU == 0, 1e-10, np.sqrt(NU))).astype(np.float32).astype(np.float64)
P = NORMAL[1].astype(np.float32).astype(np.float64)


class Trajectory(NamedTuple):
    p: np.ndarray  # at each of the gaps, (gap, case, row)
    driven: np.ndarray  # the length of the way that the momentum alone drove it


@functools.cache
def trajectory(form: str, b1: float, b2: float, start: int) -> Trajectory:
    adam = reference.Adam(b1, b2, EPS, **FORMS[form])
    adam.count, adam.b1_product, adam.b2_product = start, b1**start, b2**start
    corrected = adam.max_of == "corrected"
    adam.mu, adam.nu_max = {"w": MU}, {"w": NU}
    adam.nu = {"w": NU * (1 - b2**start) if corrected else NU}
    p, driven, records = np.tile(P, (len(RATES), 1)), np.zeros((len(RATES), len(P))), []
    for gap in range(1, min(GAPS[-1], STEPS - start) + 1):
        direction = adam.direction({"w": np.zeros_like(P)})["w"]
        rate = RATES[:, start + gap, None]
        p = p - rate * (direction + WEIGHT_DECAY[:, None] * p)
        driven = driven + rate * np.abs(direction)
        if gap in GAPS:
            records.append((p, driven))
    if adam.max_of is not None:
        np.testing.assert_array_equal(adam.nu_max["w"], NU)
    return Trajectory(*(np.stack(x) for x in zip(*records, strict=True)))


def follow(form: str, b1: float, b2: float, dtype: Any, tolerance: float) -> None:
    """Asserts that `missed` follows the trajectories, in all the cases at once.

    An error in p may be `tolerance` times its movement and one rounding of p itself; one in b^n
    is that of n log b.
    """
    rule = rule_of(form, b1, b2, dtype=dtype)
    starts = np.repeat(STARTS, len(NU))
    mu, nu, p = (column(np.tile(x, len(STARTS)), dtype) for x in (MU, NU, P))

    @jax.jit
    def caught_up(history: UpdateHistory, last: Any, count: Any) -> Any:
        def one(history: UpdateHistory) -> Any:
            out = pending(history, mu, nu, last, count)
            ones = jnp.ones_like(mu)
            return out.apply_to_params(p)[:, 0], out.decay_mu(ones)[:, 0], out.decay_nu(ones)[:, 0]

        return jax.vmap(one)(history)

    run = jax.vmap(runner(rule), (0, None, None, 0, 0))
    rates, weight_decay = jnp.asarray(RATES, dtype), jnp.asarray(WEIGHT_DECAY, dtype)
    history = jax.tree.map(lambda x: jnp.tile(x, (len(RATES), *[1] * x.ndim)), empty_history(rule))
    eps, now = np.finfo(dtype).eps, 0
    for t in sorted({int(s + g) for s in STARTS for g in GAPS if s + g <= STEPS}):
        history, now = run(history, now + 1, t, rates, weight_decay), t
        out = caught_up(history, steps(*np.minimum(starts, t)), jnp.int32(t))
        assert all(x.dtype == dtype for x in out)
        p_now, *factors = (np.asarray(x, np.float64) for x in out)
        for start in STARTS[np.isin(t - STARTS, GAPS)]:
            rows, n = starts == start, int(t - start)
            p_t, driven = (
                x[np.searchsorted(GAPS, n)] for x in trajectory(form, b1, b2, int(start))
            )
            movement = np.abs(p_t - P) + driven
            rounding = eps * np.maximum(np.abs(P), np.abs(p_t))
            assert np.all(np.abs(p_now[:, rows] - p_t) <= tolerance * movement + rounding)
            for factor, b in zip(factors, (b1, b2), strict=True):
                bound = eps * (1 - n * math.log(b)) * b**n + np.finfo(dtype).tiny
                assert np.all(np.abs(factor[:, rows] - b**n) <= bound)


BETAS = [(0.9, 0.999), (0.9, 0.99), (0.99, 0.999), (0.95, 0.98), (0.9, 0.95)]
SETTINGS = [(form, *betas) for form in ("eps", "eps hat") for betas in BETAS]
# b2 matters little in AMSGrad, and may be below b1**2.
FEWER = [BETAS[0], *BETAS[2:4]]
SETTINGS += [(f"AMSGrad {kind}", *betas) for kind in ("raw", "corrected") for betas in FEWER]
SETTINGS += [("AMSGrad raw, eps hat", 0.9, 0.999), ("AMSGrad raw", 0.99, 0.95)]


# The first tier tries the hardest betas without AMSGrad, which need the most nodes, and others
# with each of two further forms; in float32 it leaves out the second.
QUICK = [("eps", 0.9, 0.95), ("eps hat", 0.95, 0.98), ("AMSGrad corrected", 0.99, 0.999)]


@pytest.mark.parametrize(
    ("form", "b1", "b2"), in_tiers(SETTINGS, lambda *setting: setting in QUICK)
)
def test_idle_rows_move_as_under_dense_adam(form: str, b1: float, b2: float) -> None:
    with x64():
        follow(form, b1, b2, np.float64, 1e-8)


@pytest.mark.parametrize(
    ("form", "b1", "b2"), in_tiers(SETTINGS[::2], lambda *setting: setting in QUICK[::2])
)
def test_idle_rows_move_as_under_dense_adam_up_to_roundings(
    form: str, b1: float, b2: float
) -> None:
    # 3 roundings, of x, rho and the terms; and terms that are below half a unit of their sum are
    # lost: it is 1 / (1 - rho) of the first, so they make up that many halves. (Dense Adam loses
    # as much where it adds them to a parameter.)
    rho = b1 if "AMSGrad" in form else b1 / math.sqrt(b2)
    follow(form, b1, b2, np.float32, np.finfo(np.float32).eps * (3 + 0.5 / (1 - rho)))


@pytest.mark.parametrize("form", FORMS)
def test_without_momentum_nothing_moves(form: str) -> None:
    rule = rule_of(form, b1=0.0, b2=0.99)
    assert (rule.window, rule.nodes) == (1, 1)
    out = read(history_after(rule, 5), column([1.0]), column([4.0]), steps(3), jnp.int32(5))
    assert out.move.tolist() == [[0.0]]
    assert out.apply_to_params(column([3.0])).tolist() == [[3.0]]
    assert out.decay_mu(column([3.0])).tolist() == [[0.0]]
    np.testing.assert_allclose(out.decay_nu(column([1.0])), [[0.99**2]], rtol=2e-7)


# The rule


@pytest.mark.parametrize(
    ("dtype", "form", "b1", "b2", "window", "nodes"),
    [
        (np.float32, "eps hat", 0.9, 0.999, 198, 4),
        (np.float32, "eps", 0.9, 0.999, 198, 10),
        (np.float32, "eps", 0.9, 0.95, 260, 22),
        (np.float32, "eps", 0.9, 0.9, 394, 51),
        (np.float64, "eps hat", 0.9, 0.999, 220, 5),
        (np.float64, "eps", 0.9, 0.999, 220, 12),
        (np.float64, "eps", 0.9, 0.95, 289, 28),
        (np.float64, "AMSGrad raw", 0.9, 0.999, 219, 12),
        (np.float64, "AMSGrad corrected", 0.99, 0.9, 2292, 1),
        (np.float64, "AMSGrad raw, eps hat", 0.9, 0.999, 219, 1),
    ],
)
def test_window_and_nodes(
    dtype: Any, form: str, b1: float, b2: float, window: int, nodes: int
) -> None:
    rule = rule_of(form, b1, b2, dtype=dtype)
    assert (rule.window, rule.nodes) == (window, nodes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 0.95, "b2": 0.9}, r"b1 must be below sqrt\(b2\), got b1=0.95, b2=0.9"),
        ({"b1": 0.9, "b2": 0.81}, r"b1 must be below sqrt\(b2\)"),
        ({"b1": 0.9, "b2": 0.85}, "b2 is too small for this b1, got b1=0.9, b2=0.85: 80 nodes"),
        ({"b1": 1.0}, "b1 must be .*got 1"),
        ({"b2": -0.1}, "b2 must be .*got -0.1"),
        ({"eps": 0.0}, r"eps must be >= 1\.26\d*e-17, got 0"),
        ({"eps": -1e-8}, "eps must be"),
        ({"max_idle": 0}, "max_idle must be at least 1, got 0"),
        ({"max_idle": 197}, "max_idle must be at least 198 for b1=0.9, b2=0.999.*got 197"),
        ({"b2": 0.9985, "b1": 0.999, "max_idle": 65536}, "max_idle must be at least 82914"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule_of(**arguments)


def test_amsgrad_takes_any_decay_rates() -> None:
    for form in ("AMSGrad corrected", "AMSGrad raw", "AMSGrad raw, eps hat"):
        for b2 in (0.0, 0.5, 0.9999999):
            assert rule_of(form, 0.95, b2).nodes <= 12


# The history


def test_a_row_that_missed_nothing_comes_out_bit_for_bit() -> None:
    rule = rule_of()
    values = column([1.5, -0.0, 0.0, np.inf, -np.inf, np.nan, 1e-42, 3e38])
    for count in (0, 7, 3500):
        history = empty_history(rule)
        if count:
            history = history_after(rule, count, weight_decay=0.1)
        last = jnp.full(len(values), count, jnp.int32)
        for x in (values, values.astype(jnp.bfloat16)):
            out = read(history, x, jnp.abs(values), last, jnp.int32(count))
            for now in (out.apply_to_params, out.decay_mu, out.decay_nu):
                assert_bits_equal(now(x).astype(x.dtype), x)
        out = read(history, column([1e-3]), column([1e-6]), last[:1], jnp.int32(count))
        assert out.move.tolist() == [[0.0]]
        assert out.decay.tolist() == out.mu.tolist() == out.nu.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("in_x64", [False, True])
def test_the_ring_is_a_scan_carry_and_resumes_bit_for_bit(in_x64: bool) -> None:
    def check() -> None:
        rule = rule_of(max_idle=250)
        rates = jnp.linspace(0.0, 0.1, 601)

        def step(history: UpdateHistory, t: Any) -> Any:
            return advance(rule, history, t, rates[t], 0.1), None

        scan = jax.jit(lambda history, t: jax.lax.scan(step, history, t)[0])
        t = jnp.arange(1, 601, dtype=jnp.int32)
        whole = scan(empty_history(rule), t)
        assert types(whole) == types(empty_history(rule))
        assert whole.weights.dtype == (jnp.float64 if in_x64 else jnp.float32)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(whole))
        half = jax.tree.map(np.array, scan(empty_history(rule), t[:300]))
        assert_bits_equal(scan(jax.tree.map(jnp.asarray, half), t[300:]), whole)

    if in_x64:
        with x64():
            check()
    else:
        check()


def test_the_smallest_ring_serves_gaps_up_to_max_idle() -> None:
    window = rule_of(b1=0.5).window
    small, large = (rule_of(b1=0.5, max_idle=n) for n in (window, 200))
    rows = steps(*range(150 - window, 151))
    ones = jnp.ones((window + 1, 3))

    def owed(rule: Rule) -> PendingUpdate:
        history = history_after(rule, 150, weight_decay=0.1)
        return read(history, ones, 1e-16 * ones, rows, jnp.int32(150))

    assert_bits_equal(owed(small), owed(large))


def test_shapes_and_dtypes_of_rows() -> None:
    rule = rule_of()
    history, last, count = history_after(rule, 20), steps(3, 12), jnp.int32(20)
    rng = np.random.default_rng(1)
    wide = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.bfloat16).astype(jnp.float32)
    expected = read(history, wide, wide**2, last, count)
    assert expected.move.shape == wide.shape
    narrow = read(history, wide.astype(jnp.bfloat16), wide**2, last, count)
    assert_bits_equal(narrow, expected)
    assert narrow.apply_to_params(wide.astype(jnp.bfloat16)).dtype == jnp.float32
    with x64():
        wider = wide.astype(jnp.float64)
        assert expected.apply_to_params(wider).dtype == jnp.float64
        double = jax.tree.map(lambda x: x.astype(jnp.float64), history)
        out = read(double, wide, wide**2, last, count)
        assert (
            out.move.dtype
            == out.apply_to_params(wide).dtype
            == out.decay_nu(wide).dtype
            == jnp.float32
        )
        np.testing.assert_allclose(out.move, expected.move, rtol=1e-6)
    vector = read(history, wide[:, 0, 0], wide[:, 0, 0] ** 2, last, count)
    np.testing.assert_allclose(vector.move, expected.move[:, 0, 0], rtol=3e-7)
    z = jax.lax.complex(wide, -wide)
    out = read(history, z, wide**2, last, count)
    np.testing.assert_allclose(out.move, jax.lax.complex(expected.move, -expected.move), rtol=3e-7)
    assert out.apply_to_params(z).dtype == out.decay_mu(z).dtype == jnp.complex64
    assert out.decay_nu(wide).dtype == jnp.float32


# Decay


@pytest.mark.parametrize("rate", [0.01, 1e-3, 1e-6])
def test_decay_is_right_after_a_hundred_thousand_steps(rate: float) -> None:
    count, gaps = 100_000, np.array([1, 10, 100, 1000])
    rule = rule_of(b1=0.5, max_idle=1000)
    history, zeros = history_after(rule, count, rate, 0.1), jnp.zeros((len(gaps), 1))
    out = read(history, zeros, zeros, steps(*(count - gaps)), jnp.int32(count))
    exact = np.expm1(gaps * math.log1p(-0.1 * np.float64(np.float32(rate))))
    # 1 - decay, to 4 roundings: of 0.1, of the logarithm, of the difference and of expm1.
    actual = np.sum(np.asarray(out.decay, np.float64), axis=1) - 1
    np.testing.assert_allclose(actual, exact, rtol=4 * 1.2e-7)


def test_catching_up_at_every_step_does_not_drift() -> None:
    count = 10_000
    rule = rule_of(b1=0.5, max_idle=100)
    x = column(np.random.default_rng(2).uniform(0.5, 1.0, 1000))
    zeros = jnp.zeros_like(x)

    def step(t: Any, carry: Any) -> Any:
        history, p, nu = carry
        history = advance(rule, history, t, 1e-3, 0.1)
        out = read(history, zeros, zeros, jnp.full(len(x), t - 1), t)
        return history, out.apply_to_params(p), out.decay_nu(nu)

    loop = jax.jit(lambda carry: jax.lax.fori_loop(jnp.int32(1), jnp.int32(count + 1), step, carry))
    _, p, nu = loop((empty_history(rule), x, x))
    exact = np.asarray(x, np.float64)
    # Roundings at random, the worst of 1000. 1 - 1e-4 in float32 is off by 1.7e-8, 1.7e-4 in all.
    bound = 3 * 6e-8 * math.sqrt(count)
    np.testing.assert_allclose(p, exact * (1 - 1e-4) ** count, rtol=bound)
    np.testing.assert_allclose(nu, exact * 0.999**count, rtol=bound)


@pytest.mark.parametrize(("rate", "kept"), [(0.5, 0.5), (0.999, 0.001), (1.0, 0.0), (3.0, 0.0)])
def test_fierce_decay_stays_finite(rate: float, kept: float) -> None:
    rule = rule_of()
    history, p, m = history_after(rule, 600, 1.0, rate), 2.0, 1e-3
    last, count = steps(2, 599, 500), jnp.int32(600)
    out = read(history, column([m, 0, m]), column([0, 0, 1]), last, count)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(out))
    p_now = out.apply_to_params(jnp.full((3, 1), p))
    np.testing.assert_allclose(p_now[1], p * kept, rtol=1e-4, atol=1e-40)
    np.testing.assert_allclose(p_now[::2, 0], [0, 0], atol=1e-4)


# Compiling


@pytest.mark.parametrize("form", ["eps", "eps hat"])
def test_a_donated_ring_is_updated_in_place(form: str) -> None:
    rule = rule_of(form, max_idle=100_000)
    history = jax.eval_shape(lambda: empty_history(rule))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    step = jax.jit(functools.partial(advance, rule), donate_argnums=0)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = step.lower(history, count, scalar, scalar).compile()
    assert not re.search(r"\[100001,\d+\]\S* copy\(", compiled.as_text())
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 100_001


def test_reading_has_no_temporary_of_rows_by_nodes() -> None:
    n, d, rule = 4096, 64, rule_of(b2=0.95)
    assert rule.nodes == 22
    history = jax.eval_shape(lambda: empty_history(rule))
    rows = jax.ShapeDtypeStruct((n, d), jnp.float32)
    last, count = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((n,), ()))

    @jax.jit
    def caught_up(history: UpdateHistory, p: Any, mu: Any, nu: Any, last: Any, count: Any) -> Any:
        out = pending(history, mu, nu, last, count)
        return out.apply_to_params(p), out.decay_mu(mu), out.decay_nu(nu)

    compiled = caught_up.lower(history, rows, rows, rows, last, count).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * n * d + 2 * 4 * n * rule.nodes  # not 4 * n * d * nodes
