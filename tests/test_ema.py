# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import assert_bits_equal, assert_close, normal, types

import adam_transforms as at

STEPS = 7
PARAMS = {"w": normal(50, 4, 3), "b": normal(51)}
UPDATES = [{"w": 0.1 * normal(t, 4, 3), "b": 0.1 * normal(100 + t)} for t in range(STEPS)]


def run(tx, updates, params):
    """Parameters after each step, and the last state."""
    step = jax.jit(tx.update)
    state, after = tx.init(params), []
    for u in updates:
        u, state = step(u, state, params)
        params = at.apply_updates(params, u)
        after.append(params)
    return after, state


def assert_follows(tx, ema, updates=UPDATES, params=PARAMS):
    after, state = run(tx, updates, params)
    exact = reference.as_float64(params)
    for p, u in zip(after, updates, strict=True):
        exact = ema.update({k: exact[k] + u[k] for k in exact})
        assert_close(p, exact)
    assert int(state.count) == len(updates)
    assert_close(at.ema_params(state), ema.values())
    assert_close(at.finalize(after[-1], state), ema.values())


# The rule


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
def test_the_average_follows_the_reference(decay, debias):
    assert_follows(at.params_ema(decay, debias=debias), reference.Ema(decay, debias=debias))


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_overwriting_follows_the_reference(every, debias):
    tx = at.params_ema(0.7, overwrite_every=every, debias=debias)
    assert_follows(tx, reference.Ema(0.7, reference.on_every(every), debias=debias))


@pytest.mark.parametrize("debias", [False, True])
def test_the_decay_can_be_a_schedule(debias):
    table = np.linspace(0.2, 0.9, STEPS).astype(np.float32)
    tx = at.params_ema(lambda count: jnp.asarray(table)[count], debias=debias, overwrite_every=4)
    assert_follows(tx, reference.Ema(table.__getitem__, reference.on_every(4), debias=debias))


def test_the_decay_can_be_an_array_or_a_tracer():
    table = {"w": UPDATES[0]["w"]}

    @jax.jit
    def two_steps(decay):
        tx = at.params_ema(decay)
        state = tx.init(table)
        for _ in range(2):
            _, state = tx.update(table, state, table)
        return state.ema

    assert_close(two_steps(jnp.float32(0.25)), {"w": 2 * table["w"]})
    assert_follows(at.params_ema(jnp.array(0.25)), reference.Ema(0.25))


def test_the_default_decay_is_keras():
    assert_follows(at.params_ema(), reference.Ema(0.99))


def test_the_first_average_is_a_copy_of_the_updated_parameters():
    tx = at.params_ema(0.999)
    params = jnp.array([1e8, -1e-3])
    after, state = run(tx, [jnp.array([0.0, 7e-3])], params)
    assert_bits_equal(state.ema, after[0])


def test_a_debiased_average_after_one_step_is_that_step():
    after, state = run(at.params_ema(0.999, debias=True), UPDATES[:1], PARAMS)
    assert_close(at.ema_params(state), after[0])
    assert_close(state.weight, 0.001, rtol=1e-6)


def test_without_overwriting_the_updates_pass_through_bit_identical():
    tx = at.params_ema(0.5)
    updates, _ = tx.update(UPDATES[0], tx.init(PARAMS), PARAMS)
    assert_bits_equal(updates, UPDATES[0])


def test_the_average_of_constant_parameters_does_not_drift():
    params = jnp.array([1.0, -0.1, 3e5])
    for debias, rtol in ((False, 0), (True, 5e-6)):
        tx = at.params_ema(0.999, debias=debias)

        def step(state, _, tx=tx):
            return tx.update(jnp.zeros(3), state, params)[1], None

        state, _ = jax.lax.scan(step, tx.init(params), length=3000)
        assert_close(at.ema_params(state), params, rtol=rtol, atol=0)


def test_the_average_can_start_from_the_parameters():
    """As flax.nnx.EMA and tf.train.ExponentialMovingAverage do."""
    assert_follows(at.params_ema(0.9, initial="params"), reference.Ema(0.9, start=PARAMS))
    params = jnp.ones(1)
    _, state = run(at.params_ema(0.9, initial="params"), [jnp.ones(1)], params)
    assert_close(at.ema_params(state), np.array([1.1]))  # nnx.EMA's, of a step from 1 to 2


# Rows

V = 7
TABLES = {"t": normal(60, V, 2), "bias": normal(61, V), "w": normal(62, 3)}


def row_updates(step):
    """Row updates with duplicates and padding; of the table now and then dense ones, and None."""
    generator = np.random.default_rng(step)
    rows = at.SparseRows(generator.integers(-1, V + 1, 4), normal(200 + step, 4, 2), V)
    table = {2: rows.to_dense(), 4: None}.get(step % 6, rows)
    bias = at.SparseRows(generator.integers(0, V, 2), normal(300 + step, 2), V)
    return {"t": table, "bias": bias, "w": normal(400 + step, 3)}


STARTS = {
    "first": (dict(), dict()),
    "params": (dict(initial="params"), dict(start=TABLES)),
    "zero": (dict(debias=True), dict(debias=True)),
}
PLACES = {
    "inside": lambda ema: at.lazy(optax.chain(at.clip_by_value(9.0), ema), tables=()),
    "after": lambda ema: optax.chain(at.lazy(at.clip_by_value(9.0), tables=()), ema),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("place", PLACES)
def test_rows_are_averaged_as_the_whole_table_would_be(place, start):
    options, of_reference = STARTS[start]
    for decay in (0.0, 0.9, 0.999) if start == "first" else (0.9,):
        tx = PLACES[place](at.params_ema(decay, **options))
        params, exact, steps = TABLES, reference.Ema(decay, **of_reference), 14
        state, step = tx.init(params), jax.jit(tx.update)
        for n in range(steps):
            u, state = step(row_updates(n), state, params)
            params = at.apply_updates(params, u)
            exact.update(jax.tree.map(np.asarray, params))
        assert_close(at.ema_params(state, params), exact.values(), rtol=1e-6, atol=1e-6)
        assert_close(at.finalize(params, state), exact.values(), rtol=1e-6, atol=1e-6)


def test_a_row_that_is_idle_for_long_ends_at_its_value():
    tx = at.params_ema(0.9999)
    table = jnp.array([[1.0, -2e4], [3.0, 1.0]])
    first = at.SparseRows(jnp.array([0]), jnp.ones((1, 2)), 2)
    nothing = at.SparseRows(jnp.array([2]), jnp.ones((1, 2)), 2)
    _, state = tx.update(first, tx.init(table), table)
    _, state = tx.update(at.SparseRows(jnp.array([0]), jnp.ones((1, 2)), 2), state, table + first)
    table = table + first + first
    idle = jax.jit(
        lambda state, n: jax.lax.fori_loop(
            0, n, lambda _, s: tx.update(nothing, s, table)[1], state
        )
    )
    before = np.array([2.0, -2e4 + 1], np.float64) * 0.9999 + np.array([3.0, -2e4 + 2]) * 1e-4
    for steps in (1, 1000, 300_000):
        exact = np.asarray(table[0], np.float64)
        exact = exact + 0.9999**steps * (before - exact)
        assert_close(at.ema_params(idle(state, steps), table)[0], exact, rtol=2e-7, atol=0)


def test_a_preset_averages_rows_in_accumulation_and_skips_what_is_not_finite(relaxed_promotion):
    like = jax.eval_shape(lambda: {**row_updates(0), "w": jnp.ones(3)})
    tx = at.lazy_adam(0.1, ema=0.5, accumulate_every=2, accumulate_like=like, loss_scale="dynamic")
    params, exact = jax.tree.map(jnp.asarray, TABLES), reference.Ema(0.5)
    state, step = tx.init(params), jax.jit(tx.update)
    for n in range(6):
        rows = row_updates(6 * n)
        rows = {**rows, "w": rows["w"] * np.float32(np.inf if n == 2 else 1.0)}
        u, state = step(rows, state, params)
        before, params = params, at.apply_updates(params, u)
        if not np.array_equal(before["w"], params["w"]):
            exact.update(jax.tree.map(np.asarray, params))
    assert_close(at.finalize(params, state), exact.values(), rtol=1e-6, atol=1e-6)


def test_low_precision_rows_are_averaged_in_float32_as_they_are_stored():
    tx = at.params_ema(0.5)
    table = jnp.ones((3, 2), jnp.bfloat16)
    state = tx.init(table)
    update = at.SparseRows(jnp.array([1]), jnp.full((1, 2), 1e-3), 3)
    _, state = tx.update(update, state, table)
    assert state.ema.dtype == jnp.float32
    assert_close(at.ema_params(state, table), np.ones((3, 2)), rtol=0, atol=0)


def test_a_row_update_of_the_average_takes_no_memory_of_the_size_of_the_table():
    tx = at.params_ema(0.9)

    def temporaries(num_rows):
        table = jax.ShapeDtypeStruct((num_rows, 8), jnp.float32)
        state = jax.eval_shape(tx.init, table)
        rows = jax.eval_shape(
            lambda ids: at.SparseRows(ids, jnp.ones((4, 8)), num_rows), jnp.zeros(4, int)
        )

        def step(table, state, rows):
            rows, state = tx.update(rows, state, table)
            return table + rows, state

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(table, state, rows).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    assert temporaries(100_000) == temporaries(1000)


def test_reading_idle_rows_needs_the_parameters():
    tx = at.params_ema(0.5)
    params = {"t": jnp.ones((3, 1)), "w": jnp.ones(2)}
    rows = at.SparseRows(jnp.array([1]), jnp.ones((1, 1)), 3)
    _, state = tx.update({"t": rows, "w": jnp.ones(2)}, tx.init(params), params)
    with pytest.raises(
        ValueError, match=r"average of 't' has idle rows.*ema_params\(state, params"
    ):
        at.ema_params(state)
    # Which rows are idle is not known while tracing.
    traced = jax.jit(at.ema_params)(state)
    assert np.isnan(traced["t"])[:, 0].tolist() == [True, False, True]
    assert traced["w"].tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match=r"'t' has shape \[4, 1\] in params, but its average"):
        at.ema_params(state, {**params, "t": jnp.ones((4, 1))})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "options",
    [dict(decay=lambda count: 0.9), dict(overwrite_every=2), dict(decay=jnp.float32(0.9))],
)
def test_an_average_that_cannot_take_rows_exactly_refuses_them(place, options):
    tx = PLACES[place](at.params_ema(**options))
    state = tx.init(TABLES)
    with pytest.raises((TypeError, ValueError), match="'bias'.* only if decay is a Python number"):
        tx.update(row_updates(0), state, TABLES)
    dense = at.to_dense(row_updates(0))
    assert_close(
        at.finalize(TABLES, tx.update(dense, state, TABLES)[1])["w"], TABLES["w"] + dense["w"]
    )


@pytest.mark.parametrize("wrap", [lambda tx: tx, at.skip_nonfinite])
def test_rows_of_deferred_adam_are_refused(wrap):
    params = {"t": jnp.ones((3, 1))}
    tx = optax.chain(wrap(at.deferred_adam(0.1, tables="t", max_idle=300)), at.params_ema(0.9))
    rows = at.SparseRows(jnp.array([1]), jnp.ones((1, 1)), 3, synchronized=True)
    with pytest.raises(TypeError, match="'t' has a row gradient of deferred_adam"):
        jax.eval_shape(tx.update, {"t": rows}, tx.init(params), params)


def test_map_params_takes_the_average_for_parameters_and_not_the_last_steps():
    tx = at.params_ema(0.9)
    names = {"w": "w", "b": "b"}
    mapped = optax.tree.map_params(
        tx, lambda x, name: name, tx.init(PARAMS), names, transform_non_params=lambda x: "other"
    )
    assert mapped.ema == names
    assert {mapped.count, mapped.weight, mapped.last_step, mapped.log_decay} == {"other"}


def test_a_state_without_last_steps_still_averages_dense_updates():
    """Of a version that did not keep them."""
    tx = at.params_ema(0.9)
    old = tx.init(PARAMS)._replace(last_step=None, log_decay=None)
    _, state = tx.update(UPDATES[0], old, PARAMS)
    assert types(state) == types(old)
    _, expected = tx.update(UPDATES[0], tx.init(PARAMS), PARAMS)
    assert_bits_equal(state.ema, expected.ema)


# Dtypes


@pytest.mark.parametrize("param", ["bfloat16", "float16"])
def test_low_precision_parameters_are_averaged_in_float32(param):
    params = jnp.ones(2, param)
    tx = at.params_ema(0.99)
    state = tx.init(params)
    assert state.ema.dtype == jnp.float32
    exact = reference.Ema(0.99)
    for _ in range(20):
        u, state = tx.update(jnp.full(2, 1 / 64, param), state, params)
        params = at.apply_updates(params, u)
        exact.update({"p": np.asarray(params, np.float64)})
    assert params.dtype == param
    assert_close(at.ema_params(state), exact.values()["p"])
    final = at.finalize(params, state)
    assert final.dtype == param
    assert_bits_equal(final, at.ema_params(state).astype(param))


def test_the_average_is_kept_in_ema_dtype():
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16)}
    tx = at.params_ema(0.5, ema_dtype="float16")
    state = tx.init(params)
    assert {k: x.dtype for k, x in state.ema.items()} == {"a": jnp.float16, "b": jnp.float16}
    _, after = tx.update(params, state, params)
    assert types(after) == types(state)
    assert after.ema["a"].tolist() == [2.0, 2.0]


def test_float32_updates_of_bfloat16_parameters_are_averaged_as_they_are_applied():
    params, update = jnp.ones(2, jnp.bfloat16), jnp.full(2, 1e-3)
    after, state = run(at.params_ema(0.5), [update], params)
    assert after[0].tolist() == [1.0, 1.0]  # nearest rounding
    assert at.ema_params(state).tolist() == [1.0, 1.0]


def test_complex_parameters_are_averaged():
    params = {"z": normal(0, 3, dtype=np.complex64)}
    updates = [{"z": normal(t, 3, dtype=np.complex64)} for t in range(4)]
    tx = at.params_ema(0.6, overwrite_every=3)
    assert_follows(tx, reference.Ema(0.6, reference.on_every(3)), updates, params)


# None


def test_a_parameter_without_an_update_is_averaged_as_it_is_and_not_overwritten():
    tx = at.params_ema(0.5, overwrite_every=1)
    params = {"a": jnp.array([1.0]), "b": jnp.array([2.0])}
    state = tx.init(params)
    for _ in range(2):
        u, state = tx.update({"a": jnp.array([4.0]), "b": None}, state, params)
        assert u["b"] is None
        params = at.apply_updates(params, u)
    assert at.ema_params(state)["b"].tolist() == [2.0]
    assert params["b"].tolist() == [2.0]
    # 1 + 4, averaged with 5 + 4.
    assert (at.ema_params(state)["a"].tolist(), params["a"].tolist()) == ([7.0], [7.0])


def test_python_numbers_are_averaged():
    tx = at.params_ema(0.5)
    _, state = tx.update({"a": jnp.ones(())}, tx.init({"a": 1.0}), {"a": 1.0})
    assert float(at.finalize({"a": 1.0}, state)["a"]) == 2.0


def test_none_parameters_stay_none():
    tx = at.params_ema(0.5)
    params = {"a": jnp.ones(1), "b": None}
    updates, state = tx.update({"a": jnp.ones(1), "b": None}, tx.init(params), params)
    assert updates["b"] is None
    assert at.ema_params(state)["b"] is None
    final = at.finalize(params, state)
    assert final["b"] is None
    assert final["a"].tolist() == [2.0]


# Reading it


def test_before_the_first_step_finalize_gives_the_parameters():
    for debias in (False, True):
        state = at.params_ema(0.5, debias=debias).init(PARAMS)
        moved = jax.tree.map(lambda p: jnp.asarray(p + 1), PARAMS)
        assert_bits_equal(at.finalize(moved, state), moved)


def test_ema_params_before_the_first_step():
    assert_close(at.ema_params(at.params_ema(0.5).init(PARAMS)), PARAMS, rtol=0, atol=0)
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    assert_close(at.ema_params(at.params_ema(0.5, debias=True).init(PARAMS)), zeros)


def test_the_average_is_found_in_nested_states():
    tx = at.skip_nonfinite(
        at.accumulate(optax.chain(optax.scale(-1.0), optax.chain(at.params_ema(0.5))), every=1)
    )
    after, state = run(tx, UPDATES[:1], PARAMS)
    assert_close(at.ema_params(state), after[0])
    assert_close(at.finalize(PARAMS, state), after[0])


@pytest.mark.parametrize(
    "mask",
    [
        {"a": True, "b": {"c": False, "d": True}},
        {"a": True, "b": False},  # a prefix
        lambda tree: {"a": False, "b": {"c": False, "d": True}},
    ],
)
def test_finalize_leaves_parameters_outside_a_mask_as_they_are(mask):
    params = {"a": jnp.array([1.0]), "b": {"c": jnp.ones((2, 2)), "d": jnp.array(3.0)}}
    tx = optax.masked(at.params_ema(0.5), mask)
    updates = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(updates, tx.init(params), params)
    selected = jax.tree.broadcast(mask(params) if callable(mask) else mask, params)
    expected = jax.tree.map(lambda p, m: p + 1 if m else p, params, selected)
    assert_bits_equal(at.finalize(params, state), expected)


def test_finalize_takes_an_average_for_each_group():
    tx = at.by_path([("a", at.params_ema(0.5))], default=at.params_ema(0.0))
    params = {"a": jnp.array([0.0, 0.0]), "b": [jnp.array(10.0), jnp.zeros((0, 3))]}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = at.apply_updates(params, updates)
    final = at.finalize(params, state)
    assert final["a"].tolist() == [1.5, 1.5]
    assert final["b"][0] == 12.0
    with pytest.raises(ValueError, match="state must hold one state of params_ema, found 2"):
        at.ema_params(state)


def test_finalize_works_under_jit_and_leaves_its_arguments():
    after, state = run(at.params_ema(0.5), UPDATES, PARAMS)
    before = jax.tree.map(np.array, after[-1])
    assert_close(jax.jit(at.finalize)(after[-1], state), at.ema_params(state))
    assert_bits_equal(after[-1], before)


# Errors


@pytest.mark.parametrize("read", [at.ema_params, functools.partial(at.finalize, PARAMS)])
@pytest.mark.parametrize("state", [(), None, optax.adam(0.1).init(PARAMS)])
def test_a_state_without_an_average_is_refused(read, state):
    with pytest.raises(
        ValueError, match="^state must hold .* of params_ema, found (0|none)"
    ) as error:
        read(state)
    assert "pass ema=" in str(error.value)


def test_finalize_refuses_other_parameters_by_path():
    state = at.params_ema(0.5).init(PARAMS)
    with pytest.raises(ValueError, match="params lack 'b'"):
        at.finalize({"w": PARAMS["w"]}, state)
    with pytest.raises(ValueError, match=r"'b' has shape \[2\] in params, but its average \[\]"):
        at.finalize({**PARAMS, "b": jnp.ones(2)}, state)


def test_finalize_refuses_two_averages_of_one_parameter():
    tx = optax.chain(at.params_ema(0.5), at.params_ema(0.9))
    with pytest.raises(ValueError, match="state holds two averages of '(b|w)'"):
        at.finalize(PARAMS, tx.init(PARAMS))


def test_which_chooses_among_several_averages():
    """By position among those of the parameter, or by a key on the path."""
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    fast = at.by_path([("a", at.params_ema(0.0))], default=at.params_ema(0.5))
    chain = optax.named_chain(("fast", fast), ("slow", at.params_ema(0.75)))
    tx = at.skip_nonfinite(chain)
    state = tx.init(params)
    for _ in range(2):
        u, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = at.apply_updates(params, u)
    for choices, a, b in (((np.int64(0), -2, "fast"), 2.0, 1.5), ((1, -1, "slow"), 1.25, 1.25)):
        for which in choices:
            final = at.finalize(params, state, which=which)
            assert (float(final["a"][0]), float(final["b"][0])) == (a, b)
    with pytest.raises(ValueError, match="two averages of 'a': .* key on its path: .*/slow"):
        at.finalize(params, state)
    with pytest.raises(ValueError, match="which=2 .* the averages of 'a': it has 2"):
        at.finalize(params, state, which=2)
    with pytest.raises(ValueError, match="which='slo' is on the path of no average: .*/slow"):
        at.finalize(params, state, which="slo")
    with pytest.raises(TypeError, match="which must be an integer, a string or None, got True"):
        at.finalize(params, state, which=True)


def test_update_needs_the_parameters():
    tx = at.params_ema(0.5)
    with pytest.raises(ValueError, match="params_ema .* update needs params, got None"):
        tx.update(UPDATES[0], tx.init(PARAMS))


def test_update_refuses_trees_that_differ_by_path():
    tx = at.params_ema(0.5)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="'b' is only in the parameters"):
        tx.update({"w": UPDATES[0]["w"]}, state, PARAMS)
    with pytest.raises(
        ValueError, match=r"'b' has shape \[\] in the parameters, but \[1\] in the u"
    ):
        tx.update({**UPDATES[0], "b": jnp.ones(1)}, state, PARAMS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(decay=1.0), ValueError, "decay must be >= 0 and < 1, got 1"),
        (dict(decay="0.9"), TypeError, "decay must be a number.*, got '0.9'"),
        (dict(overwrite_every=0), ValueError, "overwrite_every must be at least 1, got 0"),
        (dict(overwrite_every=1.5), TypeError, "overwrite_every must be an integer, got 1.5"),
        (dict(debias=1), TypeError, "debias must be True or False, got 1"),
        (dict(initial="zero"), ValueError, "initial must be one of 'first', 'params', got 'zero'"),
        (dict(initial="params", debias=True), ValueError, "debias starts from zero"),
        (dict(ema_dtype=int), TypeError, "ema_dtype must be a floating or complex dtype"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        at.params_ema(**options)
