"""Row gradients: what they stand for, and that nothing corrupts them in silence."""

import contextlib
import inspect
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, in_tiers, normal
from jax import export
from jax.experimental import checkify

import adam_transforms as at
from adam_transforms._core import sparse_rows, state_layout
from adam_transforms._embeddings.deferred.missed_updates import UpdateHistory
from adam_transforms._xla import duplicates

V, D = 7, 3


def rows_of(indices: Any, dtype: Any = np.float32, seed: int = 0) -> at.SparseRows:
    """Rows of small whole numbers, whose sums are exact in every dtype."""
    indices = np.asarray(indices, np.int32)
    values = np.random.default_rng(seed).integers(-4, 5, (indices.size, D))
    return at.SparseRows(indices, values.astype(dtype), V)


def dense_of(rows: at.SparseRows) -> np.ndarray:
    """The definition, row by row."""
    dense = np.zeros(rows.shape, np.float64)
    for index, value in zip(np.asarray(rows.indices), np.asarray(rows.values), strict=True):
        if 0 <= index < rows.num_rows:
            dense[index] += value
    return dense


INDICES = {
    "distinct": [3, 0, 6],
    "duplicates": [2, 2, 5, 2, 0, 5],
    "all equal": [4] * 9,
    "padding": [1, V, 3, V, 1],
    "all padding": [V, V],
    "outside": [-1, 2, V + 3, -V - 1, 2**31 - 1],
    "empty": [],
}
every_kind = pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES.keys())


@every_kind
def test_to_dense_and_the_sum_with_a_table_are_the_definition(indices: list[int]) -> None:
    rows, table = rows_of(indices), normal(1, V, D)
    np.testing.assert_array_equal(rows.to_dense(), dense_of(rows))
    for total in (jnp.asarray(table) + rows, table + rows, rows + table):
        np.testing.assert_allclose(total, table + dense_of(rows), rtol=1e-6)
    untouched = sorted(set(range(V)) - set(indices))
    assert_bits_equal((table + rows)[np.array(untouched, int)], table[untouched])


@pytest.fixture(params=["in place", "packed"])
def packed(request: Any, monkeypatch: Any) -> bool:
    """Whether rows are packed, as many are."""
    if packed := request.param == "packed":
        monkeypatch.setattr(sparse_rows, "PACKED_BYTES", 0)
    return packed


@every_kind
def test_sum_duplicates_names_each_row_once_and_keeps_the_gradient(
    indices: list[int], packed: bool
) -> None:
    summed = jax.jit(lambda rows: rows.sum_duplicates())(rows_of(indices))
    assert summed.unique
    assert summed.indices.shape == (len(indices),)
    real = list(dict.fromkeys(i for i in indices if 0 <= i < V))
    assert [i for i in summed.indices.tolist() if i != V] == real
    if packed:
        assert summed.indices.tolist() == real + [V] * (len(indices) - len(real))
    np.testing.assert_array_equal(summed.to_dense(), dense_of(rows_of(indices)))
    assert_bits_equal(summed.sum_duplicates(), summed)
    assert not np.asarray(summed.values)[np.asarray(summed.indices) == V].any()


@every_kind
def test_sum_duplicates_names_a_run_of_rows_besides(indices: list[int], packed: bool) -> None:
    length = 3
    named = [i for i in indices if 0 <= i < V]

    @jax.jit
    def summed_with_run(rows: at.SparseRows, start: int) -> at.SparseRows:
        return sparse_rows.sum_with_run(
            rows, start, start + length, length + 2, 0 if packed else 2**40
        )

    for rows in (rows_of(indices), rows_of(indices).sum_duplicates()):
        for start in (0, 2, V - 1, V):
            summed = summed_with_run(rows, start)
            assert summed.unique
            found = summed.indices.tolist()
            assert len(found) == len(indices) + length + 2
            real = list(dict.fromkeys([*named, *range(start, min(start + length, V))]))
            assert [i for i in found if i != V] == real
            assert not packed or found == real + [V] * (len(found) - len(real))
            np.testing.assert_array_equal(summed.to_dense(), dense_of(rows))
            assert not np.asarray(summed.values)[np.array(found) == V].any()


def test_sum_duplicates_has_zeros_at_padding_whatever_a_user_left_there() -> None:
    rows = at.SparseRows(jnp.array([1, V, -1]), jnp.full((3, D), jnp.nan), V, unique=True)
    rows = rows.with_values(rows.values.at[0].set(2.0)).sum_duplicates()
    assert rows.values[:, 0].tolist() == [2.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("method", "num_rows", "n"),
    in_tiers(
        [
            *itertools.product(
                ("by_hashing", "by_sorting", "first_positions"),
                (1, 50, 10**6, 2**31 - 1),
                (0, 1, 2, 1000, 5000),
            ),
            *itertools.product(["by_looking_up"], (1, 50), (0, 1, 2, 1000, 5000)),
        ],
        lambda method, num_rows, n: num_rows == 2**31 - 1 or (n == 1000 and num_rows < 10**6),
    ),
)
def test_first_positions_are_those_that_numpy_finds(n: int, num_rows: int, method: str) -> None:
    generator = np.random.default_rng(n)
    indices = generator.integers(0, num_rows + 1, n)
    # A stride, as of fields of a record.
    indices[: n // 2] = indices[:1].sum() + 8 * np.arange(n // 2)
    indices = (indices % (num_rows + 1)).astype(np.int32)
    tables = np.stack([indices, (indices // 2)[::-1]])
    sizes: Any = [num_rows, num_rows // 2 + 1]
    buckets = ()
    if method != "first_positions":
        sizes = jnp.array(sizes, jnp.int32)[:, None]
    if method == "by_looking_up":
        buckets = (jnp.full((2, num_rows), n, jnp.int32),)
    found = getattr(duplicates, method)(jnp.asarray(tables), sizes, *buckets)
    for indices, positions, size in zip(tables, found, np.ravel(sizes), strict=True):
        _, first, inverse = np.unique(indices, return_index=True, return_inverse=True)
        np.testing.assert_array_equal(positions, np.where(indices < size, first[inverse], n))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_low_precision_rows_are_rounded_once(dtype: str) -> None:
    """256 + 1 + 1 is 258; in bfloat16, one at a time, it stays 256."""
    rows = at.SparseRows(np.zeros(3, np.int32), jnp.array([[256.0], [1.0], [1.0]], dtype), 1)
    assert float(rows.to_dense()[0, 0]) == 258.0
    assert float(rows.sum_duplicates().values[0, 0]) == 258.0
    table = jnp.array([[256.0]], dtype)
    ones = at.SparseRows(np.zeros(2, np.int32), jnp.ones((2, 1), dtype), 1)
    assert (table + ones).dtype == dtype
    assert float((table + ones)[0, 0]) == 258.0


def test_scaling_and_adding_rows() -> None:
    rows, others = rows_of([1, 1, 3]), rows_of([3, V], seed=1)
    np.testing.assert_array_equal((2.0 * rows).to_dense(), 2 * dense_of(rows))
    np.testing.assert_array_equal((-rows * jnp.float32(0.5)).to_dense(), -0.5 * dense_of(rows))
    np.testing.assert_array_equal((rows + others).to_dense(), dense_of(rows) + dense_of(others))
    np.testing.assert_array_equal((rows / 4).to_dense(), dense_of(rows) / 4)
    np.testing.assert_array_equal((rows - others).to_dense(), dense_of(rows) - dense_of(others))
    table = jnp.ones((V, D))
    for minuend in (table, np.asarray(table)):
        np.testing.assert_array_equal(minuend - rows, 1 - dense_of(rows))
    np.testing.assert_array_equal(rows - table, dense_of(rows) - 1)
    for scale in (lambda x: rows * x, lambda x: rows / x):
        with pytest.raises(ValueError, match="scalar"):
            scale(np.ones(3, np.float32))


def test_rows_are_cast_as_arrays_are() -> None:
    rows = rows_of([1, 1, 3], "complex64")
    assert rows.ndim == 2
    rows = rows.with_values(rows.values * (1 + 2j))
    assert_bits_equal(rows.conj().values, rows.values.conj())
    assert_bits_equal(rows.real.values, rows.values.real)
    half = rows.real.astype("bfloat16")
    assert (half.dtype, half.num_rows, half.indices.tolist()) == (jnp.bfloat16, V, [1, 1, 3])
    with pytest.raises(TypeError, match="floating.*int32"):
        rows.real.astype(np.int32)


def test_rows_are_a_pytree_that_keeps_its_static_parts() -> None:
    rows = rows_of([5, 2]).sum_duplicates()
    leaves, treedef = jax.tree.flatten(rows)
    again = treedef.unflatten(leaves)
    assert (again.num_rows, again.unique, again.shape) == (V, True, (V, D))
    through = jax.jit(lambda r: r)(rows)
    assert_bits_equal(through.indices, rows.indices)
    paths = [at.path_str(path) for path, _ in jax.tree_util.tree_flatten_with_path({"t": rows})[0]]
    assert paths == ["t/values", "t/indices"]
    assert repr(rows) == "SparseRows(float32[7,3], 2 of 7 distinct rows)"


# Of stacked tables, and of one table that has all their rows.
STACK = (2, 4)


def stacked(rows: at.SparseRows) -> at.SparseRows:
    return at.SparseRows(rows.indices, rows.values, rows.num_rows, leading_shape=STACK)


def rows_of_eight(indices: Any = (3, 0, 7, 3, 8, -1), seed: int = 0) -> at.SparseRows:
    return at.SparseRows(np.array(indices, np.int32), normal(seed, len(indices), D), 8)


USES_OF_ROWS: dict[str, Callable[[at.SparseRows, jax.Array], Any]] = {
    "to_dense": lambda rows, table: rows.to_dense(),
    "table + rows": lambda rows, table: table + rows,
    "rounded": lambda rows, table: rows.add_to(table.astype("bfloat16"), jax.random.key(0)),
    "rows - table": lambda rows, table: rows - table,
    "rows + rows": lambda rows, table: (rows + rows).to_dense(),
    "scaled": lambda rows, table: (-rows * 0.5).astype("bfloat16").to_dense(),
    "sum_duplicates": lambda rows, table: rows.sum_duplicates().to_dense(),
    "with a run": lambda rows, table: sparse_rows.sum_with_run(
        rows, jnp.int32(5), jnp.int32(14), 9, 0
    ),
    "gather": lambda rows, table: rows.gather(table),
    "gather of a row slot": lambda rows, table: rows.gather(table[..., 0]),
    "scatter": lambda rows, table: rows.sum_duplicates().scatter(table, rows.values),
    "a batch": lambda rows, table: jax.vmap(lambda x: table + (rows * x))(jnp.arange(2.0)),
    "parts": lambda rows, table: sparse_rows.from_parts(rows, sparse_rows.to_parts(rows)),
}


def test_rows_of_stacked_tables_are_those_of_one_table() -> None:
    rows, table = rows_of_eight(), jnp.asarray(normal(1, 8, D))
    assert stacked(rows).shape == (*STACK, D)
    for use in USES_OF_ROWS.values():
        found, expected = use(stacked(rows), table.reshape(*STACK, D)), use(rows, table)
        if isinstance(found, at.SparseRows):
            assert found.leading_shape == STACK
        else:
            found = found.reshape(expected.shape)
        assert_bits_equal(jax.tree.leaves(found), jax.tree.leaves(expected))


def test_the_leading_axes_of_a_stack_go_where_the_rows_go() -> None:
    rows = stacked(rows_of_eight())
    assert repr(rows) == "SparseRows(float32[2,4,3], 6 of 2x4 rows)"
    assert "num_rows=2x4" in repr(jax.tree.structure(rows).unflatten([None, None]))
    batch = jax.vmap(lambda x: rows * x)(jnp.arange(5.0))
    assert repr(batch) == "SparseRows(float32[5,2,4,3], 6 of 2x4 rows, batched)"
    again = pickle.loads(pickle.dumps(rows))
    for copy in (again, jax.jit(lambda rows: rows)(rows), rows.with_values(rows.values)):
        assert (copy.shape, copy.leading_shape) == ((2, 4, D), STACK)
    later = {"leading_shape", "synchronized"}
    without = {name: x for name, x in vars(rows_of([5, 2])).items() if name not in later}
    old = object.__new__(at.SparseRows)
    old.__setstate__(without)  # as it was pickled before there were stacks and marks
    assert old.shape == (V, D) and not old.synchronized
    marked = (rows + rows.as_synchronized(), rows.as_synchronized().sum_duplicates())
    assert [x.synchronized for x in marked] == [False, True]
    assert {x.leading_shape for x in marked} == {STACK}


def test_stacks_without_rows_take_padding() -> None:
    for leading in ((0, 4), (2, 0)):
        rows = at.SparseRows(np.zeros(2, int), np.ones((2, D), "f"), 0, leading_shape=leading)
        assert rows.to_dense().shape == (*leading, D)
        assert not rows.gather(jnp.ones((*leading, D))).any()


@pytest.mark.parametrize(
    ("leading", "error", "message"),
    [
        ((2, 3), ValueError, r"leading_shape.*8 rows.*\[2, 3\]"),
        ((-2, -4), ValueError, r"leading_shape.*8 rows.*\[-2, -4\]"),
        ((), ValueError, "leading_shape.*8 rows"),
        (8, TypeError, "leading_shape must be integers, got 8"),
        ((2.0, 4.0), TypeError, "leading_shape must be integers"),
    ],
)
def test_malformed_leading_axes_are_refused(leading: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        at.SparseRows(np.zeros(1, int), np.ones((1, D), "f"), 8, leading_shape=leading)


def test_rows_along_one_axis_and_along_two_do_not_add() -> None:
    """Though they are of tables of one shape."""
    whole = at.SparseRows(np.zeros(1, int), np.ones((1, 4, D), "f"), 2)
    with pytest.raises(ValueError, match="of 2 rows.*of 2x4 rows.*do not add"):
        _ = whole + stacked(rows_of_eight())


def test_a_batch_of_row_gradients_shows_that_it_is_one() -> None:
    rows = [rows_of([1, 1, 3], seed=seed) for seed in (0, 1)]
    batch = jax.vmap(lambda g: at.SparseRows(jnp.array([1, 1, 3]), g, V))(
        jnp.stack([r.values for r in rows])
    )
    assert batch.shape == (2, V, D)
    assert batch.dtype == np.float32
    assert repr(batch) == "SparseRows(float32[2,7,3], 3 of 7 rows, batched)"
    dense = jax.vmap(at.SparseRows.to_dense)(batch)
    np.testing.assert_array_equal(dense, [dense_of(r) for r in rows])
    table = jnp.ones((V, D))
    added = jax.vmap(lambda table, r: table + r, (None, 0))(table, batch)
    np.testing.assert_array_equal(added, dense + 1)
    assert_bits_equal(jax.vmap(lambda r: r + r)(batch).shape, (2, V, D))


REFUSED_OF_A_BATCH = {
    "to_dense": lambda rows: rows.to_dense(),
    "sum_duplicates": lambda rows: rows.sum_duplicates(),
    "is_valid": lambda rows: rows.is_valid,
    "masked_values": lambda rows: rows.masked_values(),
    "table + rows": lambda rows: jnp.zeros(rows.shape) + rows,
    "rows + table": lambda rows: rows + jnp.zeros(rows.shape),
    "rows + rows": lambda rows: rows + rows,
    "scaled": lambda rows: rows * 2.0,
    "divided": lambda rows: rows / 2.0,
    "global_norm": lambda rows: at.global_norm(rows),
    "at.to_dense": lambda rows: at.to_dense({"t": rows}),
    "lazy": lambda rows: at.lazy(at.adam(0.1)).update(
        {"t": rows},
        at.lazy(at.adam(0.1)).init({"t": jnp.ones((V, D))}),
        {"t": jnp.ones((V, D))},
    ),
}


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("operation", REFUSED_OF_A_BATCH)
def test_what_is_done_with_one_gradient_is_refused_of_a_batch(operation: str, unique: bool) -> None:
    rows = at.SparseRows(jnp.array([1, 3]), jnp.ones((2, D)), V, unique=unique)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), rows)
    with pytest.raises(ValueError, match=r"\(n,\).*\[2, 2\]"):
        REFUSED_OF_A_BATCH[operation](batch)


@pytest.mark.parametrize("leaf", [None, 0, "a", object(), (), jax.sharding.PartitionSpec("x")])
def test_rows_of_anything_can_be_shown(leaf: Any) -> None:
    """As in the trees that JAX makes of axes, shardings and shapes."""
    rows = rows_of([1, 3])
    treedef = jax.tree.structure(rows)
    assert repr(leaf) in repr(treedef.unflatten([leaf, leaf]))
    values, keys = jax.tree.leaves(rows)
    assert repr(leaf) in repr(treedef.unflatten([values, leaf]))
    assert repr(leaf) in repr(treedef.unflatten([leaf, keys]))


def test_rows_of_shapes_and_of_one_row_have_theirs() -> None:
    shapes = jax.eval_shape(lambda: rows_of([1, 3]))
    assert shapes.shape == (V, D)
    assert repr(shapes) == "SparseRows(float32[7,3], 2 of 7 rows)"

    def one(row: Any) -> Any:
        assert row.shape == (V, D)
        assert repr(row).startswith("SparseRows(")
        return row.values

    jax.vmap(one)(rows_of([1, 3]))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("x64", [False, True])
def test_indices_of_any_width_do_not_wrap_into_the_table(dtype: str, x64: bool) -> None:
    """2^32 + 1 is not row 1."""
    limits = np.iinfo(dtype)
    outside = [limits.max, limits.min or limits.max, V, 2**32 + 1, 2**63 + 2, 1 - 2**32]
    outside = [i for i in outside if limits.min <= i <= limits.max]
    indices = np.array([3, *outside], dtype)
    values = np.ones((indices.size, D), np.float32)
    with helpers.x64() if x64 else contextlib.nullcontext():
        made = [at.SparseRows(indices, values, V)]
        if x64 or limits.bits < 64:  # else JAX has cut them itself
            made.append(at.SparseRows(jnp.asarray(indices), values, V))
        for rows in made:
            assert rows.indices.dtype == np.int32
            assert np.flatnonzero(rows.to_dense().any(axis=1)).tolist() == [3]


@pytest.mark.parametrize("table", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("values", ["float16", "bfloat16", "float32", "complex64"])
def test_the_sum_has_the_dtype_of_the_table_or_is_refused(table: str, values: str) -> None:
    p, rows = jnp.ones((V, D), table), rows_of([1, 1, 3], values)
    if values == "complex64" != table:
        with pytest.raises(TypeError, match=f"{table}.*{values}"):
            _ = p + rows
        return
    for total in (p + rows, optax.apply_updates(p, rows), at.apply_updates(p, rows)):
        assert_bits_equal(total, (1 + dense_of(rows_of([1, 1, 3]))).astype(table))


@pytest.mark.parametrize("values", ["float32", "complex64"])
def test_a_table_of_integers_takes_no_rows(values: str) -> None:
    with pytest.raises(TypeError, match=f"int32.*{values}"):
        _ = jnp.ones((V, D), jnp.int32) + rows_of([1], values)


def test_a_table_without_rows_takes_padding() -> None:
    rows = at.SparseRows(np.array([0, -1], np.int32), np.ones((2, D), np.float32), 0)
    assert rows.to_dense().shape == (0, D)
    assert (jnp.ones((0, D)) + rows.sum_duplicates()).shape == (0, D)


def test_negative_padding_replaces_no_row() -> None:
    rows = at.SparseRows(np.array([-1, 2]), np.ones((2, D), np.float32), V, unique=True)
    table = jnp.asarray(normal(0, V, D))
    replaced = rows.scatter(table, jnp.zeros((2, D)))
    assert_bits_equal(replaced, table.at[2].set(0.0))
    assert_bits_equal(rows.gather(table), jnp.stack([jnp.zeros(D), table[2]]))


def test_global_norm_is_that_of_the_dense_array() -> None:
    tree = {"t": rows_of([1, 1, V, 4]), "w": np.array([2.0], np.float32)}
    expected = np.sqrt((dense_of(tree["t"]) ** 2).sum() + 4.0)
    np.testing.assert_allclose(at.global_norm(tree), expected, rtol=1e-6)


def test_apply_updates_of_optax_and_ours_take_rows() -> None:
    params = {"t": normal(0, V, D), "w": normal(1, 2)}
    updates = {"t": rows_of([0, 0, 5]), "w": normal(2, 2)}
    expected = {"t": params["t"] + dense_of(updates["t"]), "w": params["w"] + updates["w"]}
    for apply in (optax.apply_updates, at.apply_updates):
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6),
            jax.jit(apply)(params, updates),
            expected,
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], np.ones((1, D)), V), TypeError, "integers"),
        (([0, 1], np.ones((1, D)), V), ValueError, "shapes"),
        (([[0]], np.ones((1, 1, D)), V), ValueError, "shapes"),
        (([0], np.ones((1, D)), 2.5), TypeError, "integer"),
        (([0], np.ones((1, D)), -1), ValueError, "num_rows.*-1"),
        (([0], np.ones((1, D)), 2**31), ValueError, "num_rows.*2147483648"),
        (([0], np.ones((1, D), np.int32), V), TypeError, "values.*int32"),
        (([True], np.ones((1, D)), V), TypeError, "integers.*bool"),
    ],
)
def test_malformed_rows_are_refused(arguments: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        at.SparseRows(*(np.asarray(a) if isinstance(a, list) else a for a in arguments))


def test_rows_of_another_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[7, 3\].*\[8, 3\]"):
        _ = jnp.zeros((V + 1, D)) + rows_of([0])


# What Optax's factories are called with, by the name of the parameter.
ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(
        ("learning_rate", "step_size", "weight_decay", "clipping", "eta", "gamma"), 0.1
    ),
    **dict.fromkeys(("noise_scale", "noise_multiplier", "slow_step_size"), 0.1),
    **dict.fromkeys(("max_delta", "max_norm", "threshold", "l2_norm_clip"), 1.0),
    **dict.fromkeys(("every_k_schedule", "k", "sync_period", "max_consecutive_errors"), 2),
    **dict.fromkeys(("max_backtracking_steps", "max_linesearch_steps"), 2),
    **dict.fromkeys(("should_transform_fn", "should_update_fn"), lambda step: True),
    **dict.fromkeys(("inner", "opt", "optimizer", "base_optimizer", "tx"), optax.sgd(0.1)),
    **dict.fromkeys(("fast_optimizer", "adv_optimizer"), optax.sgd(0.1)),
    **dict.fromkeys(("mask", "update_mask"), {"t": True}),
    "decay": 0.9,
    "freeze_mask": {"t": False},
    "key": 0,
    "param_labels": {"t": "group"},
    "step_size_fn": lambda count: 0.1,
    "transforms": {"group": optax.scale(-1.0)},
}


def factories_of_optax() -> Iterator[tuple[str, Any]]:
    """All that are made of `ARGUMENTS`."""
    for module in (optax, optax.contrib):
        for name, factory in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(factory):
                continue
            signature = inspect.signature(factory)
            parameters = [p for p in signature.parameters.values() if p.kind != p.VAR_POSITIONAL]
            known = {p.name: ARGUMENTS[p.name] for p in parameters if p.name in ARGUMENTS}
            needed = {
                p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD
            }
            if "GradientTransformation" in str(signature.return_annotation) and needed <= {*known}:
                yield name, lambda factory=factory, known=known: factory(**known)


THEIRS = {
    **dict(factories_of_optax()),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "chain": lambda: optax.chain(optax.scale(-1.0)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    "scheduled learning rate": lambda: optax.scale_by_learning_rate(lambda count: 0.1),
}
OURS = {
    "adam": lambda: at.adam(0.1),
    "scale_by_adam": lambda: at.scale_by_adam(),
    "scale_by_amsgrad": lambda: at.scale_by_amsgrad(),
    "clip_by_value": lambda: at.clip_by_value(0.1),
    "clip_by_norm": lambda: at.clip_by_norm(0.1),
    "clip_by_global_norm": lambda: at.clip_by_global_norm(0.1),
    "scale_by_learning_rate": lambda: at.scale_by_learning_rate(lambda count: 0.1),
    "scale_by_path_learning_rate": lambda: at.scale_by_path_learning_rate([("t", 0.1)], 0.1),
    "by_path": lambda: at.by_path([("t", at.adam(0.1))], at.adam(0.1)),
    "skip_nonfinite": lambda: at.skip_nonfinite(at.adam(0.1)),
    "dynamic_loss_scale": lambda: at.dynamic_loss_scale(at.adam(0.1)),
    "static_loss_scale": lambda: at.static_loss_scale(at.adam(0.1), 2.0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", THEIRS)
def test_what_knows_no_rows_fails_when_traced_or_is_right(
    name: str, relaxed_promotion: None
) -> None:
    """And never scales, clips or sums the indices in silence."""
    params: Any = {"t": jnp.ones((V, D))}
    params = optax.LookaheadParams(params, params) if name == "lookahead" else params
    rows = {"t": rows_of([1, 1, 3])}
    tx = optax.with_extra_args_support(THEIRS[name]())

    def update(g: Any) -> Any:
        known = {"value": jnp.float32(1), "grad": g, "value_fn": lambda p: jnp.sum(p["t"])}
        return tx.update(g, tx.init(params), params, **known)[0]

    try:
        jax.eval_shape(update, at.to_dense(rows))
    except (TypeError, ValueError):
        pytest.skip("needs more to be made or called")
    try:
        updates = jax.eval_shape(update, rows)
    except Exception:
        return
    updates, expected = update(rows), update(at.to_dense(rows))
    np.testing.assert_allclose(at.to_dense(updates)["t"], expected["t"], rtol=1e-6)


def test_the_table_of_their_pieces_is_not_empty() -> None:
    assert len(THEIRS) > 80
    assert {"scale", "clip", "ema", "trace", "add_noise", "apply_every", "lookahead"} <= {*THEIRS}


@pytest.mark.parametrize("name", OURS)
def test_our_error_says_what_to_do(name: str) -> None:
    params = {"t": jnp.ones((V, D))}
    tx = OURS[name]()
    with pytest.raises(TypeError, match="'t'.*lazy.*to_dense"):
        tx.update({"t": rows_of([1])}, tx.init(params), params)


def test_the_error_of_optax_names_the_class(relaxed_promotion: None) -> None:
    params, tx = {"t": jnp.ones((V, D))}, optax.adam(0.1)
    with pytest.raises(ValueError, match="SparseRows"):
        tx.update({"t": rows_of([1])}, tx.init(params), params)


# What code that knows no rows does with them, and what names them in its error.
FOREIGN: dict[str, tuple[Callable[[at.SparseRows], Any], str]] = {
    "arithmetic": (lambda rows: jax.tree.map(lambda g: g / 4, rows), "indices.*lazy"),
    "addition": (lambda rows: jax.tree.map(jnp.add, rows, rows), "indices.*lazy"),
    "a cast": (lambda rows: jax.tree.map(lambda x: jnp.astype(x, "bfloat16"), rows), "indices"),
    "optax.clip": (lambda rows: optax.clip(1.0).update(rows, optax.EmptyState()), "indices.*lazy"),
    "pmean": (
        lambda rows: jax.vmap(lambda r, _: jax.lax.pmean(r, "i"), (None, 0), axis_name="i")(
            rows, jnp.ones(2)
        ),
        "indices.*lazy",
    ),
    "MultiSteps": (
        lambda rows: optax.MultiSteps(at.lazy_adam(tables=()), 2).update(
            rows,
            optax.MultiSteps(at.lazy_adam(tables=()), 2).init(jnp.ones((V, D))),
            jnp.ones((V, D)),
        ),
        "accumulate",
    ),
    "eqx.apply_updates": (
        lambda rows: pytest.importorskip("equinox").apply_updates(jnp.ones((V, D)), rows),
        "apply_updates",
    ),
    "masks by a function": (
        lambda rows: optax.masked(
            at.lazy_adam(), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
        ).update(rows, optax.EmptyState(), jnp.ones((V, D))),
        "masks and labels as trees",
    ),
    "other leaves": (lambda rows: jax.tree.map(jnp.isfinite, rows).to_dense(), "bool.*lazy"),
    "a leaf that is gone": (
        lambda rows: jax.tree.structure(rows).unflatten([rows.values, None]) * 2,
        "NoneType.*lazy",
    ),
}


@pytest.mark.every_case
@pytest.mark.parametrize("name", FOREIGN)
def test_the_error_of_foreign_code_names_the_rows(name: str, relaxed_promotion: None) -> None:
    use, message = FOREIGN[name]
    with pytest.raises((TypeError, ValueError), match=f"(?s)SparseRows.*{message}"):
        use(rows_of([1, 1, 3]))


def test_masks_and_labels_that_a_function_made_of_the_parameters_take_rows() -> None:
    """The remedy that the error of a function names."""
    params = {"t": jnp.ones((V, D)), "w": jnp.ones(D)}
    labels = jax.tree.map(lambda x: "table" if x.ndim > 1 else "rest", params)
    tx = optax.multi_transform({"table": at.lazy_adam(0.1), "rest": at.adam(0.1)}, labels)
    g = {"t": rows_of([1]).with_values(jnp.ones((1, D))), "w": jnp.ones(D)}
    updates, _ = tx.update(g, tx.init(params), params)
    expected = np.zeros((V, D), np.float32)
    expected[1] = -0.1
    np.testing.assert_allclose(at.to_dense(updates)["t"], expected, rtol=1e-6)


def test_keys_that_are_shown_as_indices_are_those_of_jax() -> None:
    """Else neither an exported program nor a checkpoint could hold them."""
    keys = jax.tree.leaves(rows_of([1, 3]))[1]
    again = jax.random.wrap_key_data(jax.random.key_data(keys))
    assert "SparseRows" in str(keys.dtype) and "SparseRows" not in str(jax.random.key(0).dtype)
    assert (keys.dtype, hash(keys.dtype)) == (again.dtype, hash(again.dtype))
    assert jax.random.key_impl(keys) == "threefry2x32"
    assert b"key_type" not in pickle.dumps(keys)
    assert pickle.loads(pickle.dumps(keys)).dtype == keys.dtype


@pytest.mark.parametrize(
    "fill",
    [
        lambda rows: jax.tree.map(jnp.zeros_like, rows),
        lambda rows: jax.jit(optax.tree.ones_like)(rows),
        lambda rows: optax.set_to_zero().update(rows, optax.EmptyState())[0],
        lambda rows: jax.tree.structure(rows).unflatten(
            [rows.values, jax.random.split(jax.random.key(0), 3)]
        ),
    ],
    ids=["zeros_like", "ones_like", "set_to_zero", "random keys"],
)
def test_leaves_that_other_code_filled_are_padding(fill: Callable[[at.SparseRows], Any]) -> None:
    rows = rows_of([0, 5, 3]).sum_duplicates()
    filled = fill(rows)
    assert filled.indices.tolist() == [V] * 3
    table = jnp.asarray(normal(0, V, D))
    assert_bits_equal(table + filled, table)
    params, tx = {"t": table}, at.lazy_adam(0.1)
    _, state = tx.update({"t": rows}, tx.init(params), params)
    updates, after = tx.update({"t": filled}, state, params)
    assert not at.to_dense(updates)["t"].any()
    moments = [jax.tree.leaves(s.inner_state[0].mu) for s in (state, after)]
    assert_bits_equal(*moments)


UNSCALE = at.static_loss_scale(optax.identity(), 2.0)
OPERATIONS: dict[str, Any] = {
    "with_values": lambda rows: rows.with_values(2.0 * rows.values),
    "with_rows": lambda rows: rows.with_rows(rows.indices[:1], rows.values[:1]),
    "scaled": lambda rows: -(2.0 * rows / 3.0),
    "astype": lambda rows: rows.astype(jnp.complex64).conj().real,
    "sum_duplicates": lambda rows: rows.sum_duplicates(),
    "sum": lambda rows: rows + rows - rows,
    "zeros": lambda rows: jax.tree.map(jnp.zeros_like, rows),
    "jit": lambda rows: jax.jit(lambda x: x)(rows),
    "clipped": lambda rows: at.lazy(at.clip_by_global_norm(1.0)).update(
        rows, at.LazyState(optax.EmptyState()), jnp.ones((V, D))
    )[0],
    "unscaled": lambda rows: UNSCALE.update(rows, UNSCALE.init(rows))[0],
    "reduced": lambda rows: jax.vmap(
        lambda x: at.all_reduce_rows(x, "i", average=True), axis_name="i"
    )(jax.tree.map(lambda x: x[None], rows)),
    "pickled": lambda rows: pickle.loads(pickle.dumps(rows)),
}


@pytest.mark.parametrize("name", in_tiers(OPERATIONS, lambda name: name in ("sum", "reduced")))
def test_every_operation_keeps_the_mark_of_synchronized_rows(name: str) -> None:
    rows = rows_of([1, 1, 3])
    assert not rows.synchronized and "synchronized" not in repr(rows)
    marked = at.SparseRows(rows.indices, rows.values, V, synchronized=True)
    assert jax.tree.structure(marked) == jax.tree.structure(rows.as_synchronized())
    assert repr(marked).endswith("3 of 7 rows, synchronized)")
    for x in (rows, marked):
        result = OPERATIONS[name](x)
        assert isinstance(result, at.SparseRows) and result.synchronized == x.synchronized
    assert not rows.synchronized
    for mixed in (rows + marked, marked + rows, marked - rows):
        assert not mixed.synchronized


def test_a_program_that_takes_rows_is_exported() -> None:
    pytest.importorskip("flatbuffers")
    for cls in (optax.ScaleByAdamState, optax.EmptyState):
        with contextlib.suppress(ValueError):  # registered already
            export.register_namedtuple_serialization(cls, serialized_name=cls.__name__)
    params, tx = {"t": jnp.ones((V, D))}, at.lazy_adam(0.1)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return at.apply_updates(params, updates), state, updates

    inputs = (params, tx.init(params), {"t": rows_of([1, 1, 3]).as_synchronized()})
    program = export.deserialize(export.export(step)(*inputs).serialize())
    assert_bits_equal(program.call(*inputs), step(*inputs))
    rows = stacked(rows_of_eight())
    program = export.deserialize(export.export(jax.jit(lambda rows: rows))(rows).serialize())
    assert jax.tree.structure(program.call(rows)) == jax.tree.structure(rows)


def test_states_of_every_class_are_exported() -> None:
    pytest.importorskip("flatbuffers")
    classes = [cls for cls in state_layout.TABLE if cls.__module__.startswith("adam_transforms")]
    states = [cls(*[None] * len(cls._fields)) for cls in (*classes, UpdateHistory)]
    assert len(states) > 10
    program = export.export(jax.jit(lambda states: states))(states)
    program = export.deserialize(program.serialize())
    assert program.in_tree == jax.tree.structure(((states,), {}))


def test_collectives_do_not_sum_the_indices() -> None:
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        jax.vmap(lambda r: jax.lax.psum(r, "i"), axis_name="i")(
            jax.tree.map(lambda x: jnp.stack([x, x]), rows_of([1]))
        )


def test_index_checks_raise_no_false_alarm_over_packed_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse_rows, "PACKED_BYTES", 0)
    checked = checkify.checkify(lambda rows: rows.sum_duplicates(), errors=checkify.index_checks)
    error, summed = jax.jit(checked)(rows_of([V, 3, 3, -1]))
    assert error.get() is None
    assert summed.indices.tolist() == [3, V, V, V]
