"""Training that is stopped and resumed from a checkpoint ends where it would have ended."""

import functools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_process
from flax import serialization
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import adam_transforms as at
import adam_transforms.flax  # teaches Flax's serialization of row gradients

ocp = pytest.importorskip("orbax.checkpoint")

pytestmark = pytest.mark.usefixtures("relaxed_promotion")
V, D, N = 16, 8, 4


def make_params(rows: int = V) -> Any:
    return {
        "table": jnp.asarray(helpers.normal(0, rows, D)),
        "w": jnp.asarray(helpers.normal(1, D)),
    }


def loss(params: Any, ids: Any) -> Any:
    return jnp.sum((params["table"][ids] * params["w"] - 1.0) ** 2)


def batch_of(step: int) -> Any:
    return np.random.default_rng(step).integers(0, V, N).astype(np.int32)


def like(reads: int = N) -> Any:
    """What row gradients of so many reads are like."""
    ids = jax.ShapeDtypeStruct((reads,), jnp.int32)
    return jax.eval_shape(at.grad(loss), make_params(), ids)


def deferred(**options: Any) -> Any:
    return at.deferred_adam(0.1, tables="table", **{"eps_hat": True, "max_idle": 250, **options})


def chain_with_everything() -> Any:
    average = optax.masked(at.params_ema(0.9), at.path_mask("^w$"))
    inner = optax.chain(at.by_path([("table", deferred())], at.adam(0.1)), average)
    return at.dynamic_loss_scale(at.accumulate(inner, 2, like=like()), growth_interval=2)


def rates_by_path() -> Any:
    rates = at.scale_by_path_learning_rate([("table", optax.linear_schedule(0.1, 0.0, 9))], 0.1)
    return optax.chain(at.scale_by_adam(), rates)


# Each with how its gradients come: dense, by row, or by row from what the state knows.
STATES: dict[str, tuple[Callable[[], Any], str]] = {
    "adam": (lambda: at.adam(0.1), "dense"),
    "AMSGrad in bfloat16": (lambda: at.adam(0.1, amsgrad=True, mu_dtype="bfloat16"), "dense"),
    "average": (lambda: at.adam(0.1, ema=0.9), "dense"),
    "accumulated": (lambda: at.accumulate(at.adam(0.1), 2), "dense"),
    "loss scale": (lambda: at.adam(0.1, loss_scale="dynamic"), "dense"),
    "rates by path": (rates_by_path, "dense"),
    "skipping": (lambda: at.skip_nonfinite(at.adam(0.1)), "dense"),
    "lazy": (lambda: at.lazy_adam(0.1), "rows"),
    "lazy, 8 bits": (lambda: at.lazy_adam(0.1, state_bits=8), "rows"),
    "lazy, accumulated": (lambda: at.accumulate(at.lazy_adam(0.1), 2, like=like()), "rows"),
    "deferred": (deferred, "deferred"),
    "deferred AMSGrad, decayed": (lambda: deferred(amsgrad=True, weight_decay=0.1), "deferred"),
    "everything": (chain_with_everything, "deferred"),
}


@functools.cache
def stepper(name: str) -> tuple[Any, Any]:
    """The transformation, and its jitted step: (params, state, ids) -> (params, state)."""
    factory, kind = STATES[name]
    tx = factory()

    @jax.jit
    def step(params: Any, state: Any, ids: Any) -> Any:
        if kind == "dense":
            grads = jax.grad(loss)(params, ids)
        else:
            grads = at.grad(loss, rows_from=state if kind == "deferred" else None)(params, ids)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def train(name: str, steps: range, params: Any, state: Any) -> Any:
    _, step = stepper(name)
    for number in steps:
        params, state = step(params, state, batch_of(number))
    return params, state


@functools.cache
def stopped_and_not(name: str) -> tuple[Any, Any]:
    """Parameters and state after 3 steps, in mid-cycle, and after 6."""
    params = make_params()
    stopped = train(name, range(3), params, stepper(name)[0].init(params))
    return stopped, train(name, range(3, 6), *stopped)


def through_orbax(directory: Path, saved: Any, like: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "checkpoint", saved)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return checkpointer.restore(directory / "checkpoint", abstract)


def through_flax(directory: Path, saved: Any, like: Any) -> Any:
    return serialization.from_bytes(like, serialization.to_bytes(saved))


def through_pickle(directory: Path, saved: Any, like: Any) -> Any:
    return pickle.loads(pickle.dumps(saved))


def through_numpy(directory: Path, saved: Any, like: Any) -> Any:
    np.savez(directory / "checkpoint.npz", **training_process.arrays(saved))
    arrays = dict(np.load(directory / "checkpoint.npz"))

    def leaf(key_path: Any, x: Any) -> Any:
        array = arrays[at.path_str(key_path)]
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(array))
        # NumPy keeps a dtype that is not its own, as bfloat16, as bytes.
        return jnp.asarray(array.view(x.dtype) if array.dtype.kind == "V" else array)

    return jax.tree_util.tree_map_with_path(leaf, like)


# The first tier tries those that hold the most kinds of arrays.
QUICK = ("AMSGrad in bfloat16", "lazy, accumulated", "deferred AMSGrad, decayed", "everything")


@pytest.mark.parametrize("name", helpers.in_tiers(STATES, lambda name: name in QUICK))
def test_resumed_training_is_bit_identical(name: str, tmp_path: Path) -> None:
    stopped, expected = stopped_and_not(name)
    fresh = make_params()
    fresh = (fresh, stepper(name)[0].init(fresh))
    for way in (through_orbax, through_flax, through_pickle, through_numpy):
        restored = way(tmp_path, stopped, fresh)
        at.check_state(restored, like=fresh)
        helpers.assert_bits_equal(restored, stopped)
        helpers.assert_bits_equal(train(name, range(3, 6), *restored), expected)


# ---- sharded ----


def sharding_of(mesh: Any, table_spec: Any) -> Callable[[Any], Any]:
    """An array's sharding: tables and slots as said, what is kept by row as their rows."""

    def of(x: Any) -> Any:
        spec = table_spec if x.shape == (V, D) else P(table_spec[0]) if x.shape == (V,) else P()
        return NamedSharding(mesh, spec)

    return of


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("name", ["average", "lazy, accumulated", "deferred"])
def test_a_state_is_restored_in_the_sharding_asked_for(
    name: str, kind: Any, tmp_path: Path
) -> None:
    """Whatever sharding it was saved in; and it goes on from there."""
    stopped, expected = stopped_and_not(name)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    before, after = (sharding_of(mesh, spec) for spec in (P("x", None), P(None, "y")))
    with jax.set_mesh(mesh):
        saved = jax.tree.map(lambda x: jax.device_put(x, before(x)), stopped)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "checkpoint", saved)
            checkpointer.wait_until_finished()
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=after(x)), stopped
            )
            restored = checkpointer.restore(tmp_path / "checkpoint", abstract)
        tables = [x for x in jax.tree.leaves(restored) if x.shape == (V, D)]
        assert len(tables) >= 3
        assert all(x.sharding.spec == P(None, "y") for x in tables)
        helpers.assert_bits_equal(jax.device_get(restored), jax.device_get(stopped))
    one_device = jax.tree.map(lambda x, was: jax.device_put(x, was.sharding), restored, stopped)
    helpers.assert_bits_equal(train(name, range(3, 6), *one_device), expected)


# ---- another configuration ----

A = STATES["adam"][0]
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any], list[str]]] = {
    "optimizer": (A, deferred, ["'state/idle' is missing", "'state/0' is there, expected nothing"]),
    "amsgrad": (A, lambda: at.adam(0.1, amsgrad=True), ["'state/0/nu_max' is missing"]),
    "no amsgrad": (
        lambda: deferred(amsgrad=True),
        deferred,
        ["'state/nu_max' is there, expected nothing"],
    ),
    "max_idle": (
        deferred,
        lambda: deferred(max_idle=300),
        ["'state/idle/ring/weights' is float32[251,", "max_idle was 250, is 300"],
    ),
    "mu_dtype": (
        A,
        lambda: at.adam(0.1, mu_dtype="bfloat16"),
        ["'state/0/mu/table' is float32[16,8], expected bfloat16[16,8]"],
    ),
    "lazy": (
        STATES["lazy"][0],
        A,
        ["'state/0' is missing", "'state/inner_state' is there, expected nothing"],
    ),
    "every": (
        STATES["lazy, accumulated"][0],
        lambda: at.accumulate(at.lazy_adam(0.1), 3, like=like()),
        ["'state/acc/table/values' is float32[8,8], expected float32[12,8]"],
    ),
    "rows a step": (
        STATES["lazy, accumulated"][0],
        lambda: at.accumulate(at.lazy_adam(0.1), 2, like=like(5)),
        ["'state/acc/table/indices' is uint32[8,2], expected uint32[10,2]"],
    ),
    "average": (A, lambda: at.adam(0.1, ema=0.9), ["'state/2' is missing"]),
    "loss scale": (
        A,
        lambda: at.adam(0.1, loss_scale="dynamic"),
        ["'state/scale' is missing, expected float32[]"],
    ),
    "weight decay": (
        deferred,
        lambda: deferred(weight_decay=0.1),
        ["'state/idle_decayed' is missing", "'state/idle' is there"],
    ),
}


def as_saved(params: Any, tx: Any) -> Any:
    return {"params": params, "state": tx.init(params)}


def metadata_of(directory: Path, saved: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, saved)
        checkpointer.wait_until_finished()
        return checkpointer.metadata(directory).item_metadata.tree


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_configuration_is_refused_by_name(change: str, tmp_path: Path) -> None:
    """What has been restored, and before it is, from what Orbax says of the checkpoint."""
    before, after, differences = CHANGES[change]
    saved = as_saved(make_params(), before())
    metadata = metadata_of(tmp_path / "checkpoint", saved)
    at.check_state(metadata, like=saved)
    for state in (saved, metadata):
        now = as_saved(make_params(), after())
        for like in (now, jax.eval_shape(lambda x=now: x)):
            with pytest.raises(ValueError, match="not as this configuration makes it") as error:
                at.check_state(state, like=like)
            for difference in differences:
                assert difference in str(error.value)


def test_a_table_of_another_size_is_named_with_its_slots() -> None:
    tx = at.lazy_adam(0.1)
    with pytest.raises(ValueError) as error:
        at.check_state(as_saved(make_params(), tx), like=as_saved(make_params(V + 1), tx))
    assert str(error.value).splitlines()[1:] == [
        f"  {path!r} is float32[16,8], expected float32[17,8]"
        for path in ("params/table", "state/inner_state/0/mu/table", "state/inner_state/0/nu/table")
    ]


@pytest.mark.parametrize(
    ("option", "difference"),
    [
        ({"b1": 0.905}, "'idle/ring/scalars/log_b1': b1 was 0.9, is 0.905"),
        ({"b2": 0.9991}, "'idle/ring/scalars/log_b2': b2 was 0.999, is 0.9991"),
        ({"eps": 1e-7}, "'idle/ring/scalars/eps': eps was 1e-08, is 1e-07"),
    ],
)
def test_a_rule_that_idle_rows_are_not_owed_by_is_named(option: Any, difference: str) -> None:
    """No shape shows it."""
    params = make_params()
    state, like = deferred().init(params), deferred(**option).init(params)
    with pytest.raises(ValueError) as error:
        at.check_state(state, like=like)
    assert difference in str(error.value)
    with pytest.raises(ValueError, match=difference.split(": ")[1]):
        at.check_state(state, like=jax.eval_shape(lambda: like))
    at.check_state(state, like=jax.eval_shape(lambda: state))
    at.check_state(state, like=deferred(max_idle=250).init(params))


def test_a_state_can_be_checked_where_it_is_traced() -> None:
    tx, params = deferred(), make_params()

    @jax.jit
    def check(state: Any) -> Any:
        at.check_state(state, like=tx.init(params))
        return state.count

    check(tx.init(params))
    with pytest.raises(ValueError, match="max_idle was 300, is 250"):
        check(deferred(max_idle=300).init(params))


def test_many_differences_are_counted_and_not_all_listed() -> None:
    params = {f"layer_{i}": jnp.zeros(2) for i in range(100)}
    low = at.adam(mu_dtype="bfloat16").init(params)
    with pytest.raises(ValueError, match="and 70 more$") as error:
        at.check_state(low, like=at.adam().init(params))
    assert len(str(error.value).splitlines()) == 32


# ---- killed ----


def run_to_the_end(directory: Path, steps: int, environment: Any) -> None:
    subprocess.run(command(directory, steps), env=environment, check=True, capture_output=True)


def command(directory: Path, steps: int) -> list[str]:
    return [sys.executable, training_process.__file__, str(directory), str(steps)]


def run_and_kill(directory: Path, steps: int, environment: Any, rng: Any) -> tuple[int, int]:
    """Kills the process in one of its first steps, or a little after. Returns where it started and
    the last step it was seen to take."""
    with subprocess.Popen(
        command(directory, steps), env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        start = int(process.stdout.readline().removeprefix("from "))
        step = start
        for _ in range(rng.integers(1, 12)):
            step = int(process.stdout.readline().removeprefix("step "))
        time.sleep(rng.uniform(0.0, 0.02))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return start, step


@pytest.mark.long
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_process_killed_often_ends_as_if_it_had_not_been(kills: int, tmp_path: Path) -> None:
    """`training_process.py` saves with Orbax in the background; the kill may come at any time."""
    steps, rng = 12 * kills, np.random.default_rng(0)
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run_to_the_end(undisturbed, steps, environment)
    lives = [run_and_kill(killed, steps, environment, rng) for _ in range(kills)]
    run_to_the_end(killed, steps, environment)
    starts, ends = zip(*lives, strict=True)
    assert list(starts) == sorted(starts) and len(set(starts)) > kills // 4
    assert any(start < end for start, end in zip(starts[1:], ends, strict=False))  # work was lost
    results = [dict(np.load(path / "result.npz")) for path in (undisturbed, killed)]
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    for path, expected in results[0].items():
        assert results[1][path].tobytes() == expected.tobytes(), path
    assert results[0]["state/skipped"] > 0 and results[0]["params/w"].std() > 0


def test_a_restored_tree_given_as_like_is_told() -> None:
    state = at.adam().init({"w": jnp.zeros(3)})
    restored = {"0": {"mu": {"w": jnp.zeros(3)}}}
    order = r"check_state\(restored, like=tx.init\(params\)\)"
    with pytest.raises(ValueError, match=order):
        at.check_state(state, like=restored)
    with pytest.raises(ValueError, match="is missing") as error:
        at.check_state(restored, like=state)
    assert "tx.init" not in str(error.value)
