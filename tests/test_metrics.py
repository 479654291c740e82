"""The scalars of a step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_transforms as at
from adam_transforms._tools.metrics import metrics

V, D = 16, 4


def make_params() -> dict[str, Any]:
    return {"table": jnp.asarray(normal(0, V, D)), "w": jnp.asarray(normal(1, D))}


def make_grads(*ids: int) -> dict[str, Any]:
    rows = at.SparseRows(jnp.array(ids), jnp.ones((len(ids), D)), V, synchronized=True)
    return {"table": rows, "w": jnp.ones(D)}


def step(tx: Any, params: Any, state: Any, grads: Any) -> Any:
    return jax.jit(tx.update)(grads, state, params)


def as_floats(found: dict[str, Any]) -> dict[str, float]:
    assert all(isinstance(x, jax.Array) and x.shape == () for x in found.values())
    return {name: float(x) for name, x in found.items()}


def test_norms_are_those_of_dense_arrays_and_skip_none() -> None:
    grads = make_grads(3, 3, 5) | {"none": None}
    found = as_floats(metrics(grads, (), grads=grads, params=make_params(), per_parameter=True))
    table = np.zeros((V, D))
    table[3], table[5] = 2.0, 1.0
    dense = {"table": table, "w": np.ones(D)}
    both = np.concatenate([x.ravel() for x in dense.values()])
    for name in ("updates_norm", "grads_norm"):
        assert found[name] == pytest.approx(np.linalg.norm(both))
        assert found[f"{name}/table"] == pytest.approx(np.linalg.norm(dense["table"]))
        assert found[f"{name}/w"] == pytest.approx(2.0)
        assert f"{name}/none" not in found
    for path, x in make_params().items():
        assert found[f"params_norm/{path}"] == pytest.approx(np.linalg.norm(np.asarray(x)))


def test_only_what_is_asked_for_and_there_is_told() -> None:
    assert set(metrics({"w": jnp.ones(2)}, ())) == {"updates_norm"}
    assert set(metrics({}, optax.EmptyState())) == {"updates_norm"}


def test_norms_of_low_precision_do_not_overflow() -> None:
    found = metrics({"w": jnp.ones(70_000, jnp.float16)}, ())
    assert found["updates_norm"].dtype == jnp.float32
    assert float(found["updates_norm"]) == pytest.approx(70_000**0.5)


def test_params_that_are_no_numbers_of_a_norm_are_left_out_of_it() -> None:
    params = {"w": jnp.array([3.0, 4.0]), "ids": jnp.ones(3, jnp.int32), "key": jax.random.key(0)}
    found = as_floats(metrics({"w": jnp.ones(2)}, (), params=params, per_parameter=True))
    assert found["params_norm"] == 5.0
    assert "params_norm/ids" not in found


def test_share_of_rows_counts_each_row_once_and_no_padding() -> None:
    found = metrics(make_grads(3, 3, 5, V, -1), ())
    assert float(found["rows_touched/table"]) == 2 / V
    assert "rows_touched/w" not in found
    lone = metrics(make_grads(1)["table"], ())
    assert float(lone["rows_touched"]) == 1 / V
    empty = at.SparseRows(jnp.zeros(0, jnp.int32), jnp.zeros((0, D)), 0)
    assert float(metrics(empty, ())["rows_touched"]) == 0.0


def test_held_step_touches_nothing(relaxed_promotion: None) -> None:
    params, grads = make_params(), make_grads(1, 2)
    tx = at.accumulate(at.lazy_adam(0.1), 2, like=jax.eval_shape(lambda: grads))
    state = tx.init(params)
    for mini_step, share in ((1, 0.0), (0, 2 / V)):
        updates, state = step(tx, params, state, grads)
        found = as_floats(metrics(updates, state))
        assert found["mini_step"] == mini_step
        assert found["rows_touched/table"] == share
        assert (found["updates_norm"] > 0) == (share > 0)


def test_longest_gap_is_what_owed_tells(relaxed_promotion: None) -> None:
    params = make_params()
    tx = at.deferred_adam(0.1, tables="table", max_idle=300)
    state = tx.init(params)
    for row in range(5):
        updates, state = step(tx, params, state, make_grads(row))
        params = at.apply_updates(params, updates)
    found = metrics(updates, state, idle_gaps=True)
    expected = jax.jit(at.owed)(params, state)["table"].longest_gap
    assert int(found["longest_gap/table"]) == int(expected) > 1
    assert "longest_gap/table" not in metrics(updates, state)


def test_longest_gap_is_told_of_decayed_tables_too(relaxed_promotion: None) -> None:
    params = {"a": jnp.ones((4, 1)), "b": jnp.ones((4, 1)), "w": jnp.ones(2)}
    tx = at.deferred_adam(
        0.1,
        tables=["a", "b"],
        weight_decay=0.1,
        weight_decay_mask={"a": True, "b": False, "w": True},
    )
    found = metrics(params, tx.init(params), idle_gaps=True)
    assert {name for name in found if name.startswith("longest_gap")} == {
        "longest_gap/a",
        "longest_gap/b",
    }


def test_loss_scale_and_skipped_steps_are_those_of_the_state(relaxed_promotion: None) -> None:
    params = make_params()
    tx = at.adam(0.1, loss_scale="dynamic")
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    for g in (grads, {**grads, "w": jnp.full(D, jnp.inf)}):
        updates, state = step(tx, params, state, g)
    found = as_floats(metrics(updates, state, grads=g))
    assert found == {
        "updates_norm": 0.0,
        "grads_norm": np.inf,
        "count": 1.0,
        "loss_scale": 2.0**14,
        "skipped_steps": 1.0,
    }


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (at.static_loss_scale(at.scale_by_adam(), 8.0), {"loss_scale": 8.0, "count": 0.0}),
        (at.skip_nonfinite(at.scale_by_amsgrad()), {"skipped_steps": 0.0, "count": 0.0}),
        (at.scale_by_adam(b1=lambda count: 0.9), {"count": 0.0}),
        (optax.masked(at.scale_by_adam(), {"table": True, "w": False}), {"count": 0.0}),
        (optax.sgd(0.1), {}),
    ],
)
def test_scalars_are_found_in_any_wrapper(tx: Any, expected: dict[str, float]) -> None:
    params = make_params()
    found = as_floats(metrics(params, tx.init(params)))
    assert found.pop("updates_norm") > 0
    assert found == expected


def test_multi_steps_tell_their_mini_step(relaxed_promotion: None) -> None:
    params = make_params()
    tx = optax.MultiSteps(at.scale_by_adam(), 2)
    updates, state = tx.update(params, tx.init(params), params)
    found = as_floats(metrics(updates, state))
    assert (found["mini_step"], found["count"]) == (1.0, 0.0)


PRESETS = {
    "adamw": lambda rate: at.adamw(rate, accumulate_every=1, loss_scale="dynamic"),
    "lazy_adam": lambda rate: at.lazy_adam(rate, tables=()),
    "deferred_adam": lambda rate: at.deferred_adam(rate, tables="table", max_idle=300),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_learning_rate_of_a_preset_is_the_one_the_step_took(
    preset: str, relaxed_promotion: None
) -> None:
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    params, tx = make_params(), PRESETS[preset](schedule)
    state = tx.init(params)
    assert as_floats(metrics(params, state))["learning_rate"] == 1.0
    for count in range(3):
        updates, state = step(tx, params, state, params)
        rate = as_floats(metrics(updates, state))["learning_rate"]
        assert rate == pytest.approx(float(schedule(count)))
    # The transformation decides, not a restored state.
    slower = PRESETS[preset](lambda count: 0.25)
    updates, state = step(slower, params, tx.init(params), params)
    assert as_floats(metrics(updates, state))["learning_rate"] == 0.25


@pytest.mark.parametrize("preset", PRESETS)
def test_learning_rate_of_a_preset_that_is_injected_is_told_once(
    preset: str, relaxed_promotion: None
) -> None:
    options = dict(tables="table", b1=0.9, b2=0.999, eps=1e-8, max_idle=300)
    options = options if preset == "deferred_adam" else {}
    tx = optax.inject_hyperparams(getattr(at, preset), static_args=tuple(options))(0.5, **options)
    state = tx.init(make_params())
    state = optax.tree.set(state, learning_rate=jnp.float32(0.125))
    assert optax.tree.get(state, "learning_rate") == 0.125
    found = as_floats(metrics(make_params(), state))
    assert [x for name, x in found.items() if name.startswith("learning_rate")] == [0.125]


def test_injected_learning_rate_is_the_one_the_step_took(relaxed_promotion: None) -> None:
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    tx = optax.chain(
        at.clip_by_global_norm(1.0),
        optax.inject_hyperparams(at.adamw)(schedule, b1=0.8, weight_decay=schedule),
    )
    params = make_params()
    state = tx.init(params)
    for count in range(3):
        updates, state = step(tx, params, state, params)
        found = as_floats(metrics(updates, state))
        assert found["learning_rate"] == pytest.approx(float(schedule(count)))
    assert found["weight_decay"] == found["learning_rate"]  # from a schedule too
    assert "b1" not in found  # a constant


def test_learning_rate_of_each_group_has_its_label(relaxed_promotion: None) -> None:
    injected = optax.inject_hyperparams(at.adam)
    params = make_params()
    by_path = at.by_path([("table", injected(0.5))], optax.inject_hyperparams(optax.sgd)(0.25))
    found = as_floats(metrics(params, by_path.init(params)))
    found.pop("updates_norm")
    assert found == {"learning_rate/0": 0.5, "learning_rate/1": 0.25, "count/0": 0.0}
    labelled = optax.multi_transform(
        {"slow": injected(0.1), "fast": injected(0.2)}, {"table": "slow", "w": "fast"}
    )
    found = as_floats(metrics(params, labelled.init(params)))
    assert found["learning_rate/slow"] == pytest.approx(0.1)
    assert found["learning_rate/fast"] == pytest.approx(0.2)
    assert "learning_rate" not in found


def test_learning_rate_of_each_rule_has_its_number(relaxed_promotion: None) -> None:
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    rates = at.scale_by_path_learning_rate([("table", schedule), ("w", 0.5)], default=schedule)
    tx = at.accumulate(optax.chain(at.scale_by_adam(), rates), 2)
    params = make_params()
    state = tx.init(params)
    for last in (0, 0, 0, 1, 1):  # the step that the latest rates are of; a cycle takes one
        updates, state = step(tx, params, state, params)
        found = as_floats(metrics(updates, state))
        assert found["learning_rate/0"] == pytest.approx(float(schedule(last)))
        assert found["learning_rate/1"] == 0.5
        assert found["learning_rate/2"] == found["learning_rate/0"]
    assert "learning_rate" not in found


def test_learning_rates_of_rules_inside_groups_and_beside_others_are_told_apart() -> None:
    params = make_params()
    rates = at.scale_by_path_learning_rate([], 0.5)
    grouped = at.by_path([("w", rates)], rates)
    names = metrics(params, grouped.init(params)).keys()
    assert names == {"updates_norm", "learning_rate/0/0", "learning_rate/1/0"}
    chained = optax.chain(rates, at.skip_nonfinite(rates))
    assert metrics(params, chained.init(params)).keys() == {
        "updates_norm",
        "skipped_steps",
        "learning_rate/0/rates/0",
        "learning_rate/1/inner_state/rates/0",
    }


def test_several_states_of_a_kind_have_their_paths_in_the_names() -> None:
    params = make_params()
    tx = optax.chain(
        at.scale_by_adam(),
        at.skip_nonfinite(at.scale_by_adam()),
        at.by_path([("w", at.scale_by_adam())], optax.identity()),
    )
    assert set(metrics(params, tx.init(params))) == {
        "updates_norm",
        "skipped_steps",
        "count/0",
        "count/1/inner_state",
        "count/2/inner_states/0/inner_state",
    }


def test_jitted_step_is_traced_once_and_carries_metrics_through_scan(
    relaxed_promotion: None,
) -> None:
    params = make_params()
    tx = at.dynamic_loss_scale(at.lazy_adam(0.1))
    traces = 0

    @jax.jit
    def run(params: Any, state: Any, ids: jax.Array) -> Any:
        nonlocal traces
        traces += 1

        def one(carry: Any, ids: jax.Array) -> Any:
            params, state = carry
            grads = {"table": at.SparseRows(ids, jnp.ones((2, D)), V), "w": jnp.ones(D)}
            updates, state = tx.update(grads, state, params)
            return (at.apply_updates(params, updates), state), metrics(updates, state)

        return jax.lax.scan(one, (params, state), ids)

    state = tx.init(params)
    for seed in (0, 1):
        (params, state), found = run(params, state, jnp.array([[seed, 1], [2, 3], [4, 4]]))
    assert traces == 1
    np.testing.assert_array_equal(found["count"], [4, 5, 6])
    np.testing.assert_array_equal(found["rows_touched/table"] * V, [1, 2, 1])


@pytest.mark.parametrize(
    "axis_type", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)]
)
def test_sharded_step_tells_what_the_same_step_on_one_device_does(
    axis_type: Any, relaxed_promotion: None
) -> None:
    def run(put: Any) -> dict[str, float]:
        params, grads = put(make_params()), make_grads(1, 5, 5)
        tx = at.deferred_adam(0.1, tables="table", max_idle=300)
        state = tx.init(params)
        for _ in range(2):
            updates, state = step(tx, params, state, grads)
        return as_floats(jax.jit(functools.partial(metrics, idle_gaps=True))(updates, state))

    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    specs = {"table": PartitionSpec("x", None), "w": PartitionSpec()}

    def put(tree: Any) -> Any:
        return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}

    expected = run(lambda tree: tree)
    with jax.set_mesh(mesh):
        assert run(put) == pytest.approx(expected)
    assert expected["longest_gap/table"] > 0


def test_nnx_optimizer_state_tells_what_the_plain_one_does(relaxed_promotion: None) -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optax.inject_hyperparams(at.adam)(0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    found = as_floats(metrics(params, optimizer.opt_state, per_parameter=True))
    assert found["learning_rate"] == 0.5
    assert found["count"] == 0.0
    assert found["updates_norm/kernel"] == pytest.approx(found["updates_norm"])


def test_swapped_arguments_are_refused_by_name() -> None:
    params = make_params()
    state = at.lazy(at.scale_by_adam()).init(params)
    with pytest.raises(TypeError, match="update of 'inner_state/count' must be a floating"):
        metrics(state, params)
    with pytest.raises(TypeError, match="idle_gaps must be True or False"):
        metrics(params, state, idle_gaps="table")
