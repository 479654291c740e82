"""Row gradients for the ways in which programs read a table: those of `idioms.py`."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import idioms
import jax
import jax.numpy as jnp
import numpy as np
import optax
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

KEYS = [key for key in idioms.ALL if key[0] not in ("inherent", "no table")]
QUICK = KEYS[::4]  # those whose gradients the first tier compares


def is_rows(x: Any) -> bool:
    return isinstance(x, at.SparseRows)


def every(keys: Any, quick: Any = ()) -> Any:
    """Parametrizes by idioms; the second tier alone tries those that are not `quick`, if any is."""
    slow = [pytest.mark.slow]
    params = [
        pytest.param(*key, id=": ".join(key), marks=slow if quick and key not in quick else ())
        for key in keys
    ]
    return pytest.mark.parametrize(("group", "name"), params)


class Case(NamedTuple):
    """An idiom with parameters: small integers without 0, or quarters if no sum is exact anyway."""

    params: Any
    loss: Callable[..., Any]
    tolerance: float


def make_case(idiom: Idiom) -> Case:
    abstract, function = idioms.build(idiom, ROWS)
    rng, leaves = np.random.default_rng(0), []
    flat, treedef = jax.tree.flatten(abstract)
    for leaf in flat:
        values = rng.integers(1, 4 if leaf.shape[:1] == (ROWS,) else 3, leaf.shape)
        values = values * rng.choice([-1, 1], leaf.shape) * (0.25 if idiom.tolerance else 1)
        leaves.append(jnp.asarray(values, leaf.dtype))
    return Case(treedef.unflatten(leaves), make_loss(function), idiom.tolerance)


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


def is_table(path: str) -> bool:
    return re.search(NAMED, path) is not None


def rows_by_leaf(grads: Any) -> dict[str, bool]:
    """{path: whether the leaf is a row gradient}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_rows)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return dict(zip(names, [is_rows(x) for _, x in leaves], strict=True))


def assert_equal(actual: Any, expected: Any, tolerance: float) -> None:
    """To the bit, or to a part of the largest entry of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.shape(a) == np.shape(e) and np.asarray(a).dtype == np.asarray(e).dtype
        size = np.max(np.abs(np.nan_to_num(e)), initial=0)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * size)


# ---- several idioms in one program, for what takes time is to compile many ----


class Tried(NamedTuple):
    """Of one idiom, for each of `IDS`."""

    rows: Any  # the row gradients
    by_auto: Any  # the same, by "auto": shapes
    actual: Any  # (value, aux, gradient made dense)
    expected: Any  # and by JAX


@functools.cache
def try_together(keys: tuple[Any, ...]) -> dict[Any, Tried] | None:
    """None if one of them fails: the others must not fail with it."""
    chosen = [idioms.ALL[key] for key in keys]
    built = [make_case(idiom) for idiom in chosen]
    tables = "auto" if any(idiom.rows is None for idiom in chosen) else of_one_of_several

    def loss(params: list[Any], ids: Any) -> Any:
        values, aux = zip(
            *[c.loss(p, ids) for c, p in zip(built, params, strict=True)], strict=True
        )
        return sum(values), (values, aux)

    @jax.jit
    def run(params: Any, ids: Any) -> Any:
        ours = at.value_and_grad(loss, has_aux=True, tables=tables)(params, ids)
        return ours, jax.value_and_grad(loss, has_aux=True)(params, ids)

    params = [case.params for case in built]
    try:
        by_auto, _ = jax.eval_shape(at.grad(loss, has_aux=True), params, IDS[0])
        runs = [run(params, ids) for ids in IDS]
    except Exception:
        if len(keys) == 1:
            raise
        return None

    def of_idiom(i: int, result: Any) -> Any:
        (_, (values, aux)), grads = result
        return jax.device_get((values[i], aux[i], at.to_dense(grads[i])))

    return {
        key: Tried(
            [grads[i] for (_, grads), _ in runs],
            by_auto[i],
            [of_idiom(i, ours) for ours, _ in runs],
            [of_idiom(i, theirs) for _, theirs in runs],
        )
        for i, key in enumerate(keys)
    }


def of_one_of_several(path: str, leaf: Any) -> bool:
    return is_table(path.split("/", 1)[1])


def tried(*key: str) -> Tried:
    def kind(key: Any) -> Any:
        return key[0], idioms.ALL[key].rows, key in QUICK

    alike = [other for other in idioms.ALL if kind(other) == kind(key)]
    first = alike.index(key) // PROGRAM * PROGRAM
    together = try_together(tuple(alike[first : first + PROGRAM])) or try_together((key,))
    assert together is not None
    return together[key]


@pytest.mark.every_case
@every(KEYS, QUICK)
def test_the_gradient_has_rows_and_made_dense_is_that_of_jax(group: str, name: str) -> None:
    idiom, result = idioms.ALL[group, name], tried(group, name)
    for rows, actual, expected in zip(result.rows, result.actual, result.expected, strict=True):
        assert_equal(actual, expected, idiom.tolerance)
        if idiom.rows:
            assert rows_by_leaf(rows) == {path: is_table(path) for path in rows_by_leaf(rows)}
        for leaf in filter(is_rows, jax.tree.leaves(rows, is_leaf=is_rows)):
            assert leaf.unique
            assert leaf.indices.size < ROWS
    if idiom.auto is not None:
        by_auto = rows_by_leaf(result.by_auto)
        by_auto.pop("column", None)  # (V, 1), and used as the tables are
        assert by_auto == {path: idiom.auto and is_table(path) for path in by_auto}


# ---- alone ----


def ours(idiom: Idiom, loss: Any) -> Any:
    """`at.value_and_grad` of the idiom's tables, or of those that "auto" takes."""
    tables = "auto" if idiom.rows is None else NAMED
    return at.value_and_grad(loss, has_aux=True, tables=tables)


@every([key for key in KEYS if idioms.ALL[key].memory])
def test_memory_does_not_know_the_number_of_rows(group: str, name: str) -> None:
    """But for what the loss itself takes where it uses the whole table without a gradient."""

    def temporaries(rows: int, wrap: Any) -> int:
        abstract, function = idioms.build(idioms.ALL[group, name], rows)
        ids = jax.ShapeDtypeStruct(IDS[0].shape, jnp.int32)
        step = jax.jit(wrap(make_loss(function))).lower(abstract, ids).compile()
        analysis: Any = step.memory_analysis()
        return analysis.temp_size_in_bytes

    def growth(wrap: Any) -> int:
        return temporaries(50400, wrap) - temporaries(5040, wrap)

    of_loss = growth(lambda loss: loss) if group == "no gradient" else 0
    assert growth(functools.partial(ours, idioms.ALL[group, name])) <= 1.01 * of_loss


@every([key for key in KEYS if idioms.ALL[key].mapped])
def test_under_vmap(group: str, name: str) -> None:
    idiom = idioms.ALL[group, name]
    params, loss, _ = make_case(idiom)

    @jax.jit
    def run(params: Any) -> Any:
        actual = jax.vmap(lambda ids: at.to_dense(ours(idiom, loss)(params, ids)))(IDS)
        return actual, jax.vmap(lambda ids: jax.value_and_grad(loss, has_aux=True)(params, ids))(
            IDS
        )

    assert_equal(*jax.device_get(run(params)), idiom.tolerance)


# Some gradients of this model are zero but for rounding.
_ROUNDING = ("flax", "linen: transformer")
# JAX itself refuses this one: its carry becomes one that varies over devices.
_REFUSED = ("control flow", "scan: in scan")
_IN_SHARD_MAP = [key for key in KEYS if idioms.ALL[key].mapped][::3]
_IN_SHARD_MAP = [key for key in _IN_SHARD_MAP if key not in (_ROUNDING, _REFUSED)]


@every(_IN_SHARD_MAP)
def test_in_shard_map(group: str, name: str) -> None:
    """The sum over two devices, each with ids of its own."""
    idiom = idioms.ALL[group, name]
    params, loss, _ = make_case(idiom)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    batch = np.concatenate(IDS)

    def on_devices(gradient: Any, check_vma: bool) -> Any:
        share = lambda params, ids: gradient(params, ids)[0]  # noqa: E731
        specs = {"in_specs": (P(), P("d")), "out_specs": P(), "check_vma": check_vma}
        return jax.shard_map(share, mesh=mesh, **specs)

    def reduced(params: Any, ids: Any) -> Any:
        _, grads = ours(idiom, loss)(params, ids)
        return at.to_dense(at.all_reduce_rows(grads, "d")), None

    dense = jax.grad(loss, has_aux=True)
    try:
        jax.eval_shape(on_devices(dense, check_vma=True), params, batch)
        check_vma = True
    except TypeError:  # a carry of zeros, say, does not vary over devices before the loop
        check_vma = False
    actual = jax.jit(on_devices(reduced, check_vma))(params, batch)
    expected = jax.tree.map(jnp.add, *[jax.jit(dense)(params, ids)[0] for ids in IDS])
    assert_equal(*jax.device_get((actual, expected)), idiom.tolerance * 2)


# ---- what stays dense ----


@pytest.mark.every_case
@pytest.mark.parametrize("name", idioms.INHERENT)
def test_what_needs_the_whole_table_is_dense_and_refused_when_named(name: str) -> None:
    result, (params, loss, _) = tried("inherent", name), make_case(idioms.ALL["inherent", name])
    operation = idioms.INHERENT[name][1]
    assert not any(rows_by_leaf(result.rows[0]).values())
    assert_equal(result.actual, result.expected, 2e-6)
    with pytest.raises(ValueError, match=rf"(?s)'t'.*\b{operation}\b"):
        jax.eval_shape(at.grad(loss, has_aux=True, tables=NAMED), params, IDS[0])


@pytest.mark.every_case
@pytest.mark.parametrize("name", idioms.NO_TABLES)
def test_auto_makes_no_table_by_accident_but_a_name_does(name: str) -> None:
    result, (params, loss, _) = tried("no table", name), make_case(idioms.ALL["no table", name])
    parameter = idioms.NO_TABLES[name][1]
    assert_equal(result.actual, result.expected, 2e-6)
    by_auto = rows_by_leaf(result.rows[0])
    assert by_auto == {path: path == "t" for path in by_auto}
    gradient = at.grad(loss, has_aux=True, tables=f"^{parameter}$")
    by_name = rows_by_leaf(jax.eval_shape(gradient, params, IDS[0])[0])
    assert by_name == {path: path == parameter for path in by_name}


# ---- with pending updates ----


@every([key for key in KEYS if idioms.ALL[key].rows])
def test_deferred_adam_follows_dense_adam(group: str, name: str) -> None:
    """Reads see the rows with all pending updates applied."""
    params, loss, _ = make_case(idioms.ALL[group, name])
    # A gradient that is zero but for rounding moves nothing: eps is far above it.
    deferred = at.deferred_adam(0.1, tables=NAMED, eps=1e-2, eps_hat=True)
    dense = at.adam(0.1, eps=1e-2, eps_hat=True)

    @jax.jit
    def step(ours: Any, theirs: Any, ids: Any) -> Any:
        grads, _ = at.grad(loss, has_aux=True, rows_from=ours[1])(ours[0], ids)
        updates, state = deferred.update(grads, ours[1], ours[0])
        ours = optax.apply_updates(ours[0], updates), state
        grads, _ = jax.grad(loss, has_aux=True)(theirs[0], ids)
        updates, state = dense.update(grads, theirs[1], theirs[0])
        return ours, (optax.apply_updates(theirs[0], updates), state)

    ours, theirs = (params, deferred.init(params)), (params, dense.init(params))
    for ids in jnp.asarray([*IDS, *IDS]):
        ours, theirs = jax.device_get(step(ours, theirs, ids))

    pairs = zip(*map(jax.tree.leaves, (at.flush(*ours)[0], theirs[0])), strict=True)
    for actual, expected in pairs:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
