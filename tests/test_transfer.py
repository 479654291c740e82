"""A training goes on with another optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, assert_close, normal

import adam_transforms as at

V = 12
PARAMS = {"body": {"kernel": normal(1, 3, 2), "bias": normal(2, 2)}, "table": normal(3, V, 2)}

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def gradients(t: int, *, rows: bool = False) -> Any:
    dense = jax.tree.map(lambda p: normal(100 + t, *p.shape), PARAMS)
    ids = jnp.array([t % V, (5 * t) % V, V])
    table = at.SparseRows(ids, jnp.asarray(normal(t, 3, 2)), V, synchronized=True)
    return {**dense, "table": table if rows else table.to_dense()}


def train(tx: Any, params: Any, state: Any, steps: range, *, rows: bool = False) -> Any:
    step = jax.jit(tx.update)
    for t in steps:
        updates, state = step(gradients(t, rows=rows), state, params)
        params = at.apply_updates(params, updates)
    return params, state


def after_six(tx: Any, *, rows: bool = False) -> Any:
    params = jax.tree.map(jnp.asarray, PARAMS)
    return train(tx, params, tx.init(params), range(6), rows=rows)


def deferred(**options: Any) -> Any:
    return at.deferred_adam(0.05, tables="table", **{"max_idle": 300, **options})


def test_the_same_optimizer_goes_on_bit_for_bit() -> None:
    for tx in (
        at.adamw(0.05, ema=0.9, loss_scale="dynamic"),
        at.lazy_adam(lambda t: 0.1 / (t + 1), tables=()),
    ):
        params, state = after_six(tx)
        moved, report = at.transfer_state(state, tx, tx, params)
        expected = train(tx, params, state, range(6, 8))
        assert_bits_equal(train(tx, params, moved, range(6, 8)), expected)
        assert not report.fresh and not report.dropped


def test_dense_adam_goes_on_as_deferred_and_back() -> None:
    dense = at.adam(0.05)
    expected, dense_state = after_six(dense)
    params, state = expected, dense_state
    tx = deferred()
    moved, report = at.transfer_state(state, dense, tx, params)
    assert not report.fresh
    params, moved = train(tx, params, moved, range(6, 40), rows=True)
    expected, dense_state = train(dense, expected, dense_state, range(6, 40))
    with pytest.raises(ValueError, match=r"'table' may have pending updates.*flush\(params, state"):
        at.transfer_state(moved, tx, dense, params)
    params, moved = at.flush(params, moved)
    assert_close(params, expected, rtol=1e-5, atol=1e-6)
    back, report = at.transfer_state(moved, tx, dense, params)
    assert not report.fresh
    params, _ = train(dense, params, back, range(40, 44))
    expected, _ = train(dense, expected, dense_state, range(40, 44))
    assert_close(params, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options", [{"max_idle": 250}, {"b1": 0.8}, {"weight_decay": 0.1}, {"eps_hat": True}]
)
def test_options_of_deferred_adam_change_after_a_flush(options: dict[str, Any]) -> None:
    old, new = deferred(), deferred(**options)
    params, state = at.flush(*after_six(old, rows=True))
    dense_options = {k: v for k, v in options.items() if k != "max_idle"}
    dense = at.adam(0.05, **dense_options)
    dense_state, _ = at.transfer_state(state, old, dense, params)
    expected, _ = train(dense, params, dense_state, range(6, 30))
    with pytest.raises(ValueError, match="transfer_state"):
        new.update(gradients(6, rows=True), state, params)
    moved, _ = at.transfer_state(state, old, new, params)
    found = at.flush(*train(new, params, moved, range(6, 30), rows=True))[0]
    assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_amsgrad_a_schedule_accumulation_and_an_average_are_added() -> None:
    old = at.adam(0.05)
    new = at.adam(lambda t: 0.05 + 0.0 * t, amsgrad=True, accumulate_every=2, ema=0.9)
    params, state = after_six(old)
    moved, report = at.transfer_state(state, old, new, params)
    adam, rate, average = moved.inner_state
    assert_bits_equal((adam.count, adam.mu, adam.nu), (state[0].count, state[0].mu, state[0].nu))
    assert int(rate.inner_state.count) == 6
    assert int(average.count) == 0
    assert_bits_equal(average.ema, params)
    assert {path.split("/")[2] for path in report.fresh if "nu_max" in path} == {"nu_max"}
    assert not report.dropped
    assert np.isfinite(train(new, params, moved, range(6, 10))[0]["table"]).all()


def test_the_schedule_of_a_cycles_length_goes_on() -> None:
    params = jnp.ones(2)

    def accumulating(every: Any) -> Any:
        return at.accumulate(at.scale_by_adam(), every)

    scheduled = accumulating(lambda cycles: 1 + cycles)
    state = scheduled.init(params)
    for _ in range(3):  # one cycle of one, and one of two
        _, state = scheduled.update(params, state, params)
    state, _ = at.transfer_state(state, scheduled, scheduled, params)
    assert int(state.cycles) == 2
    fixed = accumulating(2)
    state, _ = at.transfer_state(state, scheduled, fixed, params)
    state, _ = at.transfer_state(state, fixed, scheduled, params)
    assert int(state.cycles) == int(state.inner_state.count) == 2


def test_unfrozen_parameters_start_afresh_beside_the_others() -> None:
    old = at.by_path([("table", optax.set_to_zero())], at.adam(0.05))
    new = at.by_path([("table", at.adam(0.01))], at.adam(0.05))
    params, state = after_six(old)
    moved, report = at.transfer_state(state, old, new, params)
    groups = moved.inner_states
    fresh, kept = groups[0].inner_state[0], groups[1].inner_state[0]
    assert int(fresh.count) == 0 and not np.any(fresh.mu["table"])
    assert int(kept.count) == 6
    assert_bits_equal(kept.mu["body"], state.inner_states[1].inner_state[0].mu["body"])
    assert all("table" in path or path.endswith("count") for path in report.fresh)
    # One group for all: the count is that of the parameters that were trained.
    single = at.adam(0.05)
    moved, report = at.transfer_state(state, old, single, params)
    assert int(moved[0].count) == 6
    assert sorted(report.fresh) == ["0/mu/table", "0/nu/table"]


def test_dense_and_lazy_states_and_optaxs_carry_over() -> None:
    for old in (optax.adam(0.05), at.adam(0.05, mu_dtype="bfloat16")):
        params, state = after_six(old)
        new = at.lazy_adam(0.05)
        moved, report = at.transfer_state(state, old, new, params)
        assert not report.fresh and not report.dropped
        assert_close(moved.inner_state[0].mu, state[0].mu)
        assert moved.inner_state[0].mu["table"].dtype == jnp.float32
        train(new, params, moved, range(6, 8), rows=True)


def test_scales_carry_over_and_what_has_no_counterpart_is_told() -> None:
    old = at.adam(0.05, loss_scale="dynamic", amsgrad=True)
    new = at.dynamic_loss_scale(at.adam(0.05))
    params, state = after_six(old)
    state = state._replace(scale=jnp.float32(64.0), skipped=jnp.int32(3))
    moved, report = at.transfer_state(state, old, new, params)
    assert (float(moved.scale), int(moved.skipped)) == (64.0, 3)
    assert {path.split("/")[2] for path in report.dropped} == {"nu_max"}
    assert "dropped: 3" in str(report) and "inner_state/0/nu_max/table" in str(report)


def test_moments_whose_bias_correction_is_unknown_start_afresh() -> None:
    old, new = at.adam(0.05), at.adam(0.05, b1=lambda t: 0.9 + 0.0 * t)
    params, state = after_six(old)
    moved, report = at.transfer_state(state, old, new, params)
    assert_bits_equal(moved, new.init(params))
    assert not report.carried


def test_a_state_of_another_optimizer_or_an_open_cycle_is_refused() -> None:
    params, state = after_six(at.adam(0.05))
    with pytest.raises(ValueError, match="'0/nu_max' is missing"):
        at.transfer_state(state, at.adam(0.05, amsgrad=True), at.adam(0.05), params)
    old = at.adam(0.05, accumulate_every=4)
    params, state = after_six(old)
    with pytest.raises(ValueError, match=r"2 gradients of an incomplete cycle.*flush_accumulated"):
        at.transfer_state(state, old, at.adam(0.05), params)


def test_arguments_in_another_order_are_told() -> None:
    old, new = at.adam(0.05), at.adam(0.05, amsgrad=True)
    params, state = after_six(old)
    order = r"\(state, old_tx, new_tx, params\)"
    with pytest.raises(ValueError, match=rf"(?s)'0/nu_max' is missing.*state of new_tx.*{order}"):
        at.transfer_state(state, new, old, params)
    wrong: Any = (old, state, new, params), (old, new, state, params)
    for arguments in wrong:
        with pytest.raises(TypeError, match=rf"_tx must be an optax.*got tuple: .*{order}"):
            at.transfer_state(*arguments)
