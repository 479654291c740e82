"""What moving states between systems promises whatever the system; shown with PyTorch's."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_bits_equal, assert_close, in_tiers, normal, run_updates, types
from jax.sharding import NamedSharding, PartitionSpec

import adam_transforms as at
from adam_transforms.interop import keras, tf1, torch

SHAPES = {"embed/table": (6, 2), "head/kernel": (2, 3), "head/bias": (3,)}
PARAMS = {
    "embed": {"table": jnp.asarray(normal(1, 6, 2))},
    "head": {"kernel": jnp.asarray(normal(2, 2, 3)), "bias": jnp.asarray(normal(3, 3))},
}
STEPS = 40


def make_state(amsgrad: bool = False) -> dict[str, Any]:
    state = {}
    for i, shape in enumerate(SHAPES.values()):
        mu, nu, more = (normal(10 * i + k, *shape) for k in range(3))
        state[i] = {"step": np.float32(STEPS), "exp_avg": mu, "exp_avg_sq": nu**2}
        if amsgrad:
            state[i]["max_exp_avg_sq"] = nu**2 + more**2
    return {"state": state, "param_groups": [{"params": [0, 1, 2], "param_names": [*SHAPES]}]}


def schedule(count):
    return 0.1 / (1.0 + jnp.asarray(count, jnp.float32))


TRANSFORMATIONS = {
    "optax.adam": optax.adam(0.1),
    "optax.adamw with a schedule": optax.adamw(optax.constant_schedule(0.1)),
    "optax.inject_hyperparams": optax.inject_hyperparams(optax.adam)(schedule),
    "optax.masked": optax.chain(optax.masked(optax.adam(0.1), True), optax.add_noise(0.1, 0.5, 0)),
    "adam": at.adam(schedule, clip_global_norm=1.0, weight_decay=0.1),
    "adam with a loss scale": at.adam(loss_scale="dynamic"),
    "lazy_adam": at.lazy_adam(schedule),
    "skip_nonfinite": at.skip_nonfinite(at.adam(schedule)),
    "groups": at.by_path([("head", at.adam(schedule))], default=optax.adam(schedule)),
    "rates by path": optax.chain(
        at.scale_by_adam(), at.scale_by_path_learning_rate([("head", schedule)], 0.1)
    ),
    "accumulate": at.adam(schedule, accumulate_every=3),
    "optax.MultiSteps": optax.MultiSteps(
        optax.adam(schedule), every_k_schedule=3
    ).gradient_transformation(),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_moments_and_all_counts_come_in_however_nested(name):
    tx = TRANSFORMATIONS[name]
    state = torch.state_from(make_state(), PARAMS, tx)
    assert types(state) == types(tx.init(PARAMS))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    counts = [
        int(x) for path, x in leaves if getattr(path[-1], "name", "") in ("count", "gradient_step")
    ]
    assert counts and set(counts) == {STEPS}
    for i, shape in enumerate(SHAPES.values()):
        for key in ("exp_avg", "exp_avg_sq"):
            theirs = make_state()["state"][i][key]
            found = [x for _, x in leaves if x.shape == shape and np.array_equal(x, theirs)]
            assert len(found) == 1
    back = torch.state_to(state, PARAMS, list(SHAPES))
    assert_bits_equal(back["state"], jax.tree.map(np.asarray, make_state()["state"]))


def test_counts_of_slots_that_are_not_brought_start_afresh():
    tx = optax.chain(optax.ema(0.9), optax.adam(0.1), at.params_ema(0.9))
    state: Any = torch.state_from(make_state(), PARAMS, tx)
    assert (int(state[0].count), int(state[1][0].count), int(state[2].count)) == (0, STEPS, 0)
    assert_bits_equal(at.ema_params(state), PARAMS)


def test_rates_by_schedule_go_on_where_they_were(relaxed_promotion):
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    tx = at.adam(schedule)
    state: Any = torch.state_from(make_state(), PARAMS, tx)
    fixed: Any = torch.state_from(make_state(), PARAMS, at.adam(0.1 / (1.0 + STEPS)))
    (ours,), _ = run_updates(tx, [grads], PARAMS, state)
    (expected,), _ = run_updates(at.adam(0.1 / (1.0 + STEPS)), [grads], PARAMS, fixed)
    assert_close(ours, expected)


@pytest.mark.parametrize(
    ("amsgrad", "weight_decay"),
    in_tiers(
        itertools.product((False, True), (None, 0.1)),
        lambda amsgrad, weight_decay: amsgrad and weight_decay is not None,
    ),
)
def test_deferred_adam_takes_it_up_as_dense_adam_does(amsgrad, weight_decay):
    options = {"amsgrad": amsgrad, "weight_decay": weight_decay}
    dense = (at.adam if weight_decay is None else at.adamw)(0.1, **options)
    deferred = at.deferred_adam(0.1, tables="table", **options)
    state_dict = make_state(amsgrad)
    states = [torch.state_from(state_dict, PARAMS, tx) for tx in (dense, deferred)]
    assert types(states[1]) == types(deferred.init(PARAMS))
    params, updates = [PARAMS, PARAMS], [jax.jit(dense.update), jax.jit(deferred.update)]
    for t in range(12):
        rows = at.SparseRows(jnp.array([t % 3]), jnp.asarray(normal(t, 1, 2)), 6, synchronized=True)
        for i, update in enumerate(updates):
            grads = {
                "embed": {"table": rows if i else rows.to_dense()},
                "head": jax.tree.map(jnp.cos, params[i]["head"]),
            }
            moves, states[i] = update(grads, states[i], params[i])
            params[i] = at.apply_updates(params[i], moves)
    with pytest.raises(ValueError, match=r"pending updates of table rows: call flush\(params"):
        torch.state_to(states[1], params[1], list(SHAPES))
    params[1], states[1] = at.flush(params[1], states[1])
    assert_close(params[1], params[0], rtol=1e-5, atol=1e-6)
    back = [torch.state_to(states[i], params[i], list(SHAPES)) for i in (0, 1)]
    assert_close(back[1]["state"], back[0]["state"], rtol=1e-5, atol=1e-6)


def test_a_sharded_parameters_slots_are_sharded_alike():
    mesh = jax.make_mesh((2,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = {"w": jax.device_put(jnp.zeros((6, 2)), sharding)}
    state_dict = make_state()
    state_dict["state"] = {0: state_dict["state"][0]}
    state_dict["param_groups"] = [{"params": [0], "param_names": ["w"]}]
    tx = at.adam()
    state: Any = torch.state_from(state_dict, params, tx)
    assert state[0].mu["w"].sharding == tx.init(params)[0].mu["w"].sharding
    assert len(state[0].nu["w"].sharding.device_set) == 2
    back = torch.state_to(state, params, ["w"])
    np.testing.assert_array_equal(back["state"][0]["exp_avg"], state_dict["state"][0]["exp_avg"])


def test_one_trace_serves_fresh_and_imported_states():
    tx = at.adam()
    traces = []

    @jax.jit
    def step(grads, state, params):
        traces.append(None)
        return tx.update(grads, state, params)

    for state in (tx.init(PARAMS), torch.state_from(make_state(), PARAMS, tx)):
        _, state = step(PARAMS, state, PARAMS)
        step(PARAMS, state, PARAMS)
    assert len(traces) == 1


def test_a_flax_nnx_models_parameters_go_by_their_paths():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    state_dict = make_state()
    state_dict["state"] = {0: state_dict["state"][1], 1: state_dict["state"][2]}
    state_dict["param_groups"] = [{"params": [0, 1], "param_names": ["kernel", "bias"]}]
    tx = at.adam()
    state = torch.state_from(state_dict, params, tx)
    assert types(state) == types(tx.init(params))
    back = torch.state_to(state, params, ["kernel", "bias"])
    assert_bits_equal(back["state"], jax.tree.map(np.asarray, state_dict["state"]))


def test_none_is_no_parameter():
    params = {"a": None, "w": jnp.zeros(2)}
    state_dict = torch.state_to(at.adam().init(params), params, ["w"])
    state_dict["state"][0]["step"] += 3
    state: Any = torch.state_from(state_dict, params, at.adam())
    assert int(state[0].count) == 3 and state[0].mu["a"] is None


# Refused


@pytest.mark.parametrize("system", ["torch", "keras", "tf1"])
@pytest.mark.parametrize(
    ("tx", "error", "message"),
    [
        (optax.sgd(0.1), ValueError, "the state of tx has no Adam"),
        (at.adam(b1=lambda count: 0.9), ValueError, "a schedule for b1 or b2"),
        (optax.adam, TypeError, "tx must be a gradient transformation"),
        (None, TypeError, "tx must be a gradient transformation"),
        (optax.chain(at.scale_by_adam(), at.adam()), ValueError, "two slots mu of 'w'"),
    ],
)
def test_what_keeps_no_adam_of_theirs_is_refused(system, tx, error, message):
    params = {"w": jnp.zeros(2)}
    one = np.ones(2)
    with pytest.raises(error, match=message):
        if system == "torch":
            slots = {"step": 1, "exp_avg": one, "exp_avg_sq": one}
            torch.state_from({"state": {0: slots}, "param_groups": [{"params": [0]}]}, params, tx)
        elif system == "keras":
            keras.state_from([1, one, one], params, tx)
        else:
            powers = {"beta1_power": np.float32(0.9), "beta2_power": np.float32(0.999)}
            tf1.state_from({"w/Adam": one, "w/Adam_1": one} | powers, params, tx)


def test_a_states_wrong_for_going_out_are_refused():
    params = {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match="has no Adam"):
        torch.state_to(optax.sgd(0.1).init(params), params, ["w"])
    state = at.adam().init(params)
    with pytest.raises(ValueError, match="'w' has shape \\[3\\], but its mu has shape \\[2\\]"):
        torch.state_to(state, {"w": jnp.zeros(3)}, ["w"])
    with pytest.raises(ValueError, match="'w' is missing"):
        torch.state_to(state, {"v": jnp.zeros(2)}, ["w"])
    groups = at.by_path([("b", at.adam())], at.adam()).init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
    one: Any = groups.inner_states[0].inner_state[0]
    inner = groups.inner_states[0]._replace(inner_state=(one._replace(count=jnp.int32(3)),))
    uneven = groups._replace(inner_states=groups.inner_states | {0: inner})
    with pytest.raises(ValueError, match=re.escape("different numbers of steps: [0, 3]")):
        torch.state_to(uneven, {"a": jnp.zeros(1), "b": jnp.zeros(1)}, ["a", "b"])


@pytest.mark.parametrize(
    "answer", [None, 3, ("w",), ("w", 1), ("w", "01"), (1, (0, 1)), ("w", (0, 1), 2)]
)
def test_a_rename_that_gives_no_name_is_refused(answer):
    params = {"w": jnp.zeros((2, 3))}
    with pytest.raises(TypeError, match="rename must return a name or"):
        torch.state_to(at.adam().init(params), params, ["w"], rename=lambda _: answer)


@pytest.mark.parametrize("axes", [(0,), (0, 0), (1, 2), (0, 1, 2)])
def test_axes_that_fit_no_array_are_refused(axes):
    params = {"w": jnp.zeros((2, 3))}
    state = at.adam().init(params)
    with pytest.raises(ValueError, match="do not permute its dimensions"):
        torch.state_to(state, params, ["w"], rename=lambda _: ("w", axes))
    state_dict = torch.state_to(state, params, ["w"])
    with pytest.raises(ValueError, match="do not permute its dimensions"):
        torch.state_from(state_dict, params, at.adam(), rename=lambda _: ("w", axes))


def test_two_paths_of_one_name_are_refused_on_the_way_out():
    state = at.adam().init(PARAMS)
    with pytest.raises(ValueError, match="'head/bias' and 'head/kernel' all map to 'w'"):
        torch.state_to(state, PARAMS, ["w", "t"], rename=lambda path: "tw"["head" in path])


def test_values_that_the_slot_cannot_hold_are_refused_and_others_pass():
    params = {"w": jnp.zeros(3)}

    def state_dict(values, dtype):
        slots = {"step": 1, "exp_avg": np.array(values, dtype), "exp_avg_sq": np.ones(3, dtype)}
        group = {"params": [0], "param_names": ["w"]}
        return {"state": {0: slots}, "param_groups": [group]}

    narrow = at.adam(mu_dtype=jnp.bfloat16)
    state: Any = torch.state_from(state_dict([1.0, -0.0, 0.5], np.float32), params, narrow)
    assert np.signbit(np.asarray(state[0].mu["w"], np.float32)[1])
    message = "exp_avg of 'w', for 'w', has float32 values that bfloat16, .* cannot represent"
    with pytest.raises(ValueError, match=message):
        torch.state_from(state_dict([1.0, 0.1, 0.5], np.float32), params, narrow)
    with pytest.raises(ValueError, match="has float64 values that float32"):
        torch.state_from(state_dict([1.0, 0.1, 0.5], np.float64), params, at.adam())
    with pytest.raises(ValueError, match="has complex64 values that float32"):
        torch.state_from(state_dict([1.0, 1.0, 0.5], np.complex64), params, at.adam())
    wide: Any = torch.state_from(state_dict([np.nan, np.inf, 0.1], jnp.bfloat16), params, at.adam())
    assert np.isnan(wide[0].mu["w"][0]) and wide[0].mu["w"].dtype == jnp.float32


def test_rows_that_are_accumulated_move_between_cycles_only():
    params = {"table": jnp.zeros((4, 2))}
    rows = {"table": at.SparseRows(jnp.array([1]), jnp.ones((1, 2)), 4)}
    tx = at.lazy_adam(accumulate_every=2, accumulate_like=rows)
    state = tx.init(params)
    store = keras.state_to(state, params, ["table"], every=2)
    assert_bits_equal(keras.state_from(store, params, tx, ["table"], every=2), state)
    _, state = tx.update(rows, state, params)
    message = "cycle of accumulation is under way, and the accumulator of 'table' has row gradients"
    with pytest.raises(ValueError, match=message):
        keras.state_to(state, params, ["table"], every=2)
    store["0"] = np.array(3)
    with pytest.raises(ValueError, match=message):
        keras.state_from(store, params, tx, ["table"], every=2)


def test_a_cycle_under_way_is_not_for_optax_multi_steps():
    params = [jnp.zeros(2)]
    tx = optax.MultiSteps(optax.adam(0.1), 2)
    state = tx.init(params)._replace(mini_step=jnp.int32(1))
    with pytest.raises(ValueError, match="a cycle of optax.MultiSteps is under way"):
        torch.state_to(state, params)
    store = keras.state_to(at.adam(accumulate_every=2).init(params), params, every=2)
    store["0"] = np.array(5)
    del store["1"]  # the accumulator, which MultiSteps keeps otherwise
    store = dict(zip("012", store.values(), strict=True))
    assert int(keras.state_from(store, params, tx).gradient_step) == 5


def test_a_cycle_of_weighted_gradients_goes_on_from_one_without_weights():
    params = [jnp.zeros(2)]
    plain = at.accumulate(at.adam(0.1), 3)
    weighted = at.accumulate(at.adam(0.1), 4, weighted=True)
    scheduled = at.accumulate(at.adam(0.1), lambda cycles: 3)
    state = plain.init(params)
    for _ in range(5):
        _, state = plain.update([jnp.ones(2)], state, params)
    store = keras.state_to(state, params, every=3)
    filled: Any = keras.state_from(store, params, weighted, every=3)
    assert (int(filled.mini_step), float(filled.weight), filled.acc[0].tolist()) == (
        2,
        2.0,
        [2.0] * 2,
    )
    filled = keras.state_from(store, params, scheduled, every=3)
    assert (int(filled.mini_step), int(filled.cycles)) == (2, 1)
    _, state = weighted.update([jnp.ones(2)], weighted.init(params), params, weight=2.0)
    with pytest.raises(ValueError, match="a cycle of accumulate with weights is under way"):
        keras.state_to(state, params, every=4)


def test_steps_counted_outside_of_an_accumulation_are_not_guessed():
    tx = optax.chain(at.accumulate(at.scale_by_adam(), 3), optax.scale_by_learning_rate(schedule))
    with pytest.raises(ValueError, match="tx counts steps outside of its accumulation"):
        torch.state_from(make_state(), PARAMS, tx)
    updates = optax.MultiSteps(optax.scale_by_adam(), 3).gradient_transformation()
    tx = optax.chain(updates, optax.scale_by_learning_rate(schedule))
    store = [STEPS, *[np.ones(2)] * 2]
    with pytest.raises(ValueError, match="tx counts steps outside of its accumulation"):
        keras.state_from(store, [jnp.zeros(2)], tx)
