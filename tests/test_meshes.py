"""Tables and batches on several devices: the same steps as on one."""

import contextlib
import functools
import itertools
import re
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import adam_transforms as at

pytestmark = pytest.mark.usefixtures("relaxed_promotion")
V, D, N = 16, 8, 32
STEPS = 3
IDS = np.random.default_rng(0).integers(0, V, (STEPS, N)).astype(np.int32)
TARGETS = helpers.normal(1, STEPS, N, D)


def make_params(spec: Any = None, mesh: Any = None) -> dict[str, Any]:
    params = {"t": helpers.normal(2, V, D), "w": helpers.normal(3, D), "none": None}
    if mesh is None:
        return jax.tree.map(jnp.asarray, params)
    specs = {"t": spec, "w": P(spec[1]), "none": None}
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, specs)


def loss(params: Any, ids: Any, targets: Any, read_spec: Any = None) -> Any:
    read = params["t"].at[ids].get(out_sharding=read_spec)
    return jnp.sum((read * params["w"] - targets) ** 2)


def step(tx: Any, params: Any, state: Any, grads: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


OPTIMIZERS = {
    "lazy": at.lazy_adam(0.1),
    # Of all its forms the one that compiles the fastest.
    "deferred": at.deferred_adam(0.1, tables="t", eps_hat=True, max_idle=256),
}


def gradient(name: str, params: Any, state: Any, *batch: Any) -> Any:
    """Row gradients of `loss`, read as the optimizer needs them to be."""
    rows_from = state if name == "deferred" else None
    return at.grad(loss, tables="t", rows_from=rows_from)(params, *batch)


@functools.cache
def on_one_device(name: str, scale: float = 1.0) -> Any:
    """Parameters and state after `STEPS` steps on whole batches, the gradient times `scale`."""
    tx, params = OPTIMIZERS[name], make_params()
    state = tx.init(params)

    @jax.jit
    def run(params: Any, state: Any, *batch: Any) -> Any:
        grads = gradient(name, params, state, *batch)
        scaled = jax.tree.map(lambda g: g * scale, grads, is_leaf=is_rows)
        return step(tx, params, state, scaled)

    for batch in zip(IDS, TARGETS, strict=True):
        params, state = run(params, state, *batch)
    return jax.device_get((params, state))


def is_rows(x: Any) -> bool:
    return isinstance(x, at.SparseRows)


def assert_same_on_one_device(name: str, params: Any, state: Any, scale: float = 1.0) -> None:
    actual = jax.device_get((params, state))
    helpers.assert_close(actual, on_one_device(name, scale), rtol=1e-4, atol=1e-5)


# ---- tables over a mesh ----


def make_mesh(kind: Any) -> Any:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


KINDS = [AxisType.Explicit, AxisType.Auto]
LAYOUTS = [
    (P(None, None), P("y")),
    (P("x", None), P(None)),
    (P("x", None), P("y")),
    (P(None, "x"), P(None)),
    (P(None, "x"), P("y")),
    (P("x", "y"), P("x")),
    (P(("x", "y"), None), P("x")),
]
# In the first tier: rows over devices, columns, and both.
QUICK_LAYOUTS = [(P("x", None), P("y")), (P(None, "x"), P(None)), (P("x", "y"), P("x"))]
# And for whole steps, one with each.
QUICK_STEPS = [
    ("deferred", AxisType.Explicit, *QUICK_LAYOUTS[0]),
    ("lazy", AxisType.Auto, *QUICK_LAYOUTS[1]),
    ("lazy", AxisType.Explicit, *QUICK_LAYOUTS[2]),
]
both_kinds = pytest.mark.parametrize("kind", KINDS)
every_layout = pytest.mark.parametrize(
    ("table_spec", "ids_spec"), helpers.in_tiers(LAYOUTS, lambda *specs: specs in QUICK_LAYOUTS)
)


@both_kinds
@every_layout
def test_row_gradients_of_a_sharded_table(kind: Any, table_spec: Any, ids_spec: Any) -> None:
    """Of several reads, by ids in two dimensions, with a cast, and by ids all devices have."""
    mesh = make_mesh(kind)
    table = np.random.default_rng(4).integers(-4, 5, (V, D)).astype(np.float32)
    ids = IDS[0].reshape(4, 8)
    spec = P(*ids_spec, None, table_spec[1])

    def loss(table: Any, ids: Any, spec: Any = None) -> Any:
        read = table.at[ids].get(out_sharding=spec)
        low = table.astype(jnp.bfloat16).at[ids].get(out_sharding=spec).astype(jnp.float32)
        same = table.at[np.array([3, 3])].get(out_sharding=spec and P(None, spec[-1]))
        return jnp.sum(read * low) + jnp.sum(same**2)

    expected = jax.device_get(jax.jit(jax.grad(loss))(table, ids))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(table, NamedSharding(mesh, table_spec))
        sharded_ids = jax.device_put(ids, NamedSharding(mesh, P(*ids_spec, None)))
        explicit = kind == AxisType.Explicit
        rows = jax.jit(
            lambda table, ids: at.grad(loss, tables="")(table, ids, *([spec] if explicit else []))
        )(sharded, sharded_ids)
        assert rows.values.shape == (2 * N + 2, D)
        assert rows.indices.sharding.is_fully_replicated
        actual = jax.device_get(jax.jit(at.SparseRows.to_dense)(rows))
    helpers.assert_bits_equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "kind", "table_spec", "ids_spec"),
    helpers.in_tiers(
        ((name, kind, *specs) for name in OPTIMIZERS for kind in KINDS for specs in LAYOUTS),
        lambda *case: case in QUICK_STEPS,
    ),
)
def test_steps_keep_every_sharding(name: str, kind: Any, table_spec: Any, ids_spec: Any) -> None:
    mesh, tx = make_mesh(kind), OPTIMIZERS[name]
    explicit = kind == AxisType.Explicit
    read_spec = P(*ids_spec, table_spec[1])
    table_sharding = NamedSharding(mesh, table_spec)

    def whole_step(params: Any, state: Any, ids: Any, targets: Any) -> Any:
        grads = gradient(name, params, state, ids, targets, read_spec if explicit else None)
        if explicit:
            assert jax.typeof(grads["t"].values).sharding.spec == P(None, table_spec[1])
        return step(tx, params, state, grads)

    with jax.set_mesh(mesh):
        params = make_params(table_spec, mesh)
        state = (jax.jit(tx.init) if explicit else tx.init)(params)
        shardings = None
        if not explicit:
            shardings = jax.tree.map(lambda x: x.sharding, (params, state))
        run = jax.jit(whole_step, donate_argnums=(0, 1), out_shardings=shardings)
        for ids, targets in zip(IDS, TARGETS, strict=True):
            ids = jax.device_put(ids, NamedSharding(mesh, ids_spec))
            targets = jax.device_put(targets, NamedSharding(mesh, read_spec))
            params, state = jax.block_until_ready(run(params, state, ids, targets))
        tables = [x for x in jax.tree.leaves((params, state)) if x.shape == (V, D)]
        assert len(tables) == 3
        assert all(x.sharding.is_equivalent_to(table_sharding, 2) for x in tables)
        if name == "deferred":
            rows_sharding = NamedSharding(mesh, P(table_spec[0]))
            assert state.idle.last_step["t"].sharding.is_equivalent_to(rows_sharding, 1)
    assert_same_on_one_device(name, params, state)


@both_kinds
@pytest.mark.parametrize(
    "table_spec",
    helpers.in_tiers([P("x", None), P(None, "x"), P("x", "y")], lambda spec: spec == P("x", "y")),
)
def test_what_is_owed_is_made_up_for_where_it_is(kind: Any, table_spec: Any) -> None:
    """flush, catch_up and owed of a sharded table, as on one device."""
    tx, mesh = OPTIMIZERS["deferred"], make_mesh(kind)
    ids = {"t": jnp.array([0, V - 1, 3])}

    def calls(params: Any, state: Any) -> Any:
        flushed, paid = at.flush(params, state)
        return (
            at.owed(params, state),
            at.owed(flushed, paid),
            flushed,
            at.catch_up(params, state, ids),
        )

    expected = jax.device_get(calls(*on_one_device("deferred")))
    assert int(expected[0]["t"].rows) > 0
    assert int(expected[1]["t"].rows) == 0
    with jax.set_mesh(mesh):
        params = make_params(table_spec, mesh)
        like = (jax.jit(tx.init) if kind == AxisType.Explicit else tx.init)(params)
        params, state = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding),
            on_one_device("deferred"),
            (params, like),
        )
        actual = jax.jit(calls)(params, state)
        assert actual[2]["t"].sharding.is_equivalent_to(NamedSharding(mesh, table_spec), 2)
    helpers.assert_close(jax.device_get(actual), expected, rtol=1e-5, atol=1e-6)


def sums_of_rows(table: Any, indices: Any, values: Any) -> Any:
    sums = []
    for dtype in (jnp.float32, jnp.bfloat16):
        rows = at.SparseRows(indices, values.astype(dtype), V)
        sums += [table.astype(dtype) + rows, (rows + rows).to_dense()]
    return sums


@pytest.mark.parametrize("context", [True, False])
@every_layout
def test_rows_meet_a_table_on_an_explicit_mesh(
    context: bool, table_spec: Any, ids_spec: Any
) -> None:
    mesh = make_mesh(AxisType.Explicit)
    table, values = np.ones((V, D), np.float32), np.arange(8.0 * D, dtype=np.float32) % 7
    indices = np.array([3, 5, 3, V, -1, 0, 3, 1], np.int32)
    arrays = table, indices, values.reshape(8, D)
    expected = jax.device_get(jax.jit(sums_of_rows)(*arrays))
    specs = (table_spec, ids_spec, P(*ids_spec, None))
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        actual = jax.jit(sums_of_rows)(
            *(jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True))
        )
    for sum_with_table in actual[::2]:
        assert sum_with_table.sharding.is_equivalent_to(NamedSharding(mesh, table_spec), 2)
    helpers.assert_bits_equal(jax.device_get(actual), expected)


def test_on_an_explicit_mesh_it_needs_no_jit() -> None:
    mesh = make_mesh(AxisType.Explicit)
    spec = P("x", None)
    with jax.set_mesh(mesh):
        params = make_params(spec, mesh)
        grads = at.grad(loss, tables="t")(params, IDS[0], TARGETS[0], P(None, None))
        actual, state = step(at.lazy_adam(0.1), params, at.lazy_adam(0.1).init(params), grads)
        assert actual["t"].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    tx, params = at.lazy_adam(0.1), make_params()
    grads = at.grad(loss, tables="t")(params, IDS[0], TARGETS[0])
    expected = step(tx, params, tx.init(params), grads)
    helpers.assert_close(*map(jax.device_get, ((actual, state), expected)), rtol=1e-5, atol=1e-6)


@both_kinds
def test_accumulated_rows_are_sharded_from_the_start_as_they_stay(kind: Any) -> None:
    """Any other sharding of the first state would compile the step twice."""

    def run(mesh: Any = None) -> Any:
        spec = P("x", "y") if mesh is not None else None
        read_spec = P(None, "y") if kind == AxisType.Explicit and mesh is not None else None

        def gradients(params: Any, ids: Any, targets: Any) -> Any:
            return at.grad(loss, tables="t")(params, ids, targets, read_spec)

        params = make_params(spec, mesh)
        like = jax.eval_shape(gradients, params, IDS[0], TARGETS[0])
        tx = at.accumulate(at.lazy(optax.sgd(0.1)), 2, like=like)
        state = tx.init(params)
        before = jax.tree.map(lambda x: x.sharding, state.acc)
        run = jax.jit(lambda p, s, *batch: step(tx, p, s, gradients(p, *batch)))
        for batch in zip(IDS, TARGETS, strict=True):
            params, state = run(params, state, *batch)
            for x, sharding in zip(*map(jax.tree.leaves, (state.acc, before)), strict=True):
                assert mesh is None or x.ndim < 2 or x.sharding.is_equivalent_to(sharding, x.ndim)
        return jax.device_get((params, state.mini_step))

    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        actual = run(mesh)
    helpers.assert_close(actual, run(), rtol=1e-5, atol=1e-6)


@both_kinds
def test_stacked_tables_stay_sharded_and_only_rows_cross_devices(kind: Any) -> None:
    mesh, spec, leading_shape = make_mesh(kind), P("y", "x", None), (2, 1024)
    table, num_rows = helpers.normal(2, *leading_shape, D), 2048

    def run(sharding: Any, leading_shape: Any) -> Any:
        def rows_of(ids: Any, values: Any) -> Any:
            return {"t": at.SparseRows(ids, values, num_rows, leading_shape=leading_shape)}

        like = jax.eval_shape(rows_of, IDS[0], TARGETS[0])
        tx = at.accumulate(at.lazy_adam(0.1, ema=0.9), 2, like=like)

        def whole_step(params: Any, state: Any, *batch: Any) -> Any:
            return step(tx, params, state, rows_of(*batch))

        params = {"t": jax.device_put(table.reshape(*leading_shape, D), sharding)}
        state = jax.jit(tx.init)(params)
        run_step = jax.jit(whole_step, donate_argnums=(0, 1))
        program = run_step.lower(params, state, IDS[0], TARGETS[0]).compile().as_text()
        for batch in zip(IDS * 120, TARGETS, strict=True):
            params, state = run_step(params, state, *batch)
        return params["t"], program

    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        actual, program = run(sharding, leading_shape)
    expected, _ = run(jax.devices()[0], (num_rows,))
    assert actual.sharding.is_equivalent_to(sharding, 3)
    helpers.assert_close(np.asarray(actual).reshape(expected.shape), expected, rtol=1e-5)
    sent = re.findall(r"= f32\[([\d,]+)\]\S* (?:all-|reduce-|collective-)[\w-]*\(", program)
    assert sent or kind == AxisType.Auto  # where XLA has put the slots on every device
    assert all(np.prod([*map(int, shape.split(","))]) <= 2 * N * D for shape in sent)


def compiled_step(name: str, kind: Any, table_spec: Any, rows: int) -> Any:
    """A whole step for a table of so many rows, and what its collectives send, as HLO has it."""
    mesh, tx = make_mesh(kind), OPTIMIZERS[name]
    read_spec = P("y", None) if kind == AxisType.Explicit else None

    def whole_step(params: Any, state: Any, ids: Any, targets: Any) -> Any:
        return step(tx, params, state, gradient(name, params, state, ids, targets, read_spec))

    def place(x: Any, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        params = {"t": jnp.zeros((rows, D)), "w": jnp.zeros(D)}
        args = jax.tree.map(
            lambda x: place(x, P(*table_spec[: x.ndim]) if x.shape[:1] == (rows,) else P()),
            (params, tx.init(params)),
        )
        batch = place(IDS[0], P("y")), place(TARGETS[0], P("y", None))
        shardings = jax.tree.map(lambda x: x.sharding, args)
        run = jax.jit(whole_step, donate_argnums=(0, 1), out_shardings=shardings)
        compiled = run.lower(*args, *batch).compile()
    sent = r"= (.*) (?:all-|reduce-|collective-|copy)[\w-]*\("
    return compiled, re.findall(sent, compiled.as_text())


@pytest.mark.parametrize(
    ("name", "kind", "table_spec"),
    helpers.in_tiers(
        itertools.product(OPTIMIZERS, KINDS, (P(None, None), P("x", None), P(("x", "y"), None))),
        lambda name, kind, spec: (
            spec == P("x", None) and (name == "deferred") == (kind == AxisType.Explicit)
        ),
    ),
)
def test_no_array_of_the_size_of_a_table_crosses_devices(
    name: str, kind: Any, table_spec: Any
) -> None:
    """Nor is copied: a device updates the rows it has, and sent are the rows touched."""
    rows = 4096
    in_turn = rows // 256 if name == "deferred" else 0
    _, sent = compiled_step(name, kind, table_spec, rows)
    assert any("s32[32" in shapes for shapes in sent)  # the ids of all devices
    rows_sent = [int(n) for shapes in sent for n in re.findall(r"\w+\[(\d+),", shapes)]
    assert N <= max(rows_sent) <= N + in_turn


@both_kinds
@pytest.mark.parametrize(
    "table_spec",
    helpers.in_tiers([P("x", None), P(None, "x"), P("x", "y")], lambda spec: spec == P("x", "y")),
)
def test_a_larger_table_takes_no_more_memory_and_traffic_a_step(kind: Any, table_spec: Any) -> None:
    compiled, sent = zip(
        *(compiled_step("lazy", kind, table_spec, rows) for rows in (8192, 81920)), strict=True
    )
    small, large = (x.memory_analysis().temp_size_in_bytes for x in compiled)
    assert 0 < large <= small + 64  # alignment
    assert sent[0]
    assert sent[0] == sent[1]


# ---- batches over the devices of a mapped axis ----

MAPS = ["shard_map", "shard_map unchecked", "pmap"]
every_map = pytest.mark.parametrize("how", MAPS)


def over_devices(how: str, fun: Any, sharded: int = 2) -> Any:
    """`fun` on eight devices, axis "d": the first arguments whole, the last `sharded` in parts.
    All devices' results are the same."""
    if how == "pmap":
        mapped = jax.pmap(fun, axis_name="d", in_axes=(None,) * 2 + (0,) * sharded)

        def run(*args: Any) -> Any:
            parts = [x.reshape(8, -1, *x.shape[1:]) for x in args[-sharded:]]
            result = jax.device_get(mapped(*args[:-sharded], *parts))
            jax.tree.map(lambda x: np.testing.assert_array_equal(x, x[:1].repeat(8, 0)), result)
            return jax.tree.map(lambda x: x[0], result)

        return run
    return jax.jit(
        jax.shard_map(
            fun,
            mesh=jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)),
            in_specs=(P(),) * 2 + (P("d"),) * sharded,
            out_specs=P(),
            check_vma=how == "shard_map",
        )
    )


@every_map
def test_a_row_gradient_is_the_share_of_the_rows_that_the_device_read(how: str) -> None:
    def share(params: Any, _: Any, ids: Any, targets: Any) -> Any:
        rows = at.grad(loss, tables="t")(params, ids, targets)["t"]
        assert rows.indices.shape == (N // 8,)
        return jax.lax.psum(rows.to_dense(), "d")

    actual = over_devices(how, share)(make_params(), 0.0, IDS[0], TARGETS[0])
    expected = jax.grad(loss)(make_params(), IDS[0], TARGETS[0])["t"]
    helpers.assert_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("average", [False, True])
@every_map
def test_all_reduced_it_is_the_gradient_of_the_whole_batch(how: str, average: bool) -> None:
    def share(params: Any, _: Any, ids: Any, targets: Any) -> Any:
        grads = at.all_reduce_rows(
            at.grad(loss, tables="t")(params, ids, targets), "d", average=average
        )
        assert grads["t"].values.shape == (N, D) and not grads["t"].unique
        assert grads["none"] is None
        return at.to_dense(grads)

    params = make_params()
    actual = over_devices(how, share)(params, 0.0, IDS[0], TARGETS[0])
    expected = jax.grad(loss)(params, IDS[0], TARGETS[0])
    if average:
        expected = jax.tree.map(lambda x: x / 8, expected)
    helpers.assert_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "how"),
    helpers.in_tiers(
        ((name, how) for name in OPTIMIZERS for how in MAPS),
        lambda name, how: how == ("pmap" if name == "lazy" else "shard_map"),
    ),
)
def test_steps_on_shares_of_the_batch(name: str, how: str) -> None:
    tx = OPTIMIZERS[name]

    def share(params: Any, state: Any, ids: Any, targets: Any) -> Any:
        grads = gradient(name, params, state, ids, targets)
        return step(tx, params, state, at.all_reduce_rows(grads, "d", average=True))

    run, params = over_devices(how, share), make_params()
    state = tx.init(params)
    for ids, targets in zip(IDS, TARGETS, strict=True):
        params, state = jax.block_until_ready(run(params, state, ids, targets))
    assert_same_on_one_device(name, params, state, scale=1 / 8)


@pytest.mark.parametrize(
    ("axes", "kind", "check_vma"),
    helpers.in_tiers(
        itertools.product(("x", ("x",), ("x", "y"), ("y", "x")), KINDS, (True, False)),
        lambda axes, kind, check_vma: axes != ("x",) and check_vma == (kind == AxisType.Explicit),
    ),
)
def test_several_axes_and_some(axes: Any, kind: Any, check_vma: bool) -> None:
    mesh = make_mesh(kind)

    def share(params: Any, ids: Any, targets: Any) -> Any:
        return at.to_dense(
            at.all_reduce_rows(at.grad(loss, tables="t")(params, ids, targets), axes)
        )

    batch_spec = P(axes)
    args = make_params(), IDS[0], TARGETS[0]
    sharded = [
        jax.device_put(x, NamedSharding(mesh, s))
        for x, s in zip(args, (P(), batch_spec, batch_spec), strict=True)
    ]
    run = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(P(), batch_spec, batch_spec),
        out_specs=P(),
        check_vma=check_vma,
    )
    actual, expected = jax.device_get((jax.jit(run)(*sharded), jax.grad(loss)(*args)))
    helpers.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@both_kinds
@pytest.mark.parametrize("table_spec", [P(None, None), P(None, "y")])
def test_a_map_over_some_axes_of_a_mesh(kind: Any, table_spec: Any) -> None:
    """The table stays sharded over the others."""
    mesh, tx = make_mesh(kind), at.lazy_adam(0.1)

    def share(params: Any, ids: Any) -> Any:
        grads = at.grad(lambda p: jnp.sum(p["t"].at[ids].get() ** 2), tables="t")(params)
        return step(tx, params, tx.init(params), at.all_reduce_rows(grads, "x"))[0]["t"]

    def whole(params: Any) -> Any:
        grads = at.grad(lambda p: jnp.sum(p["t"][IDS[0]] ** 2), tables="t")(params)
        return step(tx, params, tx.init(params), grads)[0]["t"]

    table = {"t": make_params()["t"]}
    expected = jax.device_get(whole(table))
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            share, mesh=mesh, in_specs=(P(), P("x")), out_specs=P(), axis_names={"x"}
        )
        sharding = NamedSharding(mesh, table_spec)
        actual = jax.jit(run)(
            {"t": jax.device_put(table["t"], sharding)},
            jax.device_put(IDS[0], NamedSharding(mesh, P("x"))),
        )
    assert actual.sharding.is_equivalent_to(sharding, 2)
    helpers.assert_close(jax.device_get(actual), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inside", [jnp.sum, lambda x: jax.lax.psum(jnp.sum(x), "d")])
def test_what_does_not_vary_is_the_sum_already(inside: Any) -> None:
    """The ids that all devices share, and a loss summed before it is differentiated."""

    def share(params: Any, ids: Any, targets: Any) -> Any:
        def loss(params: Any) -> Any:
            read = params["t"][ids[: len(targets)]]
            return inside((read * params["w"] - targets) ** 2)

        return at.to_dense(at.all_reduce_rows(at.grad(loss, tables="t")(params), "d"))

    def whole(params: Any) -> Any:
        read = params["t"][np.tile(IDS[0][:4], 8)]
        return jnp.sum((read * params["w"] - TARGETS[0]) ** 2)

    params = make_params()
    run = jax.shard_map(
        share,
        mesh=jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(), P("d")),
        out_specs=P(),
    )
    actual = jax.jit(run)(params, IDS[0], TARGETS[0])
    actual, expected = jax.device_get((actual, jax.grad(whole)(params)))
    helpers.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@every_map
def test_rows_that_users_make_of_what_varies_and_what_does_not(how: str) -> None:
    def share(ones: Any, _: Any, ids: Any) -> Any:
        values = ones[: ids.size].astype(jnp.bfloat16)
        rows = at.SparseRows(ids, values, V, leading_shape=(V // 4, 4))
        rows = at.all_reduce_rows({"t": [rows]}, "d")["t"][0]
        assert rows.dtype == jnp.bfloat16
        assert rows.shape == (V // 4, 4, 1)
        return rows.to_dense()

    actual = over_devices(how, share, sharded=1)(jnp.ones((N, 1)), 0.0, IDS[0])
    np.testing.assert_array_equal(actual.flatten(), np.bincount(IDS[0], minlength=V))


@every_map
def test_an_axis_that_is_not_mapped_is_refused_by_name(how: str) -> None:
    def share(params: Any, _: Any, ids: Any, targets: Any) -> Any:
        return at.all_reduce_rows(at.grad(loss, tables="t")(params, ids, targets), "other")

    with pytest.raises(NameError, match="other"):
        over_devices(how, share)(make_params(), 0.0, IDS[0], TARGETS[0])
    with pytest.raises(NameError, match="other"):
        at.all_reduce_rows({"w": jnp.ones(2)}, "other")
