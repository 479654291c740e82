# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import as_numpy, assert_bits_equal, assert_close, normal, run_updates, types, x64

import adam_transforms as at

STEPS = 6
PARAMS = {"w": np.zeros((4, 3), np.float32), "b": np.zeros(5, np.float32)}
GRADIENTS = [
    {"w": normal(t, 4, 3), "b": 10.0 ** np.arange(-3, 2, dtype=np.float32) * normal(100 + t, 5)}
    for t in range(STEPS)
]


def run(tx, gradients, params=None, state=None):
    if params is None and state is None:
        state = tx.init(PARAMS)
    return run_updates(tx, gradients, params, state)


def assert_follows(tx, adam, gradients=GRADIENTS, params=PARAMS, rtol=2e-6):
    """Every update, and the slots at the end, are the reference's."""
    updates, state = run(tx, gradients, params)
    for u, g in zip(updates, gradients, strict=True):
        assert_close(u, adam.direction(g), rtol=rtol)
    state = getattr(state, "inner_state", state)
    assert int(state.count) == len(gradients)
    assert_close(state.mu, adam.mu, rtol=rtol)
    assert_close(state.nu, adam.nu, rtol=rtol, atol=1e-12)
    if adam.max_of is not None:
        assert_close(state.nu_max, adam.nu_max, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"nesterov": True, "b2": 0.9}])
def test_one_second_moment_a_row_is_of_the_mean_of_squares(options):
    tx = at.scale_by_adam(nu_per="row", **options)
    assert_follows(tx, reference.Adam(nu_per_row=True, **options))
    assert {k: x.shape for k, x in tx.init(PARAMS).nu.items()} == {"w": (4, 1), "b": (5,)}


def test_one_second_moment_a_row_of_the_touched_rows_only():
    table = {"t": jnp.zeros((6, 3))}
    tx = at.lazy(at.scale_by_adam(nu_per="row"))
    state, adam = tx.init(table), reference.Adam(nu_per_row=True)
    for t in range(3):
        rows = at.SparseRows(jnp.array([4, 1]), normal(t, 2, 3), 6)
        u, state = tx.update({"t": rows}, state, table)
        expected = adam.direction({"t": normal(t, 2, 3)})["t"]
        assert_close(u["t"].to_dense()[jnp.array([4, 1])], expected)
    assert np.flatnonzero(state.inner_state.nu["t"]).tolist() == [1, 4]


def test_second_moments_of_another_shape_are_refused():
    tx = at.scale_by_adam(nu_per="row")
    with pytest.raises(ValueError, match=r"nu of 'w' has shape \[4, 3\], but \[4, 1\]"):
        tx.update(GRADIENTS[0], at.scale_by_adam().init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="nu_per must be one of 'element', 'row', got 'column'"):
        at.scale_by_adam(nu_per="column")


# Closed forms


@pytest.mark.parametrize("make", [at.scale_by_adam, at.scale_by_amsgrad])
def test_the_first_step_is_the_sign_of_the_gradient(make):
    gradient = jnp.array([3.0, -1e-3, 7e8, -2e-4, 0.0])
    (u,), _ = run(make(), [gradient], params=jnp.zeros(5))
    # 1e-8 against 2e-4 shortens the step by 5e-5.
    np.testing.assert_allclose(u, [1.0, -1.0, 1.0, -1.0, 0.0], rtol=6e-5)


@pytest.mark.parametrize("options", [{}, {"eps_hat": True}, {"nesterov": True}])
def test_without_epsilon_the_scale_of_the_gradients_does_not_matter(options):
    tx = at.scale_by_adam(eps=0.0, **options)
    scaled = jax.tree.map(lambda g: g * np.float32(2.0**20), GRADIENTS)
    # A power of two changes no rounding.
    assert_bits_equal(run(tx, scaled)[0], run(tx, GRADIENTS)[0])


@pytest.mark.parametrize("b2", [0.9, 0.999, 0.999999])
def test_under_a_constant_gradient_every_step_is_its_sign(b2):
    gradient = jnp.array([2.0, -0.5])
    tx = at.scale_by_adam(b2=b2, eps=0.0)

    def step(state, _):
        u, state = tx.update(gradient, state)
        return state, u

    _, updates = jax.lax.scan(step, tx.init(gradient), length=200)
    np.testing.assert_allclose(updates, np.tile([1.0, -1.0], (200, 1)), rtol=5e-6)


def test_without_averaging_each_step_is_the_sign_of_its_gradient():
    for tx in (at.scale_by_adam(0.0, 0.0, 0.0), at.scale_by_adam(0, 0, 0, nesterov=True)):
        for u, g in zip(run(tx, GRADIENTS)[0], GRADIENTS, strict=True):
            assert_close(u, jax.tree.map(np.sign, g))


def test_zero_gradients_move_nothing():
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    for tx in (at.scale_by_adam(), at.scale_by_adam(eps_hat=True), at.scale_by_amsgrad()):
        updates, state = run(tx, [zeros] * 2)
        assert_bits_equal(updates[-1], jax.tree.map(jnp.asarray, zeros))
        assert not np.any(state.nu["w"])


# Against the float64 reference

ADAM = {
    "defaults": {},
    "large eps": dict(eps=1e-2),
    "eps_hat": dict(eps=1e-2, eps_hat=True),
    "eps_root": dict(eps=0.0, eps_root=1e-3),
    "eps_hat eps_root": dict(eps=1e-3, eps_root=1e-3, eps_hat=True),
    "nesterov": dict(nesterov=True),
    "nesterov eps_hat": dict(nesterov=True, eps=1e-2, eps_hat=True),
    "no momentum": dict(b1=0.0),
    "no averaging of squares": dict(b2=0.0),
    "low betas": dict(b1=0.3, b2=0.4),
    "high betas": dict(b1=0.999, b2=0.999999),
}


@pytest.mark.parametrize("name", ADAM)
def test_adam_follows_the_reference(name):
    assert_follows(at.scale_by_adam(**ADAM[name]), reference.Adam(**ADAM[name]))


@pytest.mark.parametrize("correct_nu", [True, False])
@pytest.mark.parametrize("correct_mu", [True, False])
@pytest.mark.parametrize("max_of", ["corrected", "raw"])
def test_amsgrad_follows_the_reference(max_of, correct_mu, correct_nu):
    options = dict(
        b2=0.9,
        eps=1e-3,
        eps_root=1e-4,
        max_of=max_of,
        bias_correction_mu=correct_mu,
        bias_correction_nu=correct_nu,
    )
    assert_follows(at.scale_by_amsgrad(**options), reference.Adam(**options))


def test_amsgrad_with_eps_hat_follows_the_reference():
    options = dict(b2=0.9, eps=1e-2, eps_hat=True, max_of="raw")
    assert_follows(at.scale_by_amsgrad(**options), reference.Adam(**options))


def test_amsgrads_two_maxima_differ():
    raw, corrected = (
        run(at.scale_by_amsgrad(b2=0.9, max_of=max_of), GRADIENTS)[0][-1]["w"]
        for max_of in ("raw", "corrected")
    )
    assert np.max(np.abs(raw - corrected)) > 0.05


def test_the_positional_arguments_are_optaxs(relaxed_promotion):
    for ours, theirs, args in (
        (at.scale_by_adam, optax.scale_by_adam, (0.8, 0.9, 1e-3, 1e-4, "bfloat16")),
        (at.scale_by_amsgrad, optax.scale_by_amsgrad, (0.8, 0.9, 1e-3, 1e-4)),
    ):
        our_updates, our_state = run(ours(*args), GRADIENTS)
        their_updates, their_state = run(theirs(*args), GRADIENTS)
        rtol = 2e-2 if len(args) == 5 else 2e-6  # mu rounded to bfloat16
        assert_close(our_updates, their_updates, rtol=rtol, atol=1e-2 if len(args) == 5 else 1e-6)
        assert types(our_state) == types(their_state)


# Schedules, arrays, tracers

TABLES = {
    "b1": np.linspace(0.5, 0.95, STEPS + 1).astype(np.float32),
    "b2": np.linspace(0.999, 0.8, STEPS + 1).astype(np.float32),
    "eps": np.logspace(-1, -3, STEPS + 1).astype(np.float32),
    "eps_root": np.logspace(-2, -4, STEPS + 1).astype(np.float32),
}


def look_up(table):
    return lambda count: jnp.asarray(table)[count]


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"eps_hat": True}])
@pytest.mark.parametrize("scheduled", [("b1",), ("b2",), ("b1", "b2", "eps")])
def test_scheduled_betas_are_corrected_by_their_running_product(scheduled, options):
    ours = at.scale_by_adam(**{k: look_up(TABLES[k]) for k in scheduled}, **options)
    exact = reference.Adam(**{k: TABLES[k].__getitem__ for k in scheduled}, **options)
    assert_follows(ours, exact)


@pytest.mark.parametrize("max_of", ["corrected", "raw"])
def test_amsgrad_takes_schedules(max_of):
    ours = at.scale_by_amsgrad(
        **{k: look_up(TABLES[k]) for k in ("b1", "b2", "eps")}, max_of=max_of
    )
    exact = reference.Adam(**{k: TABLES[k].__getitem__ for k in ("b1", "b2", "eps")}, max_of=max_of)
    assert_follows(ours, exact)


def test_scheduled_epsilons_are_read_at_the_steps_taken_before():
    tx = at.scale_by_adam(0.0, 0.0, look_up(TABLES["eps"]), look_up(TABLES["eps_root"]))
    updates, _ = run(tx, [jnp.ones(1)] * STEPS, params=jnp.ones(1))
    exact = 1 / (np.sqrt(1 + TABLES["eps_root"].astype(float)) + TABLES["eps"].astype(float))
    np.testing.assert_allclose(np.concatenate(updates), exact[:STEPS], rtol=1e-6)


def test_schedules_may_give_python_numbers():
    tx = at.scale_by_adam(b1=lambda count: 0.9, b2=lambda count: 0, eps=lambda count: 1)
    assert_follows(tx, reference.Adam(b1=0.9, b2=0.0, eps=1.0))


def test_a_constant_schedule_gives_what_the_number_gives():
    scheduled, _ = run(at.scale_by_adam(b1=lambda count: 0.9, b2=lambda count: 0.999), GRADIENTS)
    plain, _ = run(at.scale_by_adam(), GRADIENTS)
    assert_close(scheduled, plain)


def test_the_corrections_of_scheduled_betas_are_in_the_state():
    tx = at.scale_by_adam(b1=look_up(TABLES["b1"]), b2=0.75)
    _, state = run(tx, GRADIENTS[:3])
    assert isinstance(state, at.ScheduledDecayState)
    assert isinstance(state.inner_state, optax.ScaleByAdamState)
    exact = 1 - np.prod(TABLES["b1"][:3].astype(float)), 1 - 0.75**3
    np.testing.assert_allclose(state.corrections, exact, rtol=1e-6)


def hyperparameters_of_float32():
    values = dict(b1=0.8, b2=0.99, eps=1e-2, eps_root=1e-4)
    return {k: np.float32(v) for k, v in values.items()}


@pytest.mark.parametrize(
    "make", [at.scale_by_adam, functools.partial(at.scale_by_amsgrad, max_of="raw")]
)
def test_hyperparameters_can_be_arrays(make):
    values = hyperparameters_of_float32()
    exact = reference.Adam(**values, max_of="raw" if make is not at.scale_by_adam else None)
    assert_follows(make(**{k: jnp.asarray(v) for k, v in values.items()}), exact, rtol=5e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_hyperparameters_can_be_tracers(nesterov):
    values = hyperparameters_of_float32()

    @jax.jit
    def step(values, g, state):
        return at.scale_by_adam(**values, nesterov=nesterov).update(g, state)

    exact = reference.Adam(**values, nesterov=nesterov)
    state = at.scale_by_adam().init(PARAMS)
    for g in GRADIENTS:
        updates, state = step(values, g, state)
        assert_close(updates, exact.direction(g), rtol=5e-6)


def test_an_array_of_an_integer_is_a_hyperparameter():
    zero = jnp.array(0, jnp.int32)
    assert_follows(at.scale_by_adam(zero, zero, zero), reference.Adam(0.0, 0.0, 0.0))


# None gradients


@pytest.mark.parametrize("make", [at.scale_by_adam, at.scale_by_amsgrad])
def test_a_none_gradient_leaves_the_slots_bit_identical(make):
    tx = make()
    _, before = run(tx, GRADIENTS[:2], PARAMS)
    updates, after = tx.update({"w": GRADIENTS[2]["w"], "b": None}, before, PARAMS)
    assert updates["b"] is None
    assert int(after.count) == 3
    for name, slot in after._asdict().items():
        if name != "count":
            assert_bits_equal(slot["b"], getattr(before, name)["b"])
            assert np.all(slot["w"] != 0)


def test_params_and_slots_may_be_none_where_the_gradient_is():
    tx = at.scale_by_adam()
    params = {"w": jnp.ones(2), "frozen": None}
    updates, state = tx.update({"w": jnp.ones(2), "frozen": None}, tx.init(params), params)
    assert updates["frozen"] is None
    assert state.mu["frozen"] is None


# Dtypes


@pytest.mark.parametrize(
    ("param", "options", "mu", "nu"),
    [
        ("float32", {}, "float32", "float32"),
        ("bfloat16", {}, "bfloat16", "float32"),
        ("float16", {}, "float16", "float32"),
        ("float64", {}, "float64", "float64"),
        ("complex64", {}, "complex64", "float32"),
        ("complex128", {}, "complex128", "float64"),
        ("bfloat16", {"mu_dtype": "float32"}, "float32", "float32"),
        ("float32", {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.float16}, "bfloat16", "float16"),
        ("complex64", {"nu_dtype": "complex64"}, "complex64", "complex64"),
    ],
)
def test_slots_have_the_documented_dtypes_and_keep_them(param, options, mu, nu):
    with x64():
        params = jnp.zeros(3, param)
        for make in (at.scale_by_adam, at.scale_by_amsgrad):
            tx = make(**options)
            state = tx.init(params)
            assert (state.mu.dtype, state.nu.dtype) == (mu, nu)
            updates, new_state = tx.update(jnp.ones(3, param), state, params)
            assert types(new_state) == types(state)
            assert updates.dtype == param
            if make is at.scale_by_amsgrad:
                assert state.nu_max.dtype == nu


@pytest.mark.parametrize("make", [at.scale_by_adam, at.scale_by_amsgrad])
@pytest.mark.parametrize(
    ("mu", "nu"), [("float32", "bfloat16"), ("float16", "float32"), ("bfloat16", "float16")]
)
def test_slots_loaded_in_other_dtypes_keep_them(make, mu, nu):
    tx = make()
    state = tx.init(PARAMS)
    state = jax.tree.map(lambda x: x.astype(nu) if x.ndim else x, state)
    state = state._replace(mu=jax.tree.map(lambda x: x.astype(mu), state.mu))
    updates, after = run(tx, GRADIENTS, PARAMS, state)
    assert types(after) == types(state)
    assert all(u.dtype == jnp.float32 for u in updates[-1].values())
    max_of = "corrected" if make is at.scale_by_amsgrad else None
    exact = reference.Adam(max_of=max_of)
    for g in GRADIENTS:
        expected = exact.direction(g)
    np.testing.assert_allclose(updates[-1]["w"], expected["w"], rtol=0.05, atol=0.02)


def test_a_bfloat16_nu_stalls_where_the_default_keeps_moving():
    params = jnp.zeros((), jnp.bfloat16)
    gradient = jnp.ones((), jnp.bfloat16)

    def nu_after(steps, tx):
        def step(state, _):
            return tx.update(gradient, state, params)[1], None

        return float(jax.lax.scan(step, tx.init(params), length=steps)[0].nu)

    exact = 1 - 0.999**3000
    assert abs(nu_after(3000, at.scale_by_adam()) - exact) < 1e-4
    assert nu_after(3000, at.scale_by_adam(nu_dtype=jnp.bfloat16)) < 0.6 < exact


@pytest.mark.parametrize("options", [{}, {"eps_hat": True}, {"nesterov": True}])
def test_float16_stays_finite_with_zero_gradients_although_its_eps_is_zero(options):
    assert np.float16(1e-8) == 0
    params = jnp.ones(3, jnp.float16)
    tx = at.scale_by_adam(**options)
    updates, state = run(tx, [jnp.array([0.0, 1.0, 6e-8], jnp.float16)] * 3, params)
    for u in updates:
        assert u.dtype == jnp.float16
        assert u[0] == 0
        assert u[1] > 0.9
        assert np.all(np.isfinite(u))
    assert types(state) == types(tx.init(params))


def test_moments_of_low_precision_gradients_are_computed_in_float32():
    gradients = [g["w"].astype(jnp.bfloat16) for g in GRADIENTS]
    updates, state = run(at.scale_by_adam(), gradients, params=PARAMS["w"])
    exact = reference.Adam()
    for u, g in zip(updates, gradients, strict=True):
        assert u.dtype == jnp.float32
        assert_close({"w": u}, exact.direction({"w": g.astype(np.float32)}))
    assert_close({"w": state.nu}, exact.nu)


def test_large_float16_gradients_do_not_overflow_nu():
    gradient = jnp.full(2, 60_000.0, jnp.float16)
    (u,), state = run(at.scale_by_adam(), [gradient], params=jnp.ones(2, jnp.float16))
    np.testing.assert_allclose(u, [1.0, 1.0], rtol=1e-3)
    np.testing.assert_allclose(state.nu, 60_000.0**2 * 1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": True}, {"eps_hat": True, "eps": 1e-2}, {"max_of": "raw"}]
)
def test_complex_gradients_follow_the_reference(options):
    gradients = [{"z": normal(t, 4, dtype=np.complex64)} for t in range(4)]
    make = at.scale_by_amsgrad if "max_of" in options else at.scale_by_adam
    params = {"z": np.zeros(4, np.complex64)}
    assert_follows(make(**options), reference.Adam(**options), gradients, params)


def test_complex_gradients_give_what_optax_gives(relaxed_promotion):
    gradients = [{"z": normal(t, 4, dtype=np.complex64)} for t in range(4)]
    params = {"z": np.zeros(4, np.complex64)}
    ours, theirs = (
        run(tx, gradients, params)[0] for tx in (at.scale_by_adam(), optax.scale_by_adam())
    )
    assert_close(ours, theirs, rtol=2e-5)


def test_real_gradients_of_a_complex_parameter_give_complex_updates():
    params = jnp.zeros(2, jnp.complex64)
    (u,), state = run(at.scale_by_adam(), [jnp.array([2.0, -2.0])], params)
    assert u.dtype == jnp.complex64
    np.testing.assert_allclose(u, [1.0, -1.0], rtol=1e-6)
    assert state.mu.dtype == jnp.complex64


def test_everything_is_float64_in_x64_mode():
    with x64():
        params = {k: p.astype(np.float64) for k, p in PARAMS.items()}
        gradients = [as_float64(g) for g in GRADIENTS]
        assert_follows(
            at.scale_by_adam(b2=0.999999), reference.Adam(b2=0.999999), gradients, params, 1e-10
        )


def as_float64(tree):
    return jax.tree.map(as_numpy, tree)


def test_the_count_stays_at_the_largest_integer():
    tx = at.scale_by_adam()
    largest = np.iinfo(np.int32).max
    state = tx.init(jnp.ones(1))._replace(count=jnp.array(largest, jnp.int32))
    updates, state = tx.update(jnp.ones(1), state)
    assert int(state.count) == largest
    np.testing.assert_allclose(updates, 0.1 / 0.001**0.5, rtol=1e-5)  # both corrections are 1


# Errors

TX = {"scale_by_adam": at.scale_by_adam, "scale_by_amsgrad": at.scale_by_amsgrad}


@pytest.mark.parametrize("make", TX.values(), ids=TX)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(b1=1.0), ValueError, "b1 must be >= 0 and < 1, got 1"),
        (dict(b2=-0.1), ValueError, "b2 must be >= 0 and < 1, got -0.1"),
        (dict(b1="0.9"), TypeError, "b1 must be a number.*, got '0.9'"),
        (dict(b2=np.ones(2)), TypeError, "b2 must be a number or .*shape"),
        (dict(eps=-1e-8), ValueError, "eps must be >= 0, got -1e-08"),
        (dict(eps=None), TypeError, "eps must be a number.*, got None"),
        (dict(eps_root=np.nan), ValueError, "eps_root must be >= 0, got nan"),
        (dict(mu_dtype="int32"), TypeError, "mu_dtype must be a floating or complex dtype"),
        (dict(nu_dtype=3), TypeError, "nu_dtype must be a dtype, got 3"),
        (dict(eps_hat=1), TypeError, "eps_hat must be True or False, got 1"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(make, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make(**options)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (at.scale_by_adam, dict(nesterov="yes"), TypeError, "nesterov must be True or False"),
        (
            at.scale_by_amsgrad,
            dict(max_of="v"),
            ValueError,
            "max_of must be one of 'corrected', 'r",
        ),
        (at.scale_by_amsgrad, dict(bias_correction_mu=0), TypeError, "bias_correction_mu must be"),
        (at.scale_by_amsgrad, dict(bias_correction_nu=None), TypeError, "bias_correction_nu must"),
        (
            at.scale_by_amsgrad,
            dict(eps_hat=True),
            ValueError,
            'eps_hat=True needs max_of="raw"',
        ),
    ],
)
def test_a_wrong_option_of_one_rule_is_refused_by_name(make, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make(**options)


def test_structures_that_differ_are_refused_by_path():
    tx = at.scale_by_adam()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="'c' is only in the updates"):
        tx.update({**GRADIENTS[0], "c": np.ones(1, np.float32)}, state)
    with pytest.raises(ValueError, match="'b' is only in the state's mu"):
        tx.update({"w": GRADIENTS[0]["w"]}, state)
    with pytest.raises(ValueError, match="'b' is only in the updates"):
        tx.update(GRADIENTS[0], state, {"w": PARAMS["w"]})


def test_shapes_that_differ_are_refused_by_path():
    tx = at.scale_by_adam()
    state = tx.init(PARAMS)
    wrong = {**GRADIENTS[0], "b": np.ones((5, 1), np.float32)}
    with pytest.raises(ValueError, match=r"'b' has shape \[5, 1\] in the updates, but \[5\] in"):
        tx.update(wrong, state)
    with pytest.raises(ValueError, match=r"'b' has shape \[5\] in the updates, but \[5, 1\] in"):
        tx.update(GRADIENTS[0], state, wrong)


def test_integer_gradients_are_refused_by_path():
    tx = at.scale_by_adam()
    wrong = {**GRADIENTS[0], "b": np.ones(5, np.int32)}
    with pytest.raises(TypeError, match="update of 'b' must be a floating .*, got int32"):
        tx.update(wrong, tx.init(PARAMS))


def test_complex_gradients_of_a_real_slot_are_refused_by_path():
    tx = at.scale_by_adam()
    wrong = {**GRADIENTS[0], "b": np.ones(5, np.complex64)}
    with pytest.raises(TypeError, match="'b'.*float32 .*complex"):
        tx.update(wrong, tx.init(PARAMS), PARAMS)


def test_a_gradient_of_a_parameter_that_is_none_is_refused_by_path():
    tx = at.scale_by_adam()
    params = {**PARAMS, "b": None}
    with pytest.raises(ValueError, match="'b'"):
        tx.update(GRADIENTS[0], tx.init(params), params)


# Gradients whose squares overflow

LARGE = {
    "adam": lambda: (at.scale_by_adam(), {}),
    "nesterov": lambda: (at.scale_by_adam(nesterov=True), {"nesterov": True}),
    "low b2": lambda: (at.scale_by_adam(b1=0.3, b2=0.4), {"b1": 0.3, "b2": 0.4}),
    "schedule": lambda: (at.scale_by_adam(b2=lambda count: jnp.float32(0.99)), {"b2": 0.99}),
    "amsgrad": lambda: (at.scale_by_amsgrad(max_of="raw"), {"max_of": "raw"}),
    "optax's amsgrad": lambda: (at.scale_by_amsgrad(), {"max_of": "corrected"}),
}


def large_then_ordinary(large, dtype=np.float32):
    return [
        {"w": np.array(g, dtype)} for g in ([large, 1.0], [1.0, -2.0], [-large, 0.5], [3.0, 3.0])
    ]


@pytest.mark.parametrize("name", [*LARGE])
def test_a_gradient_whose_square_overflows_is_followed(name):
    tx, options = LARGE[name]()
    large = 1e19 if name == "optax's amsgrad" else 2e19  # its state has the square itself
    gradients = large_then_ordinary(large)
    updates, state = run(tx, gradients, {"w": np.zeros(2, np.float32)})
    adam = reference.Adam(**options)
    for u, g in zip(updates, gradients, strict=True):
        assert_close(u, adam.direction(g), rtol=5e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", [*LARGE])
@pytest.mark.parametrize("large", [1e30, 3.4e38])
def test_a_second_moment_that_overflows_stalls_its_element_alone(name, large):
    tx, options = LARGE[name]()
    updates, state = run(tx, large_then_ordinary(large), {"w": np.zeros(2, np.float32)})
    adam = reference.Adam(**options)
    for u, g in zip(updates, large_then_ordinary(1.0), strict=True):
        assert u["w"][0] == 0.0
        assert_close(u["w"][1], adam.direction(g)["w"][1])
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(state))


def test_a_large_complex_gradient_is_followed():
    gradients = large_then_ordinary(2e19 * (0.6 + 0.8j), np.complex64)
    updates, _ = run(at.scale_by_adam(), gradients, {"w": np.zeros(2, np.complex64)})
    adam = reference.Adam()
    for u, g in zip(updates, gradients, strict=True):
        assert_close(u, adam.direction(g), rtol=5e-6)


def test_a_low_precision_first_moment_stays_finite():
    tx = at.scale_by_adam(mu_dtype=jnp.float16)
    updates, state = run(tx, large_then_ordinary(1e7), {"w": np.zeros(2, np.float32)})
    assert np.isfinite(state.mu["w"]).all()
    assert all(np.isfinite(u["w"]).all() for u in updates)


# Parameters without moments


@pytest.mark.parametrize("leaf", [np.arange(3), np.array([True]), jax.random.key(0)])
def test_a_parameter_that_is_no_number_is_refused_by_its_path(leaf):
    for make in (at.scale_by_adam, at.scale_by_amsgrad, at.adam, at.lazy_adam):
        with pytest.raises(TypeError, match=r"'model/steps' is .*optax\.masked"):
            make().init({"model": {"w": np.zeros(2, np.float32), "steps": leaf}})
