"""`shard_slots`: the slots of replicated parameters in parts, the same steps."""

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
SHAPES = {"w": (64, 24), "b": (24,), "odd": (3, 5), "scalar": (), "tall": (1600, 3)}
BATCHES = helpers.normal(9, 4, 32, 64)
TRANSFORMS = {
    "adamw, clipped and averaged": lambda: at.adamw(1e-2, clip_global_norm=1.0, ema=0.9),
    "amsgrad": lambda: at.adam(1e-2, amsgrad=True),
    "accumulated, with a loss scale": lambda: at.adam(
        1e-2, accumulate_every=2, loss_scale="dynamic"
    ),
    "masked": lambda: optax.chain(
        optax.masked(at.scale_by_adam(), {k: k == "w" for k in SHAPES}), optax.scale(-1e-2)
    ),
    "optax.adam": lambda: optax.adam(1e-2),
}


def start() -> Any:
    return {name: helpers.normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}


def loss(p: Any, x: Any) -> Any:
    rest = jnp.sum(p["odd"] ** 2) + p["scalar"] ** 2 + jnp.mean(p["tall"] ** 2)
    return jnp.mean((jnp.tanh(x @ p["w"]) + p["b"][None]) ** 2) + rest


def stepped(tx: Any, params: Any, state: Any, grads: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def step(tx: Any, params: Any, state: Any, x: Any) -> Any:
    return stepped(tx, params, state, jax.grad(loss)(params, x))


def make_mesh(kind: Any) -> Any:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def replicated(mesh: Any, params: Any) -> Any:
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, P(*[None] * x.ndim * explicit))), params
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    helpers.in_tiers(
        [(name, kind) for name in TRANSFORMS for kind in (AxisType.Explicit, AxisType.Auto)],
        lambda name, kind: (
            name == ("amsgrad" if kind == AxisType.Auto else "adamw, clipped and averaged")
        ),
    ),
)
def test_the_steps_are_the_same_and_slots_stay_in_parts(name: str, kind: Any) -> None:
    mesh, plain = make_mesh(kind), TRANSFORMS[name]()
    expected = jax.tree.map(jnp.asarray, start())
    expected_state = plain.init(expected)
    run = jax.jit(lambda *args: step(plain, *args))
    for x in BATCHES:
        expected, expected_state = run(expected, expected_state, x)

    with jax.set_mesh(mesh):
        tx = at.shard_slots(plain, mesh)
        params = replicated(mesh, start())
        state = tx.init(params)
        before = helpers.types(state)
        run = jax.jit(lambda *args: step(tx, *args))
        for x in BATCHES:
            x = jax.device_put(x, NamedSharding(mesh, P("data", None)))
            params, state = run(params, state, x)
        assert helpers.types(state) == before
        assert run._cache_size() <= 2  # the first state's scalars are on one device
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
        for leaf in jax.tree.leaves(state):
            rows = {64: 16, 24: 6, 1600: 400}.get(leaf.shape[0]) if leaf.ndim else None
            part = leaf.shape if rows is None else (rows, *leaf.shape[1:])
            assert leaf.addressable_shards[0].data.shape == part
    actual = jax.device_get((params, state))
    helpers.assert_close(actual, jax.device_get((expected, expected_state)), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_device_keeps_its_part_and_moves_no_more(kind: Any) -> None:
    """Of 4 MB of parameters: 12 in and out without sharding, 4 + 8 / 8 with it."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    memory = {}
    with jax.set_mesh(mesh):
        params = replicated(mesh, {"w": jnp.zeros((1024, 1024))})
        for sharded in (False, True):
            tx = at.adam(1e-3)
            tx = at.shard_slots(tx, mesh) if sharded else tx
            state = tx.init(params)

            run: Any = jax.jit(
                lambda params, state, tx=tx: stepped(tx, params, state, params),
                donate_argnums=(0, 1),
            )
            compiled = run.lower(params, state).compile()
            memory[sharded] = compiled.memory_analysis().argument_size_in_bytes / 2**20
            if sharded:
                assert re.findall(r"f32\[1024,1024\]\S* all-gather", compiled.as_text())
                assert not re.findall(r"all-reduce", compiled.as_text())
    assert memory[False] == pytest.approx(12, rel=0.01)
    assert memory[True] == pytest.approx(5, rel=0.01)


def test_several_axes_and_row_gradients() -> None:
    mesh = make_mesh(AxisType.Auto)
    tx = at.shard_slots(at.lazy_adam(0.1), mesh, axis=("data", "model"))
    params = {"table": jnp.zeros((16, 4)), "w": jnp.zeros((24, 2))}
    state = tx.init(params)
    moments = state.inner_state[0].mu if hasattr(state, "inner_state") else state[0].mu
    assert moments["w"].sharding.spec == P(("data", "model"))
    rows = at.SparseRows(np.array([3, 3]), np.ones((2, 4), np.float32), 16)
    grads = {"table": rows, "w": jnp.ones((24, 2))}
    updates, _ = jax.jit(tx.update)(grads, state, params)
    assert isinstance(updates["table"], at.SparseRows)
    after = optax.apply_updates(params, updates)
    expected, _ = at.lazy_adam(0.1).update(grads, at.lazy_adam(0.1).init(params), params)
    helpers.assert_close(
        jax.device_get(after), jax.device_get(optax.apply_updates(params, expected))
    )


def test_bad_arguments_are_refused() -> None:
    mesh = make_mesh(AxisType.Auto)
    with pytest.raises(ValueError, match=r"of the mesh, \('data', 'model'\), got 'batch'"):
        at.shard_slots(at.adam(), mesh, axis="batch")
    with pytest.raises(TypeError, match="inner must be"):
        at.shard_slots(at.adam, mesh)
    with pytest.raises(TypeError, match="mesh must be"):
        at.shard_slots(at.adam(), None)
