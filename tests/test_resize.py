"""`resize`: tables that grow between steps, and the training that goes on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_bits_equal, assert_close, in_tiers, normal, types
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_transforms as at
from adam_transforms._embeddings.freeze_rows import freeze_rows
from adam_transforms._embeddings.resize import resize
from adam_transforms._transforms.master_weights import master_weights

V, D, LARGER = 10, 3, 17
# `bias` is as long as the table, and none of it.
OLD = {"net": {"table": (V, D)}, "other": (V, D), "bias": (V,)}
PATH = "net/table"


def start(dtype: Any = jnp.float32, num_rows: int = V) -> dict[str, Any]:
    """The same first rows for every number of them."""
    table = np.concatenate([normal(0, V, D), normal(1, LARGER - V, D)])[:num_rows]
    return {
        "net": {"table": jnp.asarray(table, dtype)},
        "other": jnp.asarray(normal(2, V, D), dtype),
        "bias": jnp.asarray(normal(3, V), dtype),
    }


def appended(dtype: Any = jnp.float32) -> Any:
    return start(dtype, LARGER)["net"]["table"][V:]


def gradient(seed: int, kind: str, num_rows: int = V, dtype: Any = jnp.float32) -> Any:
    """Of the first V rows alone, however many there are."""
    rng = np.random.default_rng(seed)

    def table(seed: int, num_rows: int) -> Any:
        values = jnp.asarray(normal(seed, V, D), dtype)
        if kind == "dense":
            return jnp.zeros((num_rows, D), dtype).at[:V].set(values)
        indices = rng.integers(0, V + 1, V)
        return at.SparseRows(
            np.where(indices == V, num_rows, indices), values, num_rows, synchronized=True
        )

    return {
        "net": {"table": table(seed, num_rows)},
        "other": table(seed + 50, V),
        "bias": jnp.asarray(normal(seed + 99, V), dtype),
    }


def step_of(tx: Any) -> Any:
    @jax.jit
    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return at.apply_updates(params, updates), state

    return step


def follow(step: Any, params: Any, state: Any, gradients: list[Any]) -> Any:
    for g in gradients:
        params, state = step(params, state, g)
    return params, state


def train(tx: Any, params: Any, gradients: list[Any], state: Any = None) -> Any:
    state = tx.init(params) if state is None else state
    return follow(step_of(tx), params, state, gradients)


def like(num_rows: int) -> Any:
    return jax.eval_shape(lambda: gradient(0, "rows", num_rows))


def deferred(num_rows: int, **arguments: Any) -> Any:
    return at.deferred_adam(0.1, 0.5, tables="table", max_idle=300, **arguments)


# Of the number of rows, for what has to know it.
DENSE = {
    "adam": lambda n: at.adam(0.1),
    "amsgrad": lambda n: at.adam(0.1, amsgrad=True, nesterov=False, clip_global_norm=1.0),
    "sgd": lambda n: optax.sgd(0.1, momentum=0.9),
    "everything": lambda n: at.adam(0.1, ema=0.9, accumulate_every=2, loss_scale="dynamic"),
    "MultiSteps": lambda n: optax.MultiSteps(at.adam(0.1), 2),
    "by_path": lambda n: at.by_path([("net", at.adam(0.1))], optax.sgd(0.1, momentum=0.9)),
    "multi_transform": lambda n: optax.multi_transform(
        {"a": at.adam(0.1), "b": optax.sgd(0.1)},
        {"net": {"table": "a"}, "other": "a", "bias": "b"},
    ),
    "inject_hyperparams": lambda n: optax.inject_hyperparams(at.adam)(learning_rate=0.1),
    "masters": lambda n: master_weights(at.adam(0.1, ema=0.9)),
    "frozen": lambda n: freeze_rows(at.adam(0.1), {"table": [1, 2]}),
    "compressed": lambda n: at.adam(0.1, state_bits=16),
    "scheduled": lambda n: at.scale_by_adam(b1=lambda count: 0.9, b2=0.99),
}
ROWS = {
    "lazy_adam": lambda n: at.lazy_adam(0.1, weight_decay=0.1),
    "lazy accumulated": lambda n: at.lazy_adam(
        0.1, amsgrad=True, accumulate_every=2, accumulate_like=like(n), loss_scale="dynamic"
    ),
    "lazy averaged": lambda n: optax.chain(
        at.lazy(at.scale_by_adam()),
        optax.masked(at.params_ema(0.9), {"net": {"table": False}, "other": False, "bias": True}),
    ),
    "lazy average": lambda n: at.lazy_adam(0.1, ema=0.9),
    "lazy masters": lambda n: at.lazy(master_weights(at.adam(0.1))),
    "lazy frozen": lambda n: freeze_rows(at.lazy_adam(0.1), {"table": range(3)}),
}
CASES = [(name, "dense") for name in DENSE] + [(name, "rows") for name in ROWS]
# The first tier leaves out what is much like another.
LIKE_OTHERS = ("adam", "amsgrad", "sgd", "MultiSteps", "by_path", "inject_hyperparams", "scheduled")
LIKE_OTHERS += ("lazy_adam", "lazy frozen")
every_case = pytest.mark.parametrize(
    ("name", "kind"), in_tiers(CASES, lambda name, kind: name not in LIKE_OTHERS)
)


def make(name: str, num_rows: int) -> Any:
    return {**DENSE, **ROWS}[name](num_rows)


def precision(name: str) -> Any:
    return jnp.bfloat16 if "masters" in name else jnp.float32


@functools.cache
def trained(name: str, kind: str) -> Any:
    """A jitted step, and parameters and state after three of them."""
    dtype, tx = precision(name), make(name, V)
    step, params = step_of(tx), start(dtype)
    gradients = [gradient(i, kind, V, dtype) for i in range(3)]
    return step, *follow(step, params, tx.init(params), gradients)


@every_case
def test_state_is_that_of_larger_parameters_with_the_old_rows_in_it(
    name: str, kind: str, relaxed_promotion: None
) -> None:
    dtype = precision(name)
    _, params, state = trained(name, kind)
    new_params, new_state = resize(params, state, {PATH: appended(dtype)})
    fresh = make(name, LARGER).init(new_params)
    assert types(new_state) == types(fresh)
    assert types(new_params) == types(start(dtype, LARGER))
    assert_bits_equal(new_params["net"]["table"][:V], params["net"]["table"])
    assert_bits_equal(new_params["net"]["table"][V:], appended(dtype))
    triples = zip(
        jax.tree.leaves((params, state)),
        jax.tree.leaves((new_params, new_state)),
        jax.tree.leaves((new_params, fresh)),
        strict=True,
    )
    grown = 0
    for old, new, start_of_new in triples:
        if old.shape == new.shape:
            if not jnp.issubdtype(old.dtype, jax.dtypes.prng_key):  # rows' padding moves
                assert new is old
            continue
        grown += 1
        assert_bits_equal(new[:V], old)
        if new.dtype == jnp.int32:  # the average of a new row includes all steps
            assert set(new[V:].tolist()) == {int(jnp.max(old))}
        else:
            assert_bits_equal(new[V:], start_of_new[V:])
    assert grown >= 1


@every_case
def test_training_goes_on_as_if_the_table_had_always_been_larger(
    name: str, kind: str, relaxed_promotion: None
) -> None:
    """As long as no new row has a gradient. Within a cycle of accumulation too."""
    dtype = precision(name)
    step, params, state = trained(name, kind)
    params, state = resize(params, state, {PATH: appended(dtype)})
    gradients = [gradient(i, kind, LARGER, dtype) for i in range(8)]
    actual = follow(step, params, state, gradients[3:])
    params = start(dtype, LARGER)
    expected = follow(step, params, make(name, LARGER).init(params), gradients)
    if name == "lazy average":
        # The last step of an idle row says how much its average lacks: what it is then, counts.
        actual, expected = (
            (params, at.ema_params(state, params)) for params, state in (actual, expected)
        )
    assert_close(*(jax.tree.map(_plain, x) for x in (actual, expected)), rtol=1e-5, atol=1e-6)


def _plain(x: Any) -> Any:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_new_rows_train() -> None:
    params, state = train(at.lazy_adam(0.1), start(), [gradient(0, "rows")])
    params, state = resize(params, state, {PATH: LARGER})
    assert not np.any(params["net"]["table"][V:])
    g = {**gradient(1, "rows", LARGER)}
    g["net"] = {"table": at.SparseRows(jnp.array([V, LARGER - 1]), jnp.ones((2, D)), LARGER)}
    params, _ = train(at.lazy_adam(0.1), params, [g], state)
    moved = np.any(np.asarray(params["net"]["table"][V:]) != 0, axis=1)
    assert np.flatnonzero(moved).tolist() == [0, LARGER - 1 - V]


def test_several_tables_grow_at_once_each_by_its_own() -> None:
    params, state = train(at.adam(0.1), start(), [gradient(0, "dense")])
    new_params, new_state = resize(params, state, {PATH: 12, "other": 20})
    assert types(new_state) == types(at.adam(0.1).init(new_params))
    assert new_params["other"].shape == (20, D)
    assert new_params["bias"] is params["bias"]


def test_as_many_rows_as_there_are_change_nothing() -> None:
    params, state = train(at.adam(0.1), start(), [gradient(0, "dense")])
    result = resize(params, state, {PATH: V, "other": jnp.zeros((0, D))})
    for old, new in zip(jax.tree.leaves((params, state)), jax.tree.leaves(result), strict=True):
        assert new is old


def test_a_bare_table_is_called_by_the_empty_path() -> None:
    table = jnp.asarray(normal(0, 5, 2))
    dense = optax.chain(at.clip_by_norm(1.0), at.scale_by_adam(), at.params_ema(0.9))
    for tx in (dense, freeze_rows(dense, {"": 0}), at.deferred_adam(0.1, tables="", max_idle=300)):
        _, state = jax.jit(tx.update)(table, tx.init(table), table)
        larger, state = resize(table, state, {"": 7})
        assert types(state) == types(tx.init(larger))


def test_longest_path_tells_tables_of_like_names_apart() -> None:
    params = {"table": jnp.ones((4, 1)), "net": {"table": jnp.ones((4, 1))}}
    tx = at.scale_by_adam()
    new_params, state = resize(params, tx.init(params), {"table": 6})
    assert types(state) == types(tx.init(new_params))
    assert state.mu["net"]["table"].shape == (4, 1)


def test_parameters_called_like_slots_have_slots_of_their_own() -> None:
    names = ("mu", "nu", "acc")
    params = {name: {"table": jnp.ones((3, 1))} for name in names} | {"table": jnp.ones((4, 1))}
    tx = at.accumulate(at.scale_by_adam(), 2)
    larger, state = resize(params, tx.init(params), {"table": 6, "mu/table": 5})
    assert types(state) == types(tx.init(larger))


def test_debiased_average_of_a_new_row_is_the_row(relaxed_promotion: None) -> None:
    tx = at.adam(0.1, ema=None)
    tx = optax.chain(tx, at.params_ema(0.9, debias=True))
    params, state = train(tx, start(), [gradient(i, "dense") for i in range(3)])
    _, state = resize(params, state, {PATH: appended()})
    np.testing.assert_allclose(at.ema_params(state)["net"]["table"][V:], appended(), rtol=1e-6)


def test_collected_rows_and_their_padding_stay_what_they_are() -> None:
    tx = at.accumulate(at.lazy(at.scale_by_adam()), 3, like=like(V))
    params, state = train(tx, start(), [gradient(0, "rows")])
    acc = state.acc["net"]["table"]
    assert not np.all(acc.is_valid)
    _, new_state = resize(params, state, {PATH: LARGER})
    new = new_state.acc["net"]["table"]
    assert new.num_rows == LARGER
    np.testing.assert_array_equal(new.is_valid, acc.is_valid)
    assert_bits_equal(new.to_dense()[:V], acc.to_dense())
    assert not np.any(new.to_dense()[V:])


def test_stacked_tables_grow_by_whole_tables(relaxed_promotion: None) -> None:
    def case(tables: int) -> Any:
        rows = at.SparseRows(
            np.array([1, 7, -1], np.int32),
            np.ones((3, D), np.float32),
            tables * 4,
            leading_shape=(tables, 4),
        )
        inner = freeze_rows(at.lazy_adam(0.1, ema=0.9), {"t": np.eye(2, 4, dtype=bool)})
        like = jax.eval_shape(lambda: {"t": rows})
        return at.accumulate(inner, 2, like=like), {"t": jnp.ones((tables, 4, D))}, {"t": rows}

    (tx, params, grads), (larger_tx, larger, more_grads) = case(2), case(3)
    _, state = tx.update(grads, tx.init(params), params)
    params, state = resize(params, state, {"t": 3})
    assert types(state) == types(larger_tx.init(larger))
    assert state.acc["t"].indices.tolist() == [1, 7, 12, 12, 12, 12]
    updates, _ = larger_tx.update(more_grads, state, params)
    assert np.argwhere(np.any(at.to_dense(updates)["t"], 2)).tolist() == [[0, 1], [1, 3]]


def test_numpy_parameters_grow() -> None:
    params = {"table": np.ones((3, 2), np.float32)}
    larger, _ = resize(params, optax.EmptyState(), {"table": np.full((1, 2), 2.0)})
    assert larger["table"].dtype == jnp.float32
    assert larger["table"].tolist() == [[1.0, 1.0]] * 3 + [[2.0, 2.0]]


def test_nnx_model_and_optimizer_grow(relaxed_promotion: None) -> None:
    model = nnx.Sequential(nnx.Embed(V, D, rngs=nnx.Rngs(0)), nnx.Linear(D, 1, rngs=nnx.Rngs(1)))
    params = nnx.state(model, nnx.Param)
    tx = at.adam(0.1)
    state = tx.init(params)
    larger, state = resize(params, state, {"layers/0/embedding": LARGER})
    assert types(state) == types(tx.init(larger))
    nnx.update(model, larger)
    assert model.layers[0].embedding[...].shape == (LARGER, D)


# ---- deferred tables ----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True, "weight_decay": 0.1}])
def test_deferred_rows_keep_owing_and_new_ones_owe_nothing(arguments: dict[str, Any]) -> None:
    gradients = [gradient(i, "dense") for i in range(6)]
    gradients = [{**g, "net": gradient(i, "rows")["net"]} for i, g in enumerate(gradients)]
    gradients += [{**g, "net": {"table": _of_row(0, V)}} for g in gradients]
    params, state = train(deferred(V, **arguments), start(), gradients)
    owed = jax.jit(at.owed)(params, state)[PATH]
    assert int(owed.rows) > 0
    new_params, new_state = resize(params, state, {PATH: LARGER})
    assert types(new_state) == types(deferred(LARGER, **arguments).init(new_params))
    group = "idle_decayed" if arguments else "idle"
    last = getattr(new_state, group).last_step["net"]["table"]
    assert last[V:].tolist() == [12] * (LARGER - V)
    assert_bits_equal(last[:V], getattr(state, group).last_step["net"]["table"])
    assert_bits_equal(getattr(new_state, group).ring, getattr(state, group).ring)
    assert_bits_equal(new_params["net"]["table"][:V], params["net"]["table"])
    assert int(jax.jit(at.owed)(new_params, new_state)[PATH].rows) == int(owed.rows)


def _of_row(row: int, num_rows: int) -> at.SparseRows:
    return at.SparseRows(jnp.array([row]), jnp.ones((1, D)), num_rows, synchronized=True)


def test_deferred_stays_on_dense_adams_trajectory_though_turns_change(
    relaxed_promotion: None,
) -> None:
    """Rows that no gradient touches again, but that decay: a larger table postpones the turn of
    some beyond what the ring remembers."""
    b1, steps, grow_at = 0.4, 80, 44
    num_rows, larger = 40, 64
    tx = at.deferred_adam(0.1, b1, tables="table", eps_hat=True, weight_decay=0.1, max_idle=25)
    dense = at.adamw(0.1, b1, eps_hat=True, weight_decay=0.1)
    table = normal(0, larger, D)

    def rows(step: int, size: int) -> at.SparseRows:
        indices = np.arange(num_rows) if step == 0 else np.array([step % 3])
        return at.SparseRows(
            indices, jnp.asarray(normal(step, len(indices), D)), size, synchronized=True
        )

    old = {"table": jnp.asarray(table[:num_rows])}
    added = {"table": jnp.asarray(table[num_rows:])}
    first = [{"table": rows(i, num_rows)} for i in range(grow_at)]
    rest = [{"table": rows(i, larger)} for i in range(grow_at, steps)]

    params, state = train(tx, old, first)
    last = state.idle_decayed.last_step["table"]
    params, state = resize(params, state, added)
    early = state.idle_decayed.last_step["table"][:num_rows] != last
    assert 0 < np.sum(early) < num_rows  # those alone
    params, _ = jax.jit(at.flush)(*train(tx, params, rest, state))

    expected, state = resize(*train(dense, old, at.to_dense(first)), added)
    expected, _ = train(dense, expected, at.to_dense(rest), state)
    assert_close(params, expected, rtol=1e-5, atol=2e-6)


# ---- meshes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x")])
def test_sharded_table_and_slots_stay_so(axis_type: Any, spec: Any) -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        table = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, spec))
        tx = at.scale_by_adam()
        params = {"table": table}
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
        larger, state = resize(params, state, {"table": 12})
        for x in (larger["table"], state.mu["table"], state.nu["table"]):
            assert x.shape == (12, 4)
            assert x.sharding == table.sharding
        jax.jit(tx.update)(larger, state, larger)
        if spec[0] == "x":
            with pytest.raises(ValueError, match="'table' cannot have 13 rows"):
                resize(params, tx.init(params), {"table": 13})


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"table": 12}, "'table' is no table in params; these are: 'bias', 'net/table', 'other'"),
        ({PATH: V - 1}, "'net/table' has 10 rows and cannot go down to 9.*lost"),
        ({PATH: -1}, "cannot go down to -1"),
        ({PATH: np.ones((2, D + 1))}, r"'net/table' must have shape \[k, 3\], got \[2, 4\]"),
        ({PATH: np.ones(D)}, r"'net/table' must have shape \[k, 3\], got \[3\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize(start(), at.adam(0.1).init(start()), rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (12, "rows must be a mapping"),
        ({PATH: 12.0}, "'net/table' must grow to a number of rows, or by an array.*12.0"),
        ({PATH: True}, "'net/table' must grow to a number of rows"),
        ({PATH: "12"}, "'net/table' must grow to a number of rows"),
        ({PATH: [[1.0] * D]}, "'net/table' must grow to a number of rows"),
        ({PATH: np.ones((1, D), complex)}, "'net/table' is kept in float32"),
    ],
)
def test_sizes_of_another_kind_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        resize(start(), at.adam(0.1).init(start()), rows)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"seen": jnp.zeros(V)}, r"'seen' in the state, of shape \[10\], has the length of"),
        ({"mu": {"net": {"table": jnp.zeros((D, V))}}}, r"'mu/net/table'.*\[3, 10\]"),
        ({"mu": {"net": {"table": jnp.zeros((V, V))}}}, r"'mu/net/table'.*\[10, 10\]"),
    ],
)
def test_leaf_of_the_tables_length_that_cannot_be_told_is_refused_by_name(
    state: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resize(start(), state, {PATH: LARGER})


def test_per_row_leaf_of_a_square_table_is_ambiguous() -> None:
    params, state = {"table": jnp.ones((4, 4))}, {"v": {"table": jnp.ones(4)}}
    with pytest.raises(ValueError, match="'v/table'"):
        resize(params, state, {"table": 5})


def test_tracing_is_refused() -> None:
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda p: resize(p, optax.EmptyState(), {PATH: LARGER}))(start())
