"""Row gradients for the ways in which programs read a table: those of `idioms.py`."""

import functools
import re
from collections.abc import Callable
from typing import Any

import idioms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from idioms import Idiom
from jax.sharding import AxisType, PartitionSpec as P

import adam_transforms as at

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

ROWS = 120
# Twice, once, the first, and from the end.
IDS = np.array([[[1, 7, 7], [42, 0, 5]], [[44, -1, -1], [3, -2, 0]]], np.int32)
NAMED = rf"^({'|'.join(sorted(idioms.TABLES))})$|embedding"
PROGRAM = 24  # idioms in one program: what takes time is to compile many

KEYS = list(idioms.ALL)


def is_rows(x: Any) -> bool:
    return isinstance(x, at.SparseRows)


def named(keys: Any) -> list[Any]:
    return [pytest.param(*key, id=": ".join(key)) for key in keys]


def every(keys: Any) -> Any:
    return pytest.mark.parametrize(("group", "name"), named(keys))


def make_params(abstract: Any, idiom: Idiom) -> Any:
    """Small integers without 0, or quarters of them if no sum is exact anyway."""
    rng, leaves = np.random.default_rng(0), []
    flat, treedef = jax.tree.flatten(abstract)
    for leaf in flat:
        values = rng.integers(1, 4 if leaf.shape[:1] == (ROWS,) else 3, leaf.shape)
        values = values * rng.choice([-1, 1], leaf.shape) * (0.25 if idiom.tolerance else 1)
        leaves.append(jnp.asarray(values, leaf.dtype))
    return treedef.unflatten(leaves)


def make_loss(function: Callable[..., Any]) -> Callable[..., Any]:
    """From (parameters, ids) to (loss, aux); the loss of what is read is a polynomial of it."""

    def loss(params: Any, ids: Any) -> Any:
        result = function(params, ids)
        read, aux = result if isinstance(result, tuple) else (result, None)
        if jnp.ndim(read):
            weights = np.random.default_rng(1).choice(np.float32([-2, -1, 1, 2]), jnp.shape(read))
            read = jnp.sum(weights * read * (1 + read))
        return read, aux

    return loss


def ours(idiom: Idiom, loss: Any, tables: Any = NAMED) -> Any:
    """`at.value_and_grad` of the idiom's tables, or of those that "auto" takes."""
    tables = "auto" if idiom.rows is None else tables
    return at.value_and_grad(loss, has_aux=True, tables=tables)


@functools.cache
def program(group: str, part: int) -> Any:
    """{name: for each of `IDS`: (ours, ours made dense, JAX's)} of some idioms of a group; an
    exception in place of it where ours was refused."""
    names = [n for g, n in KEYS if g == group][part * PROGRAM : (part + 1) * PROGRAM]
    refused: dict[str, Exception] = {}
    params, losses = {}, {}
    for name in names:
        idiom = idioms.ALL[group, name]
        abstract, function = idioms.build(idiom, ROWS)
        params[name], losses[name] = make_params(abstract, idiom), make_loss(function)

    @jax.jit
    def run(params: Any, ids: Any) -> Any:
        results = {}
        for name, loss in losses.items():
            expected = jax.value_and_grad(loss, has_aux=True)(params[name], ids)
            try:
                actual = ours(idioms.ALL[group, name], loss)(params[name], ids)
            except Exception as error:
                refused[name] = error
            else:
                results[name] = actual, at.to_dense(actual), expected
        return results

    runs = [jax.device_get(run(params, ids)) for ids in IDS]
    return {n: refused[n] if n in refused else [run[n] for run in runs] for n in names}


def results(group: str, name: str) -> Any:
    position = [n for g, n in KEYS if g == group].index(name)
    found = program(group, position // PROGRAM)[name]
    if isinstance(found, Exception):
        raise found
    return found


def assert_equal(actual: Any, expected: Any, tolerance: float) -> None:
    """To the bit, or to a part of the largest entry of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.shape(a) == np.shape(e) and np.asarray(a).dtype == np.asarray(e).dtype
        size = np.max(np.abs(np.nan_to_num(e)), initial=0)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * size)


def rows_by_leaf(grads: Any) -> dict[str, bool]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_rows)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): is_rows(x) for path, x in leaves
    }


@pytest.mark.every_case
@every(KEYS)
def test_the_gradient_has_rows_and_made_dense_is_that_of_jax(group: str, name: str) -> None:
    idiom = idioms.ALL[group, name]
    for (_, grads), dense, expected in results(group, name):
        assert_equal(dense, expected, idiom.tolerance)
        if idiom.rows:
            assert rows_by_leaf(grads) == {
                p: bool(re.search(NAMED, p)) for p in rows_by_leaf(grads)
            }
        for leaf in filter(is_rows, jax.tree.leaves(grads, is_leaf=is_rows)):
            assert leaf.unique
            assert leaf.indices.size < ROWS


@pytest.mark.every_case
@every([key for key in KEYS if idioms.ALL[key].auto is not None])
def test_auto_takes_what_is_read_by_rows(group: str, name: str) -> None:
    idiom = idioms.ALL[group, name]
    abstract, function = idioms.build(idiom, ROWS)
    ids = jax.ShapeDtypeStruct(IDS[0].shape, jnp.int32)
    _, grads = jax.eval_shape(at.value_and_grad(make_loss(function), has_aux=True), abstract, ids)
    rows = rows_by_leaf(grads)
    rows.pop("column", None)  # (V, 1), used as the tables are
    assert rows == {path: bool(idiom.auto and re.search(NAMED, path)) for path in rows}


@every([key for key in KEYS if idioms.ALL[key].memory])
def test_memory_does_not_know_the_number_of_rows(group: str, name: str) -> None:
    sizes = []
    for rows in (5040, 50400):
        abstract, function = idioms.build(idioms.ALL[group, name], rows)
        ids = jax.ShapeDtypeStruct(IDS[0].shape, jnp.int32)
        step = jax.jit(ours(idioms.ALL[group, name], make_loss(function)))
        analysis: Any = step.lower(abstract, ids).compile().memory_analysis()
        sizes.append(analysis.temp_size_in_bytes)
    assert sizes[0] == sizes[1]


@every([key for key in KEYS if idioms.ALL[key].mapped])
def test_under_vmap(group: str, name: str) -> None:
    idiom = idioms.ALL[group, name]
    abstract, function = idioms.build(idiom, ROWS)
    params, loss = make_params(abstract, idiom), make_loss(function)

    @jax.jit
    def run(params: Any) -> Any:
        actual = jax.vmap(lambda ids: at.to_dense(ours(idiom, loss)(params, ids)))(IDS)
        return actual, jax.vmap(lambda ids: jax.value_and_grad(loss, has_aux=True)(params, ids))(
            IDS
        )

    assert_equal(*jax.device_get(run(params)), idiom.tolerance)


@every([key for key in KEYS if idioms.ALL[key].mapped][::3])
def test_in_shard_map(group: str, name: str) -> None:
    """The sum over two devices, each with ids of its own."""
    idiom = idioms.ALL[group, name]
    abstract, function = idioms.build(idiom, ROWS)
    params, loss = make_params(abstract, idiom), make_loss(function)

    def share(params: Any, ids: Any) -> Any:
        _, grads = ours(idiom, loss)(params, ids)
        return at.to_dense(at.all_reduce_rows(grads, "d"))

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    run = jax.shard_map(share, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    each = [jax.jit(jax.grad(loss, has_aux=True))(params, ids)[0] for ids in IDS]
    expected = jax.tree.map(jnp.add, *each)
    actual = jax.jit(run)(params, np.concatenate(IDS))
    assert_equal(*jax.device_get((actual, expected)), idiom.tolerance * 2)
