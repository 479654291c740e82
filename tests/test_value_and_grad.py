"""Gradients of tables by rows: equal to JAX's when made dense, whatever the model, at O(rows)."""

import functools
import re
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import adam_transforms as at
from adam_transforms._core.sparse_rows import SparseRows, is_rows, to_dense
from adam_transforms._embeddings.value_and_grad import grad, value_and_grad

ROWS, WIDTH = 31, 3
IDS = np.array([[1, 5, 5], [30, 0, 1]], np.int32)


def integers(seed: int, *shape: int) -> jax.Array:
    """Small integers in float32: sums of their products are exact in any order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape), jnp.float32)


TABLE = integers(0, ROWS, WIDTH)
OTHER = integers(1, ROWS, WIDTH)

LOOKUPS: dict[str, Any] = {
    "index": lambda table, ids: table[ids],
    "index with columns": lambda table, ids: table[ids, :],
    "get fill": lambda table, ids: table.at[ids].get(mode="fill", fill_value=0.0),
    "get clip": lambda table, ids: table.at[ids].get(mode="clip"),
    "take": lambda table, ids: jnp.take(table, ids, axis=0),
    "take clip": lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"),
    "take wrap": lambda table, ids: jnp.take(table, ids, axis=0, mode="wrap"),
    "take fill": lambda table, ids: jnp.take(table, ids, axis=0, mode="fill", fill_value=0.0),
    "jit": lambda table, ids: jax.jit(lambda table, ids: table[ids])(table, ids),
    "jit of the table": lambda table, ids: jax.jit(lambda x: x.astype(x.dtype))(table)[ids],
    "jit in jit": lambda table, ids: jax.jit(jax.jit(lambda ids: jnp.take(table, ids, axis=0)))(
        ids
    ),
    "checkpoint": lambda table, ids: jax.checkpoint(lambda table, ids: table[ids] * 2.0)(
        table, ids
    ),
    "checkpoint closing over": lambda table, ids: jax.checkpoint(lambda ids: table[ids])(ids),
    "vmap": lambda table, ids: jax.vmap(lambda ids: table[ids])(ids),
    "vmap of take": lambda table, ids: jax.vmap(lambda ids: jnp.take(table, ids, axis=0))(ids),
    "vmap of scalars": lambda table, ids: jax.vmap(jax.vmap(lambda i: table[i]))(ids),
    "vmap to axis 1": lambda table, ids: jax.vmap(lambda ids: table[ids], in_axes=1, out_axes=1)(
        ids
    ),
    "scalars": lambda table, ids: jnp.stack([table[i] for i in ids.reshape(-1)]).reshape(
        *ids.shape, *table.shape[1:]
    ),
    "static": lambda table, ids: jnp.stack([table[int(i)] for i in IDS.reshape(-1)]).reshape(
        *IDS.shape, *table.shape[1:]
    ),
    "barrier": lambda table, ids: jax.lax.optimization_barrier((table, ids))[0][ids],
    "cast": lambda table, ids: table.astype(jnp.bfloat16)[ids].astype(jnp.float32),
    "lax.gather": lambda table, ids: (
        jax.lax.gather(
            table,
            ids[..., None],
            jax.lax.GatherDimensionNumbers((0,), (0,), (0,)),
            (1, *table.shape[1:]),
        ).transpose(1, 2, 0)
        if table.ndim == 2
        else table[ids]
    ),
}


def two_tables(lookup: Any, params: Any, ids: Any) -> Any:
    users = lookup(params["a"]["table"], ids)
    items = lookup(params["b"][0], ids)
    return jnp.sum(users * items * weights(ids)) + jnp.sum(params["scale"])


def shared_table(lookup: Any, params: Any, ids: Any) -> Any:
    users = lookup(params["a"]["table"], ids)
    items = lookup(params["a"]["table"], (ids * 7) % ROWS)
    return jnp.sum(users * items * params["scale"] * params["a"]["table"][4][None, None])


MODELS = {"shared table": shared_table, "two tables": two_tables}


def weights(ids: Any) -> jax.Array:
    return integers(2, *np.shape(ids), WIDTH)


def make_params() -> dict[str, Any]:
    return {"a": {"table": TABLE}, "b": [OTHER], "scale": integers(3, *IDS.shape, WIDTH)}


def table_loss(table: Any, ids: Any) -> Any:
    return jnp.sum(table[ids] * weights(ids))


def ours_and_jaxs(loss: Any, *args: Any, tables: Any = "auto", **kwargs: Any) -> Any:
    """(value, gradient) of `value_and_grad`, its dense form, and what JAX gives: one program."""

    @jax.jit
    def compiled(args: Any) -> Any:
        ours = value_and_grad(loss, tables=tables, **kwargs)(*args)
        return ours, to_dense(ours), jax.value_and_grad(loss, **kwargs)(*args)

    return compiled(args)


def check_to_the_bit(loss: Any, *args: Any, tables: Any = "auto", **kwargs: Any) -> Any:
    """The gradient by rows, which made dense is that of JAX to the bit."""
    (_, grads), dense, expected = ours_and_jaxs(loss, *args, tables=tables, **kwargs)
    helpers.assert_bits_equal(dense, expected)
    return grads


CASES = [
    *((lookup, "shared table") for lookup in LOOKUPS),
    *((lookup, "two tables") for lookup in ("index", "take", "vmap of scalars")),
]


@functools.cache
def gradients_of_all_cases() -> Any:
    """As `ours_and_jaxs`, all in one program, for what takes time is to compile many."""

    @jax.jit
    def compiled(params: Any, ids: Any) -> Any:
        results = []
        for lookup, model in CASES:
            loss = functools.partial(MODELS[model], LOOKUPS[lookup])
            # To "auto" a leaf that is read by static indices alone is no table.
            tables = "a/table" if lookup == "static" else "auto"
            ours = value_and_grad(loss, tables=tables)(params, ids)
            results.append((ours, to_dense(ours), jax.value_and_grad(loss)(params, ids)))
        return results

    return dict(zip(CASES, compiled(make_params(), IDS), strict=True))


@pytest.mark.parametrize(("lookup", "model"), CASES)
def test_made_dense_it_is_the_gradient_of_jax_to_the_bit(lookup, model):
    (_, grads), dense, expected = gradients_of_all_cases()[lookup, model]
    assert is_rows(grads["a"]["table"])
    assert is_rows(grads["b"][0]) == (model == "two tables")
    assert grads["a"]["table"].unique
    helpers.assert_bits_equal(dense, expected)


@pytest.mark.parametrize("lookup", ["take", "vmap of scalars", "checkpoint"])
def test_it_needs_no_jit(lookup):
    def loss(params, ids):
        return shared_table(LOOKUPS[lookup], params, ids)

    expected = jax.grad(loss)(make_params(), IDS)
    helpers.assert_bits_equal(to_dense(grad(loss)(make_params(), IDS)), expected)


def test_ids_that_depend_on_another_read():
    def loss(params, ids):
        first = params["b"][0][ids]
        chosen = jnp.argmax(first, axis=-1).astype(jnp.int32)
        return jnp.sum(params["a"]["table"][chosen] * first * params["scale"])

    grads = check_to_the_bit(loss, make_params(), IDS)
    assert is_rows(grads["a"]["table"]) and is_rows(grads["b"][0])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3, 2)])
@pytest.mark.parametrize("width", [(), (2, 1)])
@pytest.mark.parametrize("lookup", ["index", "vmap"])
def test_ids_and_rows_of_any_rank(lookup, width, shape):
    if lookup == "vmap" and not shape:
        pytest.skip("nothing to map over")
    table = integers(4, ROWS, *width)
    ids = np.random.default_rng(5).integers(0, ROWS, shape).astype(np.int32)
    w = integers(6, *shape, *width)

    def loss(table, ids):
        return jnp.sum(LOOKUPS[lookup](table, ids) * w)

    # jnp reads nothing at all for no ids: "auto" cannot know that this is a table then.
    rows = check_to_the_bit(loss, table, ids, tables=lambda path, leaf: True)
    assert rows.indices.shape == (ids.size,)
    assert rows.values.shape == (ids.size, *width)


@pytest.mark.parametrize("dtype", [np.int8, np.uint32])
@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
def test_ids_outside_the_table_never_change_another_row(mode, dtype):
    big = np.iinfo(dtype).max
    ids = np.array([2, ROWS - 1, ROWS, ROWS + 3, big], dtype)
    if np.issubdtype(dtype, np.signedinteger):
        ids = np.concatenate([ids, np.array([-1, -ROWS, -ROWS - 1, -100], dtype)])
    if mode == "promise_in_bounds":
        # JAX's own result is undefined for such ids: what is promised here is no gradient.
        wrapped = np.where(ids.astype(np.int64) < 0, ids.astype(np.int64) + ROWS, ids)
        inside = (wrapped >= 0) & (wrapped < ROWS)
    w = weights(ids)

    def loss(table, w):
        return jnp.sum(table.at[ids].get(mode=mode) * w)

    if mode == "promise_in_bounds":
        rows = jax.jit(grad(loss))(TABLE, w)
        expected = np.zeros(TABLE.shape, np.float32)
        np.add.at(expected, wrapped[inside], np.asarray(w)[inside])
        helpers.assert_bits_equal(jax.jit(SparseRows.to_dense)(rows), expected)
    else:
        rows = check_to_the_bit(loss, TABLE, w)
    assert np.all((np.asarray(rows.indices) >= 0) & (np.asarray(rows.indices) <= ROWS))


def test_a_scalar_id_outside_the_table_is_clamped_as_its_read_is():
    for id_ in (ROWS + 5, -1, -ROWS - 5):
        i = jnp.int32(id_)
        expected = jax.grad(lambda table, i: jnp.sum(table[i]))(TABLE, i)
        rows = grad(lambda table, i: jnp.sum(table[i]))(TABLE, i)
        helpers.assert_bits_equal(rows.to_dense(), expected)


def test_ids_in_64_bits_do_not_wrap_into_the_table():
    with helpers.x64():
        ids = np.array([3, 2**32 + 2, -(2**32) + 1, 2**40], np.int64)

        def loss(table):
            numbers = jax.lax.GatherDimensionNumbers((1,), (0,), (0,))
            read = jax.lax.gather(
                table, ids[:, None], numbers, (1, WIDTH), mode="fill", fill_value=0.0
            )
            return jnp.sum(read)

        rows = jax.jit(grad(loss))(TABLE)
        assert rows.indices.tolist() == [3, ROWS, ROWS, ROWS]
        assert np.count_nonzero(rows.to_dense()) == WIDTH


@pytest.mark.parametrize("shape", [(1, 2), (1,), (4,), (4, 2, 2), (4, 0)])
def test_tables_of_any_shape(shape):
    table, ids = integers(4, *shape), jnp.array([0, -1, 0, shape[0], -shape[0] - 1])

    def loss(table):
        read = (table[ids], table[0], jnp.take(table, ids, axis=0))
        return sum(factor * jnp.nansum(x) for factor, x in zip((1.0, 2.0, 4.0), read, strict=True))

    check_to_the_bit(loss, table)


def test_a_table_without_rows_is_refused_as_jax_refuses_it():
    with pytest.raises(TypeError, match="out of range"):
        grad(table_loss)(jnp.ones((0, WIDTH)), IDS)


def test_all_ids_equal_are_one_row():
    rows = grad(lambda table: jnp.sum(table[jnp.full((7,), 2)]))(TABLE)
    assert sorted(rows.indices.tolist()) == [2] + [ROWS] * 6
    helpers.assert_bits_equal(rows.to_dense()[2], jnp.full((WIDTH,), 7.0))


def test_float_ids_are_refused_as_jax_refuses_them():
    ids = jnp.array([1.0, 2.0])
    with pytest.raises(TypeError) as expected:
        jax.grad(lambda table: jnp.sum(table[ids]))(TABLE)
    with pytest.raises(TypeError) as actual:
        grad(lambda table: jnp.sum(table[ids]))(TABLE)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize(
    "argument", [np.arange(3), {"a": TABLE, "b": jnp.arange(2)}, True, "text", {"a": [TABLE, 3]}]
)
def test_what_jax_does_not_differentiate_is_refused_in_its_words(argument):
    def loss(x):
        raise AssertionError("must not be reached")

    with pytest.raises(TypeError) as expected:
        jax.grad(loss)(argument)
    with pytest.raises(TypeError) as actual:
        grad(loss, tables=lambda path, leaf: True)(argument)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("result", [jnp.ones(2), {"a": 1.0}, jnp.int32(3), 1j])
def test_results_that_are_no_real_scalar_are_refused_in_the_words_of_jax(result, has_aux):
    def loss(table):
        table[0]
        return (result, None) if has_aux else result

    with pytest.raises(TypeError) as expected:
        jax.value_and_grad(loss, has_aux=has_aux)(TABLE)
    with pytest.raises(TypeError) as actual:
        value_and_grad(loss, has_aux=has_aux)(TABLE)
    assert str(actual.value) == str(expected.value)


def test_has_aux_without_a_pair_is_refused_in_the_words_of_jax():
    with pytest.raises(TypeError) as expected:
        jax.grad(lambda table: 1.0, has_aux=True)(TABLE)
    with pytest.raises(TypeError) as actual:
        grad(lambda table: 1.0, has_aux=True)(TABLE)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("argnums", [0, 1, -1, (0, 1), (1, 0), [2], (0, 1, 2), np.int64(1)])
def test_argnums_select_and_order_the_gradients(argnums):
    def loss(a, b, scale, *, factor):
        return jnp.sum(a["t"][IDS] * b[IDS] * scale) * factor

    args = ({"t": TABLE, "none": None}, OTHER, jnp.full((1, 1, WIDTH), 2.0))

    @jax.jit
    def all_three(args):
        both = value_and_grad(loss, argnums)(*args, factor=3.0)
        only = grad(loss, argnums)(*args, factor=3.0)
        return to_dense(both), to_dense(only), jax.value_and_grad(loss, argnums)(*args, factor=3.0)

    actual, only, expected = all_three(args)
    if isinstance(argnums, int | np.integer):
        assert not isinstance(actual[1], list | tuple)
    helpers.assert_bits_equal(actual, expected)
    helpers.assert_bits_equal(only, expected[1])


def test_an_argument_that_is_missing_is_refused_as_by_jax():
    with pytest.raises(TypeError, match="argnums"):
        grad(table_loss, argnums=2)(TABLE, IDS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: value_and_grad({"t": TABLE}, table_loss), r"function, got dict: write .*\(loss\)"),
        (lambda: grad(None), "function, got NoneType"),
        (lambda: value_and_grad(table_loss, {"t": TABLE}), r"(?s)argnums .*got \{'t'.*\(loss\)"),
        (lambda: value_and_grad(len, table_loss), "argnums .*got <function"),
    ],
)
def test_arguments_in_the_wrong_order_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_aux_comes_back_as_it_is():
    note = object()

    def loss(params, ids):
        read = params["table"][ids]
        aux = {"read": read, "table": params["table"], "note": note, "n": 3, "none": None}
        return jnp.sum(read * weights(ids)), aux

    (value, aux), grads = value_and_grad(loss, has_aux=True)({"table": TABLE}, IDS)
    assert is_rows(grads["table"])  # to return a table is no use of it
    assert aux["note"] is note
    assert aux["n"] == 3
    helpers.assert_bits_equal(aux["read"], TABLE[IDS])
    helpers.assert_bits_equal(aux["table"], TABLE)
    helpers.assert_bits_equal(value, table_loss(TABLE, IDS))
    grads, aux = grad(loss, has_aux=True)({"table": TABLE}, IDS)
    assert aux["note"] is note


def test_the_other_arguments_may_be_anything():
    def loss(table, ids, kind, flag=None):
        assert kind == "sum"
        assert flag is True
        return jnp.sum(table[ids])

    assert is_rows(grad(loss)(TABLE, IDS, "sum", flag=True))


def test_numpy_parameters():
    rows = grad(table_loss)(np.asarray(TABLE), IDS)
    helpers.assert_bits_equal(rows.to_dense(), jax.grad(table_loss)(np.asarray(TABLE), IDS))


def test_a_negative_zero_in_a_table_stays_one():
    table = jnp.full((2, 1), -0.0)
    _, read = grad(lambda t: (jnp.sum(t[jnp.array([1])]), t[jnp.array([1])]), has_aux=True)(table)
    assert np.signbit(read).all()


# ---- the choice of tables ----


def use(kind: str, table: Any) -> Any:
    """Ways to use a table as a whole, by the operation that does."""
    return {
        "dot_general": lambda: jnp.sum(jnp.ones((2, ROWS)) @ table),
        "mul": lambda: jnp.sum(table * table),
        "reduce_sum": lambda: jnp.sum(table.T),
        "slice": lambda: jnp.sum(table.T[0]),
        "cumsum": lambda: jnp.sum(jnp.cumsum(table, axis=0)),
        "sort": lambda: jnp.sum(jnp.sort(table, axis=0)),
        "while": lambda: jax.lax.while_loop(lambda c: c < 3.0, lambda c: c + table[1][0] * c, 1.0),
        "custom_vjp_call": lambda: jnp.sum(custom(table)),
        "scatter": lambda: jnp.sum(table.at[1].set(0.0)),
        "concatenate": lambda: jnp.sum(jnp.concatenate([table, table])),
    }[kind]()


@jax.custom_vjp
def custom(table):
    return table[0]


custom.defvjp(
    lambda table: (table[0], None),
    lambda _, ct: (jnp.full((ROWS, WIDTH), jnp.sum(ct)),),
)
USES = [
    "dot_general",
    "mul",
    "reduce_sum",
    "slice",
    "cumsum",
    "sort",
    "custom_vjp_call",
    "scatter",
    "concatenate",
]


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_a_table_with_another_use_is_left_dense_by_auto(wrap):
    def loss(params):
        return jnp.sum(
            jnp.stack(
                [
                    jnp.sum(pair["tied"][IDS] * pair["free"][IDS])
                    + wrap(lambda table, kind=kind: use(kind, table))(pair["tied"])
                    for kind, pair in params.items()
                ]
            )
        )

    grads = check_to_the_bit(loss, {kind: {"tied": TABLE, "free": OTHER} for kind in USES})
    assert [kind for kind, pair in grads.items() if is_rows(pair["tied"])] == []
    assert [kind for kind, pair in grads.items() if not is_rows(pair["free"])] == []


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
@pytest.mark.parametrize("kind", [*USES, "while"])
def test_a_selected_table_with_another_use_is_refused_by_path_and_operation(kind, wrap):
    def loss(params):
        other = wrap(lambda table: use(kind, table))(params["tied"])
        return jnp.sum(params["tied"][IDS] * params["free"][IDS]) + other

    with pytest.raises(ValueError, match=rf"'tied'.*'{kind}"):
        grad(loss, tables=["tied", "free"])({"tied": TABLE, "free": OTHER})


def test_a_leaf_that_is_never_used_stays_dense_zeros():
    grads = grad(lambda p: jnp.sum(p["t"][IDS]))({"t": TABLE, "unused": OTHER, "x": 1.0})
    assert is_rows(grads["t"])
    helpers.assert_bits_equal(grads["unused"], jnp.zeros_like(OTHER))


def test_a_selected_table_that_is_never_read_has_no_rows():
    rows = grad(lambda p: jnp.sum(p["t"][IDS]), tables="")({"t": TABLE, "unused": OTHER})["unused"]
    assert rows.values.shape == (0, WIDTH)
    assert rows.shape == OTHER.shape


def test_a_use_behind_stop_gradient_is_none():
    def loss(table):
        frozen = jax.lax.stop_gradient(table)
        return jnp.sum(table[IDS] * jnp.sum(frozen * frozen))

    assert is_rows(check_to_the_bit(loss, TABLE))


def test_patterns_and_predicates_select():
    def loss(params):
        return jnp.sum(params["a"]["table"][IDS] * params["b"][0][IDS] * params["scale"])

    # What a predicate returns counts as true or false.
    predicates = (lambda path, leaf: path == "a/table", lambda path, leaf: re.match("a", path))
    for tables in ("a/", ["a/t.*e$"], re.compile("^a"), *predicates):
        grads = jax.eval_shape(grad(loss, tables=tables), make_params())
        assert is_rows(grads["a"]["table"])
        assert not is_rows(grads["b"][0])
    check_to_the_bit(loss, make_params(), tables="a/")
    grads = check_to_the_bit(loss, make_params(), tables=lambda path, leaf: False)
    assert not any(is_rows(x) for x in jax.tree.leaves(grads, is_leaf=is_rows))


def test_a_pattern_that_matches_nothing_lists_the_paths():
    with pytest.raises(ValueError, match=r"'embed'.*'a/table', 'b/0', 'scale'"):
        grad(lambda p: 0.0, tables=["table", "embed"])(make_params())
    assert grad(lambda p: 1.0, tables="embed")({}) == {}


def test_tables_that_cannot_be_patterns_are_refused():
    with pytest.raises(TypeError, match="tables"):
        value_and_grad(table_loss, tables=3)
    with pytest.raises(ValueError, match="tables"):
        value_and_grad(table_loss, tables="(")


def test_a_scalar_is_no_table():
    with pytest.raises(ValueError, match="'scale'.*scalar"):
        grad(lambda p: p["scale"], tables="scale")({"scale": 1.0})


@pytest.mark.parametrize(
    ("loss", "tables", "message"),
    [
        (table_loss, "table", r"paths are '' \(the only leaf\)"),
        (lambda table, ids: jnp.sum(table), ".*", r"^'' \(the only leaf\) is selected by tables"),
    ],
)
def test_an_array_that_is_no_tree_is_named(loss, tables, message):
    with pytest.raises(ValueError, match=message):
        grad(loss, tables=tables)(TABLE, IDS)


# ---- transformations around and inside ----


def lazy_step(table, ids):
    tx = at.lazy_adam(0.1)
    updates, _ = tx.update(grad(table_loss)(table, ids), tx.init(table), table)
    return at.apply_updates(table, updates)


def deferred_step(table, ids):
    tx = at.deferred_adam(0.1, tables=".*")
    state = tx.init(table)
    updates, _ = tx.update(grad(table_loss, rows_from=state)(table, ids), state, table)
    return at.apply_updates(table, updates)


@pytest.mark.parametrize(
    "step",
    [lambda table, ids: to_dense(grad(table_loss)(table, ids)), lazy_step, deferred_step],
    ids=["gradient", "lazy", "deferred"],
)
def test_index_checks_report_wrong_ids_alone(step):
    """Padding, as of repeated rows, is no error; where JAX reports a wrong id it is the same."""

    theirs, ours = (
        jax.jit(checkify.checkify(fn, errors=checkify.index_checks))
        for fn in (jax.grad(table_loss), step)
    )
    for ids in (IDS, -1 - IDS):
        assert ours(TABLE, ids)[0].get() is None
    for wrong in (ROWS, -ROWS - 1):
        ids = IDS.copy()
        ids[0, 1] = wrong
        expected, actual = (fn(TABLE, ids)[0].get().splitlines()[0] for fn in (theirs, ours))
        assert f"out-of-bounds indexing for array of shape ({ROWS}, {WIDTH})" in expected
        assert actual == expected


@pytest.mark.every_case
@pytest.mark.parametrize(
    "read",
    [
        lambda a, b, ids: a[ids, :2],
        lambda a, b, ids: a[ids, ids % WIDTH],
        lambda a, b, ids: jnp.concatenate([a, b])[ids * 2],
        lambda a, b, ids: (2 * a)[ids],
    ],
    ids=["columns", "elements", "concatenated", "scaled"],
)
def test_index_checks_raise_no_false_alarm(read):
    def loss(tables, ids):
        return jnp.sum(read(*tables, ids) ** 2)

    gradient = grad(loss, tables=".*")
    checked = jax.jit(checkify.checkify(gradient, errors=checkify.index_checks))
    error, rows = checked((TABLE, OTHER), IDS)
    assert error.get() is None
    assert is_rows(rows[0])


def test_a_vmap_over_the_gradient_maps_tables_and_ids():
    tables, ids = integers(7, 4, ROWS, WIDTH), jnp.asarray(IDS).reshape(2, 3)[:, :2]
    ids = jnp.concatenate([ids, ids + 1]) % ROWS
    for table, axes in ((tables, 0), (TABLE, (None, 0))):
        expected = jax.jit(jax.vmap(jax.grad(table_loss), axes))(table, ids)
        rows = jax.jit(jax.vmap(grad(table_loss), axes))(table, ids)
        helpers.assert_bits_equal(jax.jit(jax.vmap(SparseRows.to_dense))(rows), expected)


def test_a_loss_mapped_over_examples():
    def example(params, ids, y):
        users, item = params["users"][ids], params["items"][ids[0]]
        return jnp.sum((jnp.sum(users, axis=0) * item - y) ** 2)

    def loss(params, ids, ys):
        return jnp.sum(jax.vmap(example, (None, 0, 0))(params, ids, ys))

    params = {"users": TABLE, "items": OTHER}
    ids, ys = jnp.asarray(IDS), integers(8, len(IDS), WIDTH)
    grads = check_to_the_bit(loss, params, ids, ys)
    assert is_rows(grads["users"]) and is_rows(grads["items"])


def test_inside_a_scan_over_steps():
    def step(table, ids):
        value, rows = value_and_grad(table_loss)(table, ids)
        return table + rows * -1.0, value

    def dense_step(table, ids):
        value, g = jax.value_and_grad(table_loss)(table, ids)
        return table - g, value

    batches = jnp.asarray(np.stack([IDS, (IDS + 1) % ROWS]))
    helpers.assert_bits_equal(
        jax.lax.scan(step, TABLE, batches), jax.lax.scan(dense_step, TABLE, batches)
    )


def test_tracers_that_the_loss_closes_over():
    @jax.jit
    def outer(table, ids, scale):
        return grad(lambda t: jnp.sum(t[ids] * scale))(table).to_dense()

    expected = jax.grad(lambda t: jnp.sum(t[IDS] * 3.0))(TABLE)
    helpers.assert_bits_equal(outer(TABLE, IDS, 3.0), expected)
    mapped = jax.vmap(lambda scale: outer(TABLE, IDS, scale))(jnp.array([3.0, 0.0]))
    helpers.assert_bits_equal(mapped[0], expected)


def test_a_gradient_of_the_gradient():
    def loss(table):
        return jnp.sum(table[IDS] ** 3)

    expected = jax.jacobian(jax.grad(loss))(TABLE)
    actual = jax.jacobian(lambda table: grad(loss)(table).to_dense())(TABLE)
    helpers.assert_bits_equal(actual, expected)


@pytest.mark.parametrize("lookup_inside", [True, False])
def test_a_checkpointed_block_stays_checkpointed(lookup_inside):
    @jax.checkpoint
    def block(params, read):
        x = params["t"][IDS] if lookup_inside else read
        return jnp.sin(jnp.sin(x * params["w"]))

    def loss(params):
        return jnp.sum(block(params, params["t"][IDS]))

    params = {"t": TABLE, "w": jnp.full((1, 1, WIDTH), 0.5)}
    assert is_rows(grad(loss)(params)["t"])
    text = str(jax.make_jaxpr(grad(loss))(params))
    assert text.count("prevent_cse=True") == str(jax.make_jaxpr(jax.grad(loss))(params)).count(
        "prevent_cse=True"
    )
    _, dense, expected = ours_and_jaxs(loss, params)
    helpers.assert_close(dense, expected)


def test_ids_that_change_compile_nothing_anew():
    traces = []

    @jax.jit
    def step(table, ids):
        traces.append(ids.shape)
        return value_and_grad(table_loss)(table, ids)

    for shift in range(3):
        step(TABLE, (IDS + shift) % ROWS)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "lookup", ["take", pytest.param("vmap of scalars", marks=pytest.mark.slow), "cast"]
)
def test_memory_and_program_do_not_know_the_number_of_rows(lookup):
    def loss(params, ids):
        user, item = (LOOKUPS[lookup](params[name], ids) for name in ("users", "items"))
        return jnp.sum(user * item + LOOKUPS[lookup](params["users"], ids + 1) ** 2)

    sizes = []
    for rows in (5003, 50021):
        table = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((8, 4), jnp.int32)
        step = jax.jit(value_and_grad(loss)).lower({"users": table, "items": table}, ids).compile()
        analysis: Any = step.memory_analysis()
        sizes.append(analysis.temp_size_in_bytes)
        made = re.findall(rf"= f32\[{rows},16\]\S* ([\w-]+)\(", step.as_text())
        # A cast and back may be fused into the read itself: it is never stored then.
        assert set(made) <= {"parameter"} | ({"convert"} if lookup == "cast" else set())
    assert sizes[0] == sizes[1]


# ---- dtypes ----


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_the_row_gradient_has_the_dtype_of_the_table(dtype):
    table = TABLE.astype(dtype)

    def loss(table):
        return jnp.sum(jnp.real(table[IDS] * weights(IDS).astype(dtype))).astype(jnp.float32)

    assert check_to_the_bit(loss, table).dtype == dtype


@pytest.mark.parametrize("table_dtype", [jnp.float32, jnp.bfloat16])
def test_in_bfloat16_it_is_at_least_as_close_to_float64_as_the_dense_gradient(table_dtype):
    ids = np.random.default_rng(9).integers(0, ROWS, 3000).astype(np.int32)
    w = jnp.asarray(helpers.normal(10, 3000, WIDTH)).astype(jnp.bfloat16)

    def loss(table):
        return jnp.sum((table.astype(jnp.bfloat16)[ids] * w).astype(jnp.float32))

    exact = np.zeros((ROWS, WIDTH))
    np.add.at(exact, ids, helpers.as_numpy(w))
    table = TABLE.astype(table_dtype)
    (_, rows), (_, by_rows), (_, dense) = ours_and_jaxs(loss, table, tables="")
    assert rows.dtype == table_dtype
    error = np.abs(helpers.as_numpy(by_rows) - exact)
    assert error.max() <= np.abs(helpers.as_numpy(dense) - exact).max()
    # One rounding, to the table's dtype.
    one = 2.0**-8 if table_dtype == jnp.bfloat16 else 2.0**-18
    assert np.all(error <= one * np.abs(exact) + 1e-3 * one)


def test_a_real_table_made_complex():
    def loss(table):
        return jnp.sum(jnp.abs(table.astype(jnp.complex64)[IDS] * (2.0 + 1.0j)) ** 2)

    (_, rows), by_rows, expected = ours_and_jaxs(loss, TABLE)
    assert rows.dtype == jnp.float32
    helpers.assert_close(by_rows, expected)


# ---- models ----


@pytest.mark.parametrize("dtype", [pytest.param(None, marks=pytest.mark.slow), jnp.bfloat16])
def test_flax_linen(relaxed_promotion, dtype):
    nn = pytest.importorskip("flax.linen")

    class Towers(nn.Module):
        @nn.compact
        def __call__(self, users, items):
            embed = nn.Embed(ROWS, 4, dtype=dtype, name="shared")
            x = jnp.concatenate([embed(users), nn.remat(nn.Embed)(ROWS, 4, name="own")(items)], -1)
            return nn.Dense(1)(nn.relu(nn.Dense(8)(x)) + jnp.mean(embed(items)))

    model = Towers()
    params = model.init(jax.random.key(0), IDS, IDS)

    def loss(params, ids):
        return jnp.mean(model.apply(params, ids, ids) ** 2)

    (value, grads), (_, dense), (expected_value, expected) = ours_and_jaxs(loss, params, IDS)
    tables = grads["params"]
    assert is_rows(tables["shared"]["embedding"]) and is_rows(tables["own"]["embedding"])
    assert tables["shared"]["embedding"].dtype == jnp.float32
    assert not is_rows(tables["Dense_0"]["kernel"])
    helpers.assert_bits_equal(value, expected_value)
    rtol, atol = (2e-6, 1e-7) if dtype is None else (1e-2, 1e-3)
    helpers.assert_close(dense, expected, rtol=rtol, atol=atol)


def test_flax_nnx(relaxed_promotion):
    nnx = pytest.importorskip("flax.nnx")

    class Towers(nnx.Module):
        def __init__(self, rngs):
            self.users = nnx.Embed(ROWS, 4, rngs=rngs)
            self.items = nnx.Embed(ROWS, 4, rngs=rngs)
            self.head = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, ids):
            return self.head(jnp.concatenate([self.users(ids), self.items(ids)], axis=-1))

    graph, params = nnx.split(Towers(nnx.Rngs(0)))

    def loss(params, ids):
        return jnp.mean(nnx.merge(graph, params)(ids) ** 2)

    for tables in ("auto", "embedding$", ["users/embedding", "items"]):
        grads = jax.eval_shape(grad(loss, tables=tables), params, IDS)
        leaves = jax.tree.leaves(grads, is_leaf=is_rows)
        assert [is_rows(x) for x in leaves] == [x.shape == (ROWS, 4) for x in leaves]
    _, dense, expected = ours_and_jaxs(loss, params, IDS)
    helpers.assert_close(jax.tree.leaves(dense), jax.tree.leaves(expected))
