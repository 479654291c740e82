"""`freeze_rows`: rows that never move, and their slots."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, assert_close, in_tiers, normal, types

import adam_transforms as at
from adam_transforms._embeddings.freeze_rows import FreezeRowsState, freeze_rows
from adam_transforms._transforms.master_weights import master_weights

V, D, FROZEN = 12, 3, [0, 5]
FREE = np.setdiff1d(np.arange(V), FROZEN)
ROWS = {"table": FROZEN}


def start(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    return {"table": jnp.asarray(normal(0, V, D), dtype), "bias": jnp.asarray(normal(1, D), dtype)}


def gradient(seed: int, kind: str, n: int = 8) -> dict[str, Any]:
    """Dense, or of some rows, the frozen ones among them in any case."""
    bias = jnp.asarray(normal(seed + 100, D))
    if kind == "dense":
        return {"table": jnp.asarray(normal(seed, V, D)), "bias": bias}
    indices = np.concatenate([FROZEN, np.random.default_rng(seed).integers(0, V + 1, n - 2)])
    return {
        "table": at.SparseRows(indices, jnp.asarray(normal(seed, n, D)), V, synchronized=True),
        "bias": bias,
    }


def train(tx: Any, params: Any, gradients: list[Any], state: Any = None) -> Any:
    @jax.jit
    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return at.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    for g in gradients:
        params, state = step(params, state, g)
    return params, state


def assert_kept(old: Any, new: Any) -> None:
    """The frozen rows of all that has the table's length, and that the free ones have moved."""
    pairs = list(zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    slots = [(x, y) for x, y in pairs if x.shape[:1] == (V,) and x.dtype != bool]
    assert slots
    for x, y in slots:
        assert_bits_equal(y[np.array(FROZEN)], x[np.array(FROZEN)])
        assert np.any(y[FREE] != x[FREE])


def decayed_l2(**adam: Any) -> Any:
    """Decay through the moments: frozen rows' moments would move without any gradient."""
    return optax.chain(
        optax.add_decayed_weights(0.1), at.scale_by_amsgrad(**adam), optax.scale(-0.1)
    )


INNER = {
    "amsgrad": lambda: decayed_l2(),
    "adamw": lambda: at.adamw(0.1, weight_decay=0.1, clip_global_norm=1.0),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "masters": lambda: master_weights(at.adamw(0.1)),
    "grouped": lambda: at.by_path([("table", at.adamw(0.1))], optax.sgd(0.1)),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(0.1),
}
NESTED = {
    "dense": lambda inner: freeze_rows(inner, ROWS),
    "outside lazy": lambda inner: freeze_rows(at.lazy(inner, tables=()), ROWS),
    "inside lazy": lambda inner: at.lazy(freeze_rows(inner, ROWS), tables=()),
    "outside lazy, dense": lambda inner: freeze_rows(at.lazy(inner, tables=()), ROWS),
}


# The first tier tries each nesting, and every inner transformation but one.
QUICK = [
    ("dense", "amsgrad"),
    ("dense", "injected"),
    ("inside lazy", "masters"),
    ("inside lazy", "grouped"),
    ("outside lazy", "amsgrad"),
    ("outside lazy, dense", "adamw"),
]


@pytest.mark.parametrize(
    ("nested", "inner"),
    in_tiers(
        [
            *((nested, inner) for nested in ("dense", "inside lazy") for inner in INNER),
            *(("outside lazy", inner) for inner in ("amsgrad", "masters")),
            ("outside lazy, dense", "adamw"),
        ],
        lambda *case: case in QUICK,
    ),
)
def test_frozen_rows_and_their_slots_stay_and_the_others_move_as_ever(
    inner: str, nested: str, relaxed_promotion: None
) -> None:
    """Frozen in mid-training, when the rows have momentum."""
    kind = "dense" if "dense" in nested else "rows"
    bare = at.lazy(INNER[inner](), tables=()) if "lazy" in nested else INNER[inner]()
    params, state = train(bare, start(), [gradient(i, kind) for i in range(3)])
    tx = NESTED[nested](INNER[inner]())
    fresh = tx.init(params)
    if nested == "inside lazy":
        frozen = at.LazyState(fresh.inner_state._replace(inner_state=state.inner_state))
    else:
        frozen = fresh._replace(inner_state=state)
    assert types(frozen) == types(fresh)

    gradients = [gradient(i, kind) for i in range(3, 6)]
    new_params, new_state = train(tx, params, gradients, frozen)
    assert types(new_state) == types(frozen)
    assert_kept((params, frozen), (new_params, new_state))

    silent = [_silenced(g) for g in gradients]
    expected, _ = train(bare, params, silent, state)
    for name, keep in (("table", FREE), ("bias", slice(None))):
        assert_close(new_params[name][keep], expected[name][keep], rtol=1e-5, atol=1e-6)


def _silenced(g: dict[str, Any]) -> dict[str, Any]:
    """`g` in which frozen rows count for nothing."""
    table = g["table"]
    if isinstance(table, at.SparseRows):
        indices = jnp.where(jnp.isin(table.indices, jnp.array(FROZEN)), V, table.indices)
        return {**g, "table": at.SparseRows(indices, table.values, V, synchronized=True)}
    return {**g, "table": table.at[np.array(FROZEN)].set(0.0)}


@pytest.mark.parametrize("kind", ["dense", "rows"])
def test_gradient_of_a_frozen_row_leaves_no_trace_even_if_it_is_nan(kind: str) -> None:
    clip = at.lazy(at.clip_by_global_norm(1.0), tables=())
    inner = optax.chain(clip, at.lazy(at.scale_by_adam(), tables=()))
    tx = freeze_rows(at.skip_nonfinite(inner), ROWS)
    g = gradient(1, kind)
    if kind == "dense":
        bad = {**g, "table": g["table"].at[0].set(jnp.nan)}
    else:
        values = g["table"].values.at[0].set(jnp.nan)
        bad = {**g, "table": g["table"].with_values(values)}
    assert_bits_equal(train(tx, start(), [bad]), train(tx, start(), [g]))


@pytest.mark.parametrize(
    ("order", "kind"),
    in_tiers(
        itertools.product(
            ("accumulate outside", "accumulate inside", "loss scale"), ("dense", "rows")
        ),
        lambda order, kind: (order == "accumulate inside") == (kind == "dense"),
    ),
)
def test_works_among_wrappers_that_hold_steps_back(
    order: str, kind: str, relaxed_promotion: None
) -> None:
    inner, g = at.lazy(decayed_l2(), tables=()), gradient(0, kind)

    def accumulate(inner: Any) -> Any:
        return at.accumulate(inner, 2, like=jax.eval_shape(lambda: g))

    tx = {
        "accumulate outside": lambda: accumulate(freeze_rows(inner, ROWS)),
        "accumulate inside": lambda: freeze_rows(accumulate(inner), ROWS),
        "loss scale": lambda: at.dynamic_loss_scale(accumulate(freeze_rows(inner, ROWS)), 1.0),
    }[order]()
    gradients = [gradient(i, kind) for i in range(4)]
    params, _ = train(tx, start(), gradients)
    expected, _ = train(accumulate(inner), start(), [_silenced(g) for g in gradients])
    assert_bits_equal(params["table"][np.array(FROZEN)], start()["table"][np.array(FROZEN)])
    assert_close(params["table"][FREE], expected["table"][FREE], rtol=1e-5, atol=1e-6)


def test_average_of_a_frozen_row_is_the_row_and_overwrites_nothing(
    relaxed_promotion: None,
) -> None:
    tx = freeze_rows(at.adam(0.1, ema=0.5, ema_overwrite_every=2), ROWS)
    params, state = train(tx, start(), [gradient(i, "dense") for i in range(4)])
    for table in (params["table"], at.ema_params(state)["table"]):
        assert_bits_equal(table[np.array(FROZEN)], start()["table"][np.array(FROZEN)])


@pytest.mark.parametrize("overwrite_every", [None, 2])
def test_debiased_average_of_a_frozen_row_is_the_row(overwrite_every: int | None) -> None:
    ema = at.params_ema(0.5, debias=True, overwrite_every=overwrite_every)
    tx = freeze_rows(optax.chain(optax.add_decayed_weights(-0.1), ema), ROWS)
    params, state = train(tx, start(), [gradient(i, "dense") for i in range(4)])
    final = at.finalize(params, state)["table"]
    rows = np.array(FROZEN)
    assert_close(final[rows], start()["table"][rows])
    assert np.abs(final - start()["table"])[FREE].max() > 1e-3


@pytest.mark.parametrize(
    "selected", [5, [0, 5], np.array([5, 0, 5]), range(3, 9), jnp.arange(V) > 4]
)
def test_rows_are_given_as_ids_ranges_or_a_mask(selected: Any) -> None:
    tx = freeze_rows(optax.sgd(1.0), {"table": selected})
    params, state = train(tx, start(), [gradient(0, "dense")])
    chosen = np.asarray(selected)
    expected = np.zeros(V, bool)
    expected[chosen] = True
    np.testing.assert_array_equal(state.frozen["table"], expected)
    assert state.frozen["bias"] is None
    moved = np.any(np.asarray(params["table"] != start()["table"]), axis=1)
    np.testing.assert_array_equal(moved, ~expected)


def test_patterns_add_up() -> None:
    tables = {"a": jnp.ones((4, 1)), "b": jnp.ones((6, 1))}
    state = freeze_rows(optax.sgd(1.0), {"a|b": 0, "b": [1, 5]}).init(tables)
    assert np.flatnonzero(state.frozen["a"]).tolist() == [0]
    assert np.flatnonzero(state.frozen["b"]).tolist() == [0, 1, 5]


@pytest.mark.parametrize("nested", ["outside lazy", "inside lazy"])
def test_row_step_takes_no_longer_for_a_larger_table(nested: str) -> None:
    num_rows = 200_000
    tx = NESTED[nested](at.scale_by_adam())

    def step(params: Any, state: Any, rows: Any) -> Any:
        updates, state = tx.update({"table": rows}, state, params)
        return optax.apply_updates(params, updates), state

    params = {"table": jax.ShapeDtypeStruct((num_rows, 8), jnp.float32)}
    rows = at.SparseRows(jnp.zeros(64, jnp.int32), jnp.zeros((64, 8)), num_rows)
    step = jax.jit(step, donate_argnums=(0, 1))
    compiled = step.lower(params, jax.eval_shape(tx.init, params), rows).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < num_rows  # not even the mask once more
    cost: Any = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    assert cost["flops"] < num_rows


def test_none_gradient_leaves_table_and_slots_alone() -> None:
    tx = freeze_rows(at.scale_by_adam(), ROWS)
    params, state = train(tx, start(), [gradient(0, "dense")])
    g = {"table": None, "bias": gradient(1, "dense")["bias"]}
    updates, new_state = jax.jit(tx.update)(g, state, params)
    assert updates["table"] is None
    assert_bits_equal(new_state.inner_state.mu["table"], state.inner_state.mu["table"])
    assert_bits_equal(new_state.frozen, state.frozen)


# ---- deferred tables ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "rows"])
def test_rows_of_a_deferred_table_frozen_from_the_start_never_move(kind: str) -> None:
    tx = freeze_rows(at.deferred_adam(0.1, 0.5, tables="table", max_idle=40), ROWS)
    gradients = [gradient(i, kind) for i in range(50)]
    params, state = train(tx, start(), gradients)
    params, state = jax.jit(at.flush)(params, state)
    kept = np.array(FROZEN)
    assert_bits_equal(params["table"][kept], start()["table"][kept])
    assert not np.any(state.inner_state.mu["table"][kept])
    dense = optax.chain(at.scale_by_adam(0.5), optax.scale(-0.1))
    expected, _ = train(dense, start(), at.to_dense([_silenced(g) for g in gradients]))
    assert_close(params["table"][FREE], expected["table"][FREE], rtol=1e-5, atol=1e-5)


def test_decayed_deferred_table_is_refused_with_the_way_out() -> None:
    arguments: dict[str, Any] = {"tables": "table", "weight_decay": 0.1, "max_idle": 300}
    with pytest.raises(ValueError, match="'table'.*weight_decay_mask"):
        freeze_rows(at.deferred_adam(0.1, **arguments), ROWS).init(start())
    exempt = at.path_mask("bias")
    tx = freeze_rows(at.deferred_adam(0.1, **arguments, weight_decay_mask=exempt), ROWS)
    assert isinstance(tx.init(start()), FreezeRowsState)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"table": V}, rf"'table' must be in \[0, {V}\), got {V}"),
        ({"table": [3, -1]}, rf"'table' must be in \[0, {V}\), got -1"),
        ({"table": np.ones(V + 1, bool)}, r"mask of the rows of 'table' must have shape \[12\]"),
        ({"table": np.ones((V, D), bool)}, r"must have shape \[12\], or be shorter, got \[12, "),
        ({"tabel": 0}, "no leaf matches 'tabel' of rows.*'bias', 'table'"),
        ({}, "at least one pattern"),
    ],
)
def test_rows_that_are_not_there_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        freeze_rows(optax.sgd(0.1), rows).init(start())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("table", 0)], "rows must be a mapping"),
        ({"table": 0.5}, "'table' must be integers or a boolean mask, got 0.5"),
        ({"table": "pad"}, "'table' must be integers or a boolean mask, got 'pad'"),
        ({"table": [[1, 2]]}, "'table' must be integers"),
    ],
)
def test_rows_of_another_kind_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        freeze_rows(optax.sgd(0.1), rows).init(start())


def test_rows_of_stacked_tables_are_given_as_a_mask_of_their_axes() -> None:
    params = {"tables": jnp.ones((2, 4, D))}
    mask = np.zeros((2, 3), bool)
    mask[:, 0] = True
    rows = at.SparseRows(np.arange(8), np.ones((8, D), np.float32), 8, leading_shape=(2, 4))
    moved = []
    for inner, g in ((at.lazy_adam(0.1), rows), (at.adam(0.1), rows.to_dense())):
        tx = freeze_rows(inner, {"tables": mask, "t": [[False] * 4, [True] * 4]})
        updates, state = tx.update({"tables": g}, tx.init(params), params)
        moved.append(optax.apply_updates(params, updates)["tables"])
        mu = optax.tree_utils.tree_get(state, "mu")["tables"]
        assert np.any(mu, 2)[1].tolist() == [False] * 4
    assert_bits_equal(*moved)
    assert np.any(moved[0] != 1, 2).tolist() == [[False, True, True, True], [False] * 4]
    tx = freeze_rows(at.lazy_adam(0.1), {"tables": 0})
    with pytest.raises(ValueError, match=r"'tables'.*row axes \[2, 4\].*boolean mask.*\[2\]"):
        tx.update({"tables": rows}, tx.init(params), params)
    with pytest.raises(ValueError, match=r"'tables' must have shape \[2\], of stacked.*\[2, 4\]"):
        freeze_rows(at.lazy_adam(0.1), {"tables": np.ones((2, 5), bool)}).init(params)


def test_state_of_a_table_of_another_length_is_refused() -> None:
    tx = freeze_rows(optax.sgd(0.1), ROWS)
    state = tx.init(start())
    params = {**start(), "table": jnp.ones((V + 1, D))}
    with pytest.raises(ValueError, match="'table' has 13 rows in the parameters, but 12"):
        tx.update(params, state, params)


def test_state_that_is_not_kept_by_row_is_refused(relaxed_promotion: None) -> None:
    def init(params: Any) -> Any:
        return jnp.zeros((2, params["table"].shape[0]))

    transposed = optax.GradientTransformation(init, lambda g, state, params=None: (g, state))
    tx = freeze_rows(transposed, ROWS)
    with pytest.raises(ValueError, match=r"kept by row.*\[2, 12\]"):
        tx.update(gradient(0, "dense"), tx.init(start()), start())


def test_update_needs_params() -> None:
    tx = freeze_rows(optax.sgd(0.1), ROWS)
    with pytest.raises(ValueError, match="freeze_rows.*needs params"):
        tx.update(gradient(0, "dense"), tx.init(start()))
