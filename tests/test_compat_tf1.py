"""`compat.tf1`: TensorFlow 1's trajectories, methods and errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recordings
import reference
from helpers import assert_bits_equal, in_tiers, normal
from recordings import Recording, differences

import adam_transforms as at
from adam_transforms.compat import tf1
from adam_transforms.compat._optimizer import Variable

BOTH = pytest.mark.parametrize("kind", [tf1.AdamOptimizer, tf1.LazyAdamOptimizer])
# For a model without tables, of which the lazy one would warn.
WITHOUT_TABLES: dict[Any, Any] = {tf1.AdamOptimizer: {}, tf1.LazyAdamOptimizer: {"tables": ()}}


def small() -> Any:
    return {
        "dense": {"kernel": jnp.asarray(normal(0, 3, 2)), "bias": jnp.asarray(normal(1, 2))},
        "table": jnp.asarray(normal(2, 7, 3)),
    }


def loss(params: Any) -> Any:
    rows = params["table"][jnp.array([4, 1, 4])]
    return jnp.sum((rows @ params["dense"]["kernel"]) ** 2)


# The recorded runs


def follow(recording: Recording, opt: Any, read: Any = lambda params, state: params) -> Any:
    """Every step within the tolerance; the last parameters and state."""
    params = jax.tree.map(jnp.asarray, recording.start)
    state = opt.init(params)
    apply = jax.jit(opt.apply)
    for t in range(recording.steps):
        params, state = apply(recording.gradients(t), params, state)
        errors = differences(read(params, state), recording.params(t))
        assert max(errors.values()) <= recording.tolerance, f"after step {t}: {errors}"
    assert apply._cache_size() == 1
    return params, state


def assert_slots(recording: Recording, opt: Any, state: Any) -> None:
    for name, b in (("m", opt.beta1), ("v", opt.beta2)):
        recorded = recording.group(name)
        assert recorded.keys() == recording.start.keys()
        for path, slot in recorded.items():
            ours = opt.get_slot(state, path, name)
            limit = recordings.slot_tolerance(b) * np.abs(slot).max()
            np.testing.assert_allclose(ours, slot, rtol=0, atol=limit)


@pytest.mark.parametrize("case", recordings.of_class("train.AdamOptimizer"))
def test_adam_optimizer_follows_tensorflow(case: str) -> None:
    recording = Recording(case)
    opt = tf1.AdamOptimizer(**recording.config)
    _, state = follow(recording, opt)
    assert_slots(recording, opt, state)
    powers = dict(opt.variables(state))
    np.testing.assert_allclose(
        powers["beta1_power"], recording.arrays["beta1_power"][-1], rtol=4e-6
    )


@pytest.mark.parametrize(
    "case",
    in_tiers(recordings.of_class("train.AdamOptimizer"), lambda case: case == "tf1_sparse_custom"),
)
def test_deferred_it_follows_tensorflow_too(case: str) -> None:
    recording = Recording(case)
    opt = tf1.AdamOptimizer(**recording.config, deferred=True)
    params, state = follow(recording, opt, lambda *now: opt.flush(*now)[0])
    params, state = opt.flush(params, state)
    assert_slots(recording, opt, state)
    assert_bits_equal(opt.flush(params, state), (params, state))


@pytest.mark.parametrize("case", recordings.of_class("LazyAdam"))
def test_lazy_adam_optimizer_follows_tensorflow_addons(case: str, relaxed_promotion: None) -> None:
    recording = Recording(case)
    config = {"epsilon": 1e-7} | {
        k.replace("_1", "1").replace("_2", "2"): v for k, v in recording.config.items()
    }
    if recording.scheduled:
        decay = config["learning_rate"]["config"]
        config["learning_rate"] = optax.exponential_decay(
            decay["initial_learning_rate"], decay["decay_steps"], decay["decay_rate"]
        )
    opt = tf1.LazyAdamOptimizer(**config)
    _, state = follow(recording, opt)
    assert_slots(recording, opt, state)


def test_a_row_gradient_moves_all_rows_or_with_lazy_the_touched_ones() -> None:
    params = {"table": jnp.asarray(normal(0, 5, 2))}
    rows = at.SparseRows(jnp.array([3, 1, 3]), normal(1, 3, 2), 5)
    still = at.SparseRows(jnp.array([0]), jnp.zeros((1, 2)), 5)
    moved = {}
    for opt in (tf1.AdamOptimizer(0.1), tf1.LazyAdamOptimizer(0.1)):
        before, state = opt.apply({"table": rows}, params, opt.init(params))
        after, _ = opt.apply({"table": still}, before, state)
        changed = jnp.any(after["table"] != before["table"], axis=1)
        moved[type(opt).__name__] = np.flatnonzero(changed).tolist()
    assert moved == {"AdamOptimizer": [1, 3], "LazyAdamOptimizer": []}


# Gradients, and steps made of them


def test_a_gradient_is_an_array_rows_or_none() -> None:
    params = small() | {"unused": jnp.ones(2), "step": jnp.int32(3)}
    pairs = dict((v.path, g) for g, v in tf1.AdamOptimizer().compute_gradients(loss, params))
    dense = jax.grad(lambda p: loss(p | {"step": 0}))(
        {k: v for k, v in params.items() if k != "step"}
    )
    assert list(pairs) == ["dense/bias", "dense/kernel", "step", "table", "unused"]
    assert pairs["dense/bias"] is pairs["unused"] is pairs["step"] is None
    np.testing.assert_allclose(pairs["dense/kernel"], dense["dense"]["kernel"], rtol=1e-6)
    assert isinstance(pairs["table"], at.SparseRows)
    np.testing.assert_allclose(pairs["table"].to_dense(), dense["table"], rtol=1e-6)


def through_cond(x: Any, y: Any) -> Any:
    return jax.lax.cond(x[0] > 0, lambda a, b: a, lambda a, b: 2.0 * a, x, y)


def through_scan(x: Any, y: Any) -> Any:
    return jax.lax.scan(lambda c, z: (c + z, jax.lax.stop_gradient(z)), x, jnp.stack([y, y]))[1]


def through_while(x: Any, y: Any) -> Any:
    def body(carry: Any) -> Any:
        i, a, b = carry
        return i + 1, a + b, b

    return jax.lax.fori_loop(0, 3, lambda i, c: (c[0] + c[1], c[1]), (x, y))[0]


@jax.custom_vjp
def first(x: Any, y: Any) -> Any:
    return x * 2.0


first.defvjp(lambda x, y: (x * 2.0, None), lambda _, g: (g * 2.0, jnp.zeros_like(g)))


@pytest.mark.parametrize(
    ("function", "depends"),
    [
        (lambda x, y: x * 0.0, (True, False)),
        (lambda x, y: jax.jit(lambda a, b: (a, b))(x, y)[1], (False, True)),
        (lambda x, y: x + jax.lax.stop_gradient(y), (True, False)),
        (lambda x, y: x + (y > 0).astype(x.dtype), (True, False)),
        (lambda x, y: jax.checkpoint(lambda a, b: jnp.sin(a))(x, y), (True, False)),
        (through_cond, (True, False)),
        (through_scan, (False, False)),
        (through_while, (True, True)),
        (first, (True, False)),
        (lambda x, y: jax.nn.relu(y), (False, True)),
        (lambda x, y: jnp.ones(3), (False, False)),
    ],
)
def test_none_says_that_the_loss_does_not_depend_on_it(function: Any, depends: Any) -> None:
    params = {"x": jnp.ones(3), "y": jnp.ones(3)}
    pairs = tf1.AdamOptimizer().compute_gradients(lambda p: function(p["x"], p["y"]), params)
    assert tuple(g is not None for g, _ in pairs) == depends


def test_grad_loss_weighs_a_loss_that_is_no_scalar() -> None:
    params = {"w": jnp.asarray(normal(0, 3))}
    weights = jnp.asarray(normal(1, 3))
    opt = tf1.AdamOptimizer()
    ((g, _),) = opt.compute_gradients(lambda p: p["w"] ** 2, params, grad_loss=weights)
    np.testing.assert_allclose(g, 2 * params["w"] * weights, rtol=1e-6)
    ((g, _),) = opt.compute_gradients(lambda p: p["w"] ** 2, params)
    np.testing.assert_allclose(g, 2 * params["w"], rtol=1e-6)
    with pytest.raises(ValueError, match=r"shape \[3\], got \[2\]"):
        opt.compute_gradients(lambda p: p["w"] ** 2, params, grad_loss=jnp.ones(2))


@BOTH
def test_minimize_is_compute_and_apply_gradients(kind: Any) -> None:
    opt, params = kind(0.1), small()
    state = opt.init(params)
    pairs = opt.compute_gradients(loss, params)
    expected = opt.apply_gradients(pairs, params, state)
    assert_bits_equal(opt.minimize(loss, params, state), expected)
    *same, step = opt.apply_gradients(pairs, params, state, global_step=jnp.int32(4))
    assert_bits_equal(tuple(same), expected)
    assert int(step) == 5
    assert int(opt.minimize(loss, params, state, 7)[2]) == 8

    jitted = jax.jit(lambda params, state: opt.minimize(loss, params, state))
    for _ in range(30):
        params, state = jitted(params, state)
    assert jitted._cache_size() == 1
    assert loss(params) < 0.1 * loss(small())


@BOTH
def test_ignored_arguments_change_nothing(kind: Any) -> None:
    params = small()
    plain, other = kind(0.1), kind(0.1, use_locking=True, name="Other")
    ignored: Any = {
        "gate_gradients": kind.GATE_GRAPH,
        "aggregation_method": 2,
        "colocate_gradients_with_ops": True,
    }
    expected = plain.minimize(loss, params, plain.init(params))
    assert_bits_equal(other.minimize(loss, params, other.init(params), **ignored), expected)
    pairs = other.compute_gradients(loss, params, **ignored)
    again = other.apply_gradients(pairs, params, other.init(params), name="step")
    assert_bits_equal(again, expected)


def test_var_list_says_what_moves() -> None:
    opt, params = tf1.AdamOptimizer(0.1), small()
    kernel = Variable("dense/kernel", params["dense"]["kernel"])
    for var_list in ([kernel], [tuple(kernel)], ["dense/kernel"]):
        (pair,) = opt.compute_gradients(loss, var_list, params=params)
        assert pair[1].path == "dense/kernel"
        after, _ = opt.minimize(loss, params, opt.init(params), var_list=var_list)
        assert_bits_equal(after["table"], params["table"])
        assert np.all(after["dense"]["kernel"] != params["dense"]["kernel"])


def test_deferred_minimize_reads_what_dense_adam_would() -> None:
    params = small()
    dense, deferred = tf1.AdamOptimizer(0.1), tf1.AdamOptimizer(0.1, deferred="table")
    ours, state = params, deferred.init(params)
    theirs, their_state = params, dense.init(params)

    def reads(p: Any, ids: Any) -> Any:
        return jnp.sum((p["table"][ids] @ p["dense"]["kernel"] - 1.0) ** 2)

    def step_of(opt: Any) -> Any:
        return jax.jit(lambda p, state, ids: opt.minimize(lambda p: reads(p, ids), p, state))

    our_step, their_step = step_of(deferred), step_of(dense)
    for ids in np.random.default_rng(0).integers(0, 7, (40, 2)):
        ours, state = our_step(ours, state, ids)
        theirs, their_state = their_step(theirs, their_state, ids)
    flushed, _ = deferred.flush(ours, state)
    assert np.abs(ours["table"] - theirs["table"]).max() > 1e-3
    np.testing.assert_allclose(flushed["table"], theirs["table"], rtol=2e-4, atol=2e-5)
    with pytest.raises(ValueError, match="needs the state="):
        deferred.compute_gradients(loss, params)


@pytest.mark.parametrize("deferred", [False, True])
def test_a_variable_without_a_gradient_stays_with_its_slots(deferred: bool) -> None:
    opt, params = tf1.AdamOptimizer(0.1, deferred=deferred), small()
    params, state = opt.minimize(loss, params, opt.init(params))
    params, state = opt.flush(params, state)
    bias = (jnp.ones(2), "dense/bias")
    after, after_state = opt.apply_gradients([bias, (None, "table")], params, state)
    assert_bits_equal(after["table"], params["table"])
    for name in ("m", "v"):
        assert_bits_equal(*(opt.get_slot(s, "table", name) for s in (state, after_state)))
    assert np.all(after["dense"]["bias"] != params["dense"]["bias"])


@BOTH
def test_what_is_no_floating_array_stays_and_has_no_slots(kind: Any) -> None:
    opt = kind(0.1, **WITHOUT_TABLES[kind])
    params = {"w": jnp.ones(2), "steps": jnp.int32(4), "nothing": None}
    after, state = opt.minimize(lambda p: jnp.sum(p["w"] ** 2), params, opt.init(params))
    assert after["steps"] is params["steps"] and after["nothing"] is None
    assert np.all(after["w"] < 1.0)
    paths = [variable.path for variable in opt.variables(state)]
    assert paths == ["beta1_power", "beta2_power", "w/Adam", "w/Adam_1"]


# Values that change


def test_callables_are_read_at_every_step() -> None:
    settings = [(0.1, 0.9, 0.99, 1e-8), (0.2, 0.8, 0.97, 1e-3), (0.05, 0.95, 0.9, 1e-5)]
    now = dict.fromkeys(("learning_rate", "beta1", "beta2", "epsilon"), 0.0)
    for kind, options in WITHOUT_TABLES.items():
        now.update(zip(now, settings[0], strict=True))
        opt: Any = kind(**{name: (lambda name=name: now[name]) for name in now}, **options)
        params = {"w": jnp.asarray(normal(0, 3))}
        state = opt.init(params)
        p = np.float64(params["w"])
        m = v = np.zeros(3)
        power1, power2 = settings[0][1:3]
        for t, setting in enumerate([*settings, *settings]):
            now.update(zip(now, setting, strict=True))
            rate, b1, b2, eps = setting
            g = np.float64(normal(t, 3))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            p = p - rate * np.sqrt(1 - power2) / (1 - power1) * m / (np.sqrt(v) + eps)
            power1, power2 = power1 * b1, power2 * b2
            params, state = opt.apply({"w": jnp.asarray(normal(t, 3))}, params, state)
            np.testing.assert_allclose(params["w"], p, rtol=2e-5)
        powers = dict(opt.variables(state))
        np.testing.assert_allclose(powers["beta1_power"], power1, rtol=1e-5)
        np.testing.assert_allclose(powers["beta2_power"], power2, rtol=1e-5)


def test_a_schedule_gets_the_count_of_steps(relaxed_promotion: None) -> None:
    opt = tf1.AdamOptimizer(lambda count: 0.1 / (1.0 + count))
    training = reference.Training(
        {"w": np.ones(2, np.float32)}, reference.Adam(eps_hat=True), lambda t: 0.1 / (1 + t)
    )
    params = {"w": jnp.ones(2)}
    state = opt.init(params)
    for t in range(5):
        g = {"w": normal(t, 2)}
        params, state = opt.apply(g, params, state)
        np.testing.assert_allclose(params["w"], training.step(g)["w"], rtol=1e-5)


# What it holds


@BOTH
def test_slots_and_variables_have_tensorflows_names(kind: Any) -> None:
    opt, params = kind(name="Adam"), small()
    state = opt.init(params)
    assert opt.get_name() == "Adam"
    assert opt.get_slot_names() == ["m", "v"]
    assert [v.path for v in opt.variables(state)] == [
        "beta1_power",
        "beta2_power",
        "dense/bias/Adam",
        "dense/bias/Adam_1",
        "dense/kernel/Adam",
        "dense/kernel/Adam_1",
        "table/Adam",
        "table/Adam_1",
    ]
    _, state = opt.minimize(loss, params, state)
    kernel = Variable("dense/kernel", params["dense"]["kernel"])
    by_name = dict(opt.variables(state))
    assert_bits_equal(opt.get_slot(state, kernel, "m"), by_name["dense/kernel/Adam"])
    assert_bits_equal(opt.get_slot(state, kernel, "v"), by_name["dense/kernel/Adam_1"])
    assert float(jnp.abs(opt.get_slot(state, "table", "m")).max()) > 0
    assert opt.get_slot(state, kernel, "momentum") is None
    assert opt.get_slot(state, "nowhere", "m") is None


@BOTH
def test_transform_is_the_same_in_an_optax_chain(kind: Any) -> None:
    opt, params = kind(0.1), small()
    tx = optax.chain(opt.transform())
    rows = at.SparseRows(jnp.array([1, 1]), normal(3, 2, 3), 7)
    grads = {"dense": {"kernel": jnp.ones((3, 2)), "bias": None}, "table": rows}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert_bits_equal(
        at.apply_updates(params, updates), opt.apply(grads, params, opt.init(params))[0]
    )


# What is refused


@BOTH
@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (None, TypeError, "list of .gradient, variable. pairs, got None"),
        ([jnp.ones(2)], TypeError, "expected a .gradient, variable. pair"),
        ([(jnp.ones(2), 3)], TypeError, "variable must be a .path, value. pair or a path, got 3"),
        ([(jnp.array([1, 2]), "dense/bias")], TypeError, "'dense/bias' must be a floating"),
        ([("g", "dense/bias")], TypeError, "'dense/bias' must be a floating"),
        ([], ValueError, "no variable has a gradient"),
        ([(None, "table")], ValueError, "no variable has a gradient.*'table'"),
        ([(jnp.ones(2), "bias")], ValueError, "'bias' is no parameter.*'dense/bias'"),
        ([(jnp.ones(2), "dense/bias")] * 2, ValueError, "'dense/bias' is repeated"),
        ([(jnp.ones(3), "dense/bias")], ValueError, r"'dense/bias' has shape \[3\].*\[2\]"),
    ],
)
def test_malformed_gradients_are_refused(kind: Any, pairs: Any, error: Any, message: str) -> None:
    opt, params = kind(), small()
    with pytest.raises(error, match=message):
        opt.apply_gradients(pairs, params, opt.init(params))


@BOTH
def test_malformed_losses_and_lists_of_variables_are_refused(kind: Any) -> None:
    opt, params = kind(), small()
    with pytest.raises(RuntimeError, match="loss must be a function of the parameters"):
        opt.compute_gradients(loss(params), params)
    with pytest.raises(TypeError, match="variable must be"):
        opt.compute_gradients(loss, [3.0], params=params)
    with pytest.raises(ValueError, match="'nowhere' is no parameter"):
        opt.minimize(loss, params, opt.init(params), var_list=["nowhere"])
    with pytest.raises(ValueError, match="no variables"):
        opt.compute_gradients(loss, {})
    with pytest.raises(ValueError, match="no variable has a gradient"):
        opt.minimize(lambda p: jnp.ones(()), params, opt.init(params))
    with pytest.raises(ValueError, match="no variable has a gradient"):
        opt.apply(jax.tree.map(lambda _: None, params), params, opt.init(params))
    with pytest.raises(ValueError, match="two leaves with the path 'a/b'"):
        opt.compute_gradients(lambda p: p["a/b"], {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})


@BOTH
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number"),
        ({"beta1": 1.0}, ValueError, "b1 must be"),
        ({"beta2": -0.1}, ValueError, "b2 must be"),
        ({"epsilon": -1.0}, ValueError, "eps must be"),
        ({"name": ""}, ValueError, "name must be a non-empty string"),
        ({"name": None}, ValueError, "name must be a non-empty string"),
    ],
)
def test_bad_arguments_are_refused(kind: Any, arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        kind(**arguments)


def test_deferred_takes_numbers_and_tables() -> None:
    with pytest.raises(TypeError, match="with deferred, beta1 must be a number"):
        tf1.AdamOptimizer(beta1=lambda: 0.9, deferred=True)
    with pytest.raises(ValueError, match="'nothing' of tables"):
        tf1.AdamOptimizer(deferred="nothing").init(small())
