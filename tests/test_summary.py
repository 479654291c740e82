"""The table of parameters and of what the optimizer keeps for each."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_transforms as at
from adam_transforms._tools.summary import summary

V, D = 16, 4


class Weights(NamedTuple):
    count: Any
    scale: Any


def make_params() -> dict[str, Any]:
    return {"table": jnp.ones((V, D)), "dense": {"kernel": jnp.ones((D, 2)), "bias": jnp.ones(2)}}


def lines_of(text: str) -> dict[str, dict[str, str]]:
    """{parameter: {column: cell}} of a summary's table, read by the columns of its rule."""
    header, rule, *lines = text.split("\n\n")[0].splitlines()
    spans = [match.span() for match in re.finditer("-+", rule)]
    rows = [[line[a:b].strip() for a, b in spans] for line in (header, *lines)]
    # Nothing stands between the columns.
    assert all(not line.ljust(len(rule))[b : b + 2].strip() for line in lines for _, b in spans)
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def facts_of(text: str) -> dict[str, str]:
    """{name: value} of all that stands below the table."""
    lines = [line for block in text.split("\n\n")[1:] for line in block.splitlines()]
    facts = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines)
    return {fact[0]: fact[1] for fact in facts if len(fact) == 2}


def column(text: str, name: str) -> dict[str, str]:
    return {path: cells[name] for path, cells in lines_of(text).items()}


def row_gradients(*ids: int) -> dict[str, Any]:
    dense = jax.tree.map(jnp.ones_like, make_params()["dense"])
    return {
        "table": at.SparseRows(jnp.array(ids), jnp.ones((len(ids), D)), V, synchronized=True),
        "dense": dense,
    }


def train(tx: Any, params: Any, *steps: tuple[int, ...]) -> Any:
    state = tx.init(params)
    for ids in steps:
        updates, state = jax.jit(tx.update)(row_gradients(*ids), state, params)
        params = at.apply_updates(params, updates)
    return params, state


def test_dense_optimizer_is_told_line_by_line(relaxed_promotion: None) -> None:
    params = make_params()
    tx = at.adam(0.1, amsgrad=True, ema=0.9, mu_dtype="bfloat16")
    text = summary(params, tx.init(params))
    lines = lines_of(text)
    assert set(lines) == {"table", "dense/kernel", "dense/bias"}
    assert lines["table"] == {
        "parameter": "table",
        "type": "float32[16,4]",
        "kind": "dense",
        "slots": "mu: bfloat16; nu, nu_max, ema: float32; last_step: int32[16]",
        "bytes": "256 B",
        "slot bytes": "960 B",
    }
    facts = facts_of(text)
    assert facts["total"] == "3 parameters, 74 elements, 296 B"
    assert facts["state"] == (
        "1.1 KiB: mu 148 B, nu 296 B, nu_max 296 B, ema 296 B, last_step 88 B, other 16 B"
    )
    # Each scalar once, by the name of a metric if it is one.
    assert set(facts) == {
        "total",
        "state",
        "count",
        "2/count",
        "2/weight",
        "2/log_decay",
    }


def test_all_bytes_of_the_state_are_in_the_total(relaxed_promotion: None) -> None:
    params = make_params()
    grads = row_gradients(1, 2)
    like = jax.eval_shape(lambda: grads)
    tx = at.dynamic_loss_scale(
        at.accumulate(at.deferred_adam(0.1, tables="table", max_idle=300), 2, like=like)
    )
    state = tx.init(params)
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    assert facts_of(summary(params, state))["state"].startswith(f"{total / 1024:.1f} KiB: ")


def test_it_displays_as_it_prints() -> None:
    text = summary(make_params(), ())
    assert isinstance(text, str)
    assert repr(text) == str(text)


def test_untouched_rows_of_lazy_tables_are_counted(relaxed_promotion: None) -> None:
    params, state = train(at.lazy_adam(0.1), make_params(), (1, 2, 2), (2, 3))
    text = summary(params, state)
    assert set(column(text, "kind").values()) == {"lazy"}
    assert column(text, "rows") == {
        "table": f"{V - 3} untouched",
        "dense/kernel": "",
        "dense/bias": "",
    }
    assert "rows" not in lines_of(summary(params, state, rows=False))["table"]


def test_row_with_a_gradient_in_one_column_is_touched() -> None:
    params = {"table": jnp.ones((V, D))}
    rows = at.SparseRows(jnp.array([1]), jnp.zeros((1, D)).at[0, 2].set(1.0), V)
    tx = at.lazy(at.scale_by_adam())
    _, state = tx.update({"table": rows}, tx.init(params), params)
    assert column(summary(params, state), "rows")["table"] == f"{V - 1} untouched"


def test_rows_that_deferred_tables_owe_are_those_of_owed(relaxed_promotion: None) -> None:
    tx = at.deferred_adam(0.1, tables="table", max_idle=300)
    params, state = train(tx, make_params(), (8, 9), (10,), (11,))
    text, owed = summary(params, state), at.owed(params, state)["table"]
    assert int(owed.rows) == 3
    assert column(text, "rows")["table"] == f"3 owe, gap up to {int(owed.longest_gap)}"
    assert column(text, "kind") == {
        "table": "deferred",
        "dense/kernel": "dense",
        "dense/bias": "dense",
    }
    assert column(text, "slots")["table"] == f"mu, nu: float32; last_step: int32[{V}]"
    assert "idle/ring" in facts_of(text)
    assert column(summary(*at.flush(params, state)), "rows")["table"] == "0 owe, gap up to 0"


def test_accumulated_rows_are_a_slot_of_their_table(relaxed_promotion: None) -> None:
    params = make_params()
    like = jax.eval_shape(lambda: row_gradients(1, 2))
    tx = at.dynamic_loss_scale(at.accumulate(at.lazy_adam(0.1), 3, like=like))
    text = summary(params, tx.init(params))
    assert column(text, "slots")["table"] == "acc: float32, 6 rows; mu, nu: float32"
    facts = facts_of(text)
    assert (facts["mini_step"], facts["loss_scale"]) == ("0", "32768")
    assert (facts["skipped_steps"], facts["finite_steps"]) == ("0", "0")


def test_groups_and_parameters_left_out_are_told(relaxed_promotion: None) -> None:
    params = make_params() | {"frozen": jnp.ones(3)}
    tx = at.by_path(
        [("table", optax.inject_hyperparams(at.adam)(0.5)), ("frozen", optax.set_to_zero())],
        at.scale_by_adam(),
    )
    text = summary(params, tx.init(params))
    assert column(text, "group") == {
        "table": "0",
        "frozen": "",
        "dense/kernel": "2",
        "dense/bias": "2",
    }
    assert column(text, "kind")["frozen"] == "masked"
    assert column(text, "slot bytes")["frozen"] == ""
    facts = facts_of(text)
    assert (facts["learning_rate/0"], facts["count/0"], facts["count/2"]) == ("0.5", "0", "0")
    assert facts["inner_states/0/inner_state/hyperparams/b1"] == "0.9"


def test_learning_rate_of_each_rule_is_told_once() -> None:
    params = make_params()
    tx = at.scale_by_path_learning_rate([("table", 0.5), ("bias", lambda count: 0.25)], 0.125)
    text = summary(params, tx.init(params))
    facts = facts_of(text)
    rates = [facts[f"learning_rate/{rule}"] for rule in range(3)]
    assert rates == ["0.5", "0.25", "0.125"]
    assert not any("rates" in name for name in facts)


def test_subtree_masked_as_a_whole_is_masked() -> None:
    params = make_params()
    tx = optax.masked(at.scale_by_adam(), {"table": True, "dense": False})
    text = summary(params, tx.init(params))
    assert column(text, "kind") == {
        "table": "dense",
        "dense/kernel": "masked",
        "dense/bias": "masked",
    }


def test_optimizer_without_slots_has_no_columns_for_them() -> None:
    params = make_params()
    text = summary(params, optax.sgd(0.1).init(params))
    assert set(lines_of(text)["table"]) == {"parameter", "type", "kind", "bytes"}
    assert set(column(text, "kind").values()) == {"no slots"}


def test_slots_of_one_name_are_told_apart_by_their_paths() -> None:
    params = {"w": jnp.ones(2)}
    tx = optax.chain(at.scale_by_adam(), at.scale_by_adam())
    text = summary(params, tx.init(params))
    assert column(text, "slots")["w"] == "0/mu, 0/nu, 1/mu, 1/nu: float32"
    facts = facts_of(text)
    assert facts["state"] == "40 B: mu 16 B, nu 16 B, other 8 B"
    assert (facts["count/0"], facts["count/1"]) == ("0", "0")


def test_lone_table_has_its_slots_and_rows() -> None:
    table = jnp.ones((V, D))
    state = at.deferred_adam(0.1, tables="", max_idle=300).init(table)
    (cells,) = lines_of(summary(table, state)).values()
    assert cells["slots"] == f"mu, nu: float32; last_step: int32[{V}]"
    assert cells["rows"] == "0 owe, gap up to 0"


@pytest.mark.parametrize(
    "params",
    [
        {"count": jnp.ones(()), "mu": {"kernel": jnp.ones(3)}, "kernel": jnp.ones(3)},
        {name: jnp.ones(()) for name in ("learning_rate", "b1", "b2", "eps")},
        [jnp.ones(()), (jnp.ones(2), jnp.ones(()))],
        (jnp.ones(()), jnp.ones(2)),
        Weights(count=jnp.ones(()), scale=jnp.ones(2)),
        jnp.ones(3),
        jnp.ones(()),
    ],
)
def test_parameters_called_like_the_state_get_their_own_slots(
    params: Any, relaxed_promotion: None
) -> None:
    tx = optax.chain(
        optax.inject_hyperparams(at.adam)(0.1),
        optax.scale_by_schedule(lambda c: 1.0),
        at.scale_by_path_learning_rate([("", 0.1)], 0.2),
    )
    text = summary(params, tx.init(params))
    lines = lines_of(text)
    assert len(lines) == len(jax.tree.leaves(params))
    for cells in lines.values():
        assert cells["slots"] == "mu, nu: float32"
    sizes = sum(x.nbytes for x in jax.tree.leaves(params))
    assert facts_of(text)["state"].startswith(f"{2 * sizes + 44} B: mu {sizes} B, nu {sizes} B, ")


def test_factored_slots_are_told_with_their_shapes() -> None:
    params = {"w": jnp.ones((256, 128)), "b": jnp.ones(4)}
    text = summary(params, optax.adafactor(0.1).init(params))
    assert column(text, "slots")["w"] == "v_row: float32[128]; v_col: float32[256]; v: float32[1]"


def test_state_of_other_parameters_is_listed_as_other() -> None:
    text = summary({"w": jnp.ones(2)}, at.scale_by_adam().init({"v": jnp.ones(3)}))
    assert column(text, "kind")["w"] == "no slots"
    assert facts_of(text)["nu/v"] == "float32[3], 12 B"


@pytest.mark.parametrize(
    "tx",
    [
        at.lazy(at.scale_by_adam()),
        at.deferred_adam(0.1, tables="table"),
        at.accumulate(at.scale_by_adam(), 2),
    ],
)
def test_abstract_arrays_differ_from_real_ones_in_values_alone(tx: Any) -> None:
    params = make_params()
    state = tx.init(params)
    real = summary(params, state, rows=False)
    abstract = summary(*jax.eval_shape(lambda: (params, state)))
    assert lines_of(abstract) == lines_of(real)
    assert {k: v for k, v in facts_of(abstract).items() if v not in ("int32[]", "float32[]")} == {
        k: v for k, v in facts_of(real).items() if v not in ("0", "0.1")
    }
    traced = []
    jax.jit(lambda params, state: traced.append(summary(params, state)))(params, state)
    assert traced == [abstract]


def test_abstract_accumulated_rows_are_told() -> None:
    like = jax.eval_shape(lambda: row_gradients(1, 2))
    tx = at.accumulate(at.lazy(at.scale_by_adam()), 3, like=like)
    text = summary(*jax.eval_shape(lambda: (make_params(), tx.init(make_params()))))
    assert column(text, "slots")["table"].startswith("acc: float32, 6 rows")


def test_numpy_parameters_none_and_what_is_no_array_are_taken() -> None:
    params = {"w": np.ones(2, np.float32), "none": None, "activation": jax.nn.relu, "scale": 2.0}
    arrays = {"w": params["w"], "none": None, "activation": None, "scale": 2.0}
    text = summary(params, at.scale_by_adam().init(arrays))
    assert column(text, "type") == {"w": "float32[2]", "scale": "float32[]"}
    assert summary({}, ()) == "total  0 parameters, 0 elements, 0 B\nstate  0 B"


def test_scalars_of_any_dtype_are_told() -> None:
    state = {"ready": jnp.array(True), "half": jnp.bfloat16(0.5), "key": jax.random.key(0)}
    facts = facts_of(summary({"w": jnp.ones(2)}, state | {"many": jnp.int32(12_345)}))
    assert facts["ready"] == "True"
    assert facts["half"] == "0.5"
    assert facts["key"] == "key<fry>[]"
    assert facts["many"] == "12,345"


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_shardings_and_bytes_per_device_are_told(axis_type: Any, relaxed_promotion: None) -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    row, all_of = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("x",), ()))
    with jax.set_mesh(mesh):
        params = {"t": jax.device_put(jnp.ones((V, D)), row), "w": jax.device_put(1.0, all_of)}
        state = at.lazy_adam(0.1).init(params)
        text = summary(params, state)
        assert column(text, "sharding") == {"t": "('x',)", "w": ""}
        assert column(text, "rows")["t"] == f"{V} untouched"
        assert column(text, "bytes")["t"] == "256 B"
        scalars = state.inner_state[0].count.nbytes
        per_device = f"{64 + 4} B of parameters, {128 + 8 + scalars} B of state"
        assert facts_of(text)["per device"] == per_device
        # Slots sharded otherwise than their parameter.
        params = {"t": jax.device_put(jnp.ones((V, D)), all_of), "w": params["w"]}
        assert column(summary(params, state), "sharding")["t"] == "mu, nu: ('x',)"
        params = {"t": jax.device_put(jnp.ones((V, D)), row)}
        state = jax.device_put(at.scale_by_adam().init(params), all_of)
        assert column(summary(params, state), "sharding")["t"] == "('x',); mu, nu: replicated"


def test_nothing_is_told_of_shardings_on_one_device() -> None:
    params = make_params()
    text = summary(params, at.scale_by_adam().init(params))
    assert "sharding" not in lines_of(text)["table"]
    assert "per device" not in facts_of(text)


def test_tables_stay_where_they_are(
    monkeypatch: pytest.MonkeyPatch, relaxed_promotion: None
) -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    # What is on several devices is read through `_value` alone, whoever reads it.
    params = {"t": jax.device_put(jnp.ones((V, D)), NamedSharding(mesh, PartitionSpec("x")))}
    kept = type(params["t"])._value

    def value(array: Any) -> Any:
        assert array.shape == ()
        return kept.fget(array)

    monkeypatch.setattr(type(params["t"]), "_value", property(value))
    with pytest.raises(AssertionError):
        np.asarray(params["t"])
    for tx in (at.lazy_adam(0.1), at.deferred_adam(0.1, tables="t", max_idle=300)):
        assert column(summary(params, tx.init(params)), "rows")["t"]


def test_nnx_module_and_optimizer_are_read_as_they_are(relaxed_promotion: None) -> None:
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.embed = nnx.Embed(V, D, rngs=rngs)
            self.dense = nnx.Linear(D, 2, rngs=rngs)

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, at.deferred_adam(0.1, tables="embedding", max_idle=300), wrt=nnx.Param
    )
    of_module = summary(model, optimizer.opt_state)
    assert of_module == summary(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert column(of_module, "kind") == {
        "embed/embedding": "deferred",
        "dense/bias": "dense",
        "dense/kernel": "dense",
    }
    assert column(of_module, "rows")["embed/embedding"] == "0 owe, gap up to 0"
    assert of_module.count("count") == 1  # and not as the variable around it too


def test_flag_is_checked() -> None:
    with pytest.raises(TypeError, match="rows must be True or False"):
        summary({}, (), rows=1)  # pyright: ignore[reportArgumentType]
