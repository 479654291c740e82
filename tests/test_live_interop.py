"""States moved out of running PyTorch, Keras and TensorFlow optimizers, and back into them.

50 steps there; then 50 more both there and here, from the state that is moved. Another 50 there
from the state moved back. Each test runs where its system is installed.
"""

import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, assert_close, normal

import adam_transforms as at
from adam_transforms._transforms.ema import track_params_ema
from adam_transforms.interop import keras, tf1, tf2, torch

# Keras and PyTorch know nothing of the copy keyword that NumPy 2 has brought.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

STEPS = 50
SHAPES = {"hidden/kernel": (4, 8), "hidden/bias": (8,), "out/kernel": (8, 1), "out/bias": (1,)}
_RNG = np.random.default_rng(0)
_X = _RNG.standard_normal((64, 4)).astype(np.float32)
_Y = np.sin(_X.sum(axis=1, keepdims=True)).astype(np.float32)


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        name: (0.5 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["hidden/kernel"] + params["hidden/bias"][None])
    return jnp.mean((hidden @ params["out/kernel"] + params["out/bias"][None] - y) ** 2)


_grads = jax.jit(jax.grad(loss))


def gradients(params: Any, step: int) -> dict[str, np.ndarray]:
    """Of a network on the batch of this step: the same function for both systems, so that only
    the optimizers differ."""
    batch = np.arange(16) + 16 * (step % 4)
    return jax.tree.map(np.asarray, _grads(dict(params), _X[batch], _Y[batch]))


def train_here(tx: Any, params: Any, state: Any, scale: float = 1.0) -> tuple[Any, Any]:
    @jax.jit
    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return at.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    for t in range(STEPS, 2 * STEPS):
        grads = jax.tree.map(lambda g: g * np.float32(scale), gradients(params, t))
        params, state = step(grads, params, state)
    return params, state


def assert_same_run(here: Any, there: Any, before: Any) -> None:
    """Close after a way that is long in comparison."""
    assert_close(dict(here), dict(there), rtol=2e-5, atol=2e-5)
    moved = [np.max(np.abs(there[name] - before[name])) for name in SHAPES]
    assert min(moved) > 0.005


# PyTorch


def torch_rename(name: str) -> Any:
    return (name.replace("kernel", "weight"), (1, 0)) if name.endswith("kernel") else name


TORCH_NAMES = ["hidden/weight", "hidden/bias", "out/weight", "out/bias"]


def as_numpy(x: Any) -> Any:
    return x.numpy() if hasattr(x, "numpy") else x


def l2(decay: float, tx: Any) -> Any:
    return optax.chain(optax.add_decayed_weights(decay), tx)


def stepped(count: Any) -> jax.Array:
    return jnp.where(count < 75, 0.01, 0.001)


TORCH: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "Adam": ("Adam", {"lr": 0.01}, lambda: at.adam(0.01)),
    "Optax's": ("Adam", {"lr": 0.01}, lambda: optax.adam(0.01)),
    "amsgrad": (
        "Adam",
        {"lr": 0.01, "betas": (0.8, 0.95), "amsgrad": True, "weight_decay": 0.1},
        lambda: l2(0.1, at.adam(0.01, 0.8, 0.95, amsgrad=True)),
    ),
    "AdamW": (
        "AdamW",
        {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "foreach": True},
        lambda: at.adamw(0.01, weight_decay=0.1, amsgrad=True),
    ),
    "AdamW's schedule": (
        "AdamW",
        {"lr": 0.01},
        lambda: at.adamw(stepped, weight_decay=0.01),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_pytorch_goes_on_here_and_back_there(name, relaxed_promotion):
    pytorch = pytest.importorskip("torch")
    kind, options, make_tx = TORCH[name]
    params = {
        n: pytorch.nn.Parameter(pytorch.from_numpy(p.T.copy() if p.ndim > 1 else p))
        for n, p in start().items()
    }
    optimizer = getattr(pytorch.optim, kind)(list(params.values()), **options)

    def here() -> dict[str, np.ndarray]:
        return {n: p.detach().numpy().T.copy() for n, p in params.items()}

    def train_there(steps):
        for t in steps:
            if name == "AdamW's schedule":
                optimizer.param_groups[0]["lr"] = 0.01 if t < 75 else 0.001
            for n, g in gradients(here(), t).items():
                params[n].grad = pytorch.from_numpy(g.T.copy())
            optimizer.step()

    train_there(range(STEPS))
    before, tx = here(), make_tx()
    state_dict = optimizer.state_dict()
    state = torch.state_from(state_dict, before, tx, TORCH_NAMES, rename=torch_rename)
    out: dict[str, Any] = {"rename": torch_rename, "param_groups": state_dict["param_groups"]}
    back = torch.state_to(state, before, TORCH_NAMES, **out)
    assert_bits_equal(back["state"], jax.tree.map(as_numpy, state_dict["state"]))

    ours, state = train_here(tx, before, state)
    train_there(range(STEPS, 2 * STEPS))
    assert_same_run(ours, here(), before)

    def as_tensor(x):
        return pytorch.from_numpy(x) if isinstance(x, np.ndarray) else x

    back = jax.tree.map(as_tensor, torch.state_to(state, ours, TORCH_NAMES, **out))
    expected = here()
    for n in params:  # from the same parameters, so that only the states can differ
        params[n].data = pytorch.from_numpy(np.array(expected[n]).T.copy())
    train_there(range(2 * STEPS, 2 * STEPS + 5))
    expected_after = here()
    for n in params:
        params[n].data = pytorch.from_numpy(np.array(expected[n]).T.copy())
    optimizer.load_state_dict(back)
    train_there(range(2 * STEPS, 2 * STEPS + 5))
    assert_close(here(), expected_after, rtol=2e-5, atol=2e-5)


def test_pytorchs_sparse_adam_goes_on_here():
    pytorch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    table = pytorch.nn.Parameter(pytorch.from_numpy(rng.standard_normal((9, 3)).astype(np.float32)))
    optimizer = pytorch.optim.SparseAdam([table], lr=0.01)
    ids = rng.integers(0, 9, (2 * STEPS, 4))
    rows = rng.standard_normal((2 * STEPS, 4, 3)).astype(np.float32)

    def train_there(steps):
        for t in steps:
            indices, values = pytorch.from_numpy(ids[t][None]), pytorch.from_numpy(rows[t])
            table.grad = pytorch.sparse_coo_tensor(
                indices, values, table.shape, check_invariants=False
            )
            optimizer.step()

    train_there(range(STEPS))
    tx = at.lazy_adam(0.01, eps_hat=True)
    params = [jnp.array(table.detach().numpy(), copy=True)]
    state_dict = optimizer.state_dict()
    state = torch.state_from(state_dict, params, tx)
    back = torch.state_to(state, params, param_groups=state_dict["param_groups"])
    assert_bits_equal(back, jax.tree.map(as_numpy, state_dict))
    train_there(range(STEPS, 2 * STEPS))
    step = jax.jit(tx.update)
    for t in range(STEPS, 2 * STEPS):
        updates, state = step([at.SparseRows(ids[t], rows[t], 9)], state, params)
        params = at.apply_updates(params, updates)
    assert_close(params[0], table.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_pytorchs_adamw_beside_sparse_adam_goes_on_here_and_back_there():
    pytorch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    start = {"table": rng.standard_normal((9, 3)), "w": rng.standard_normal((3, 2))}
    there = {
        n: pytorch.nn.Parameter(pytorch.tensor(x, dtype=pytorch.float32)) for n, x in start.items()
    }
    optimizers = [
        pytorch.optim.AdamW([there["w"]], lr=0.01, weight_decay=0.1),
        pytorch.optim.SparseAdam([there["table"]], lr=0.02),
    ]
    names = [["w"], ["table"]]
    ids = rng.integers(0, 9, (2 * STEPS + 5, 4))
    rows = rng.standard_normal((2 * STEPS + 5, 4, 3)).astype(np.float32)
    dense = rng.standard_normal((2 * STEPS + 5, 3, 2)).astype(np.float32)

    def train_there(steps):
        for t in steps:
            there["table"].grad = pytorch.sparse_coo_tensor(
                pytorch.from_numpy(ids[t][None]),
                pytorch.from_numpy(rows[t]),
                (9, 3),
                check_invariants=False,
            )
            there["w"].grad = pytorch.from_numpy(dense[t])
            for optimizer in optimizers:
                optimizer.step()

    def here():
        return {n: jnp.array(p.detach().numpy(), copy=True) for n, p in there.items()}

    train_there(range(STEPS))
    params = here()
    decays = at.adamw(0.01, weight_decay=0.1)
    tx = at.lazy(at.by_path([("table", at.adam(0.02, eps_hat=True))], default=decays))
    dicts = [optimizer.state_dict() for optimizer in optimizers]
    state = torch.state_from(list(zip(dicts, names, strict=True)), params, tx)
    groups = [one["param_groups"] for one in dicts]
    back = torch.state_to(state, params, names, param_groups=groups)
    assert_bits_equal([one for one, _ in back], jax.tree.map(as_numpy, dicts))

    train_there(range(STEPS, 2 * STEPS))
    step = jax.jit(tx.update)
    for t in range(STEPS, 2 * STEPS):
        grads = {"table": at.SparseRows(ids[t], rows[t], 9), "w": dense[t]}
        updates, state = step(grads, state, params)
        params = at.apply_updates(params, updates)
    assert_close(params, here(), rtol=1e-5, atol=1e-5)

    def as_tensor(x):
        return pytorch.from_numpy(x) if isinstance(x, np.ndarray) else x

    with pytorch.no_grad():
        before = {n: p.clone() for n, p in there.items()}
    later = range(2 * STEPS, 2 * STEPS + 5)
    train_there(later)
    expected = here()
    for n, p in before.items():
        there[n].data = p
    pairs = torch.state_to(state, params, names, param_groups=groups)
    for optimizer, (one, _) in zip(optimizers, pairs, strict=True):
        optimizer.load_state_dict(jax.tree.map(as_tensor, one))
    train_there(later)
    assert_close(here(), expected, rtol=2e-5, atol=2e-5)


def test_pytorchs_bfloat16_comes_and_goes():
    pytorch = pytest.importorskip("torch")
    p = pytorch.nn.Parameter(pytorch.ones(5, dtype=pytorch.bfloat16))
    optimizer = pytorch.optim.Adam([p])
    p.grad = pytorch.linspace(0.1, 1.0, 5).bfloat16()
    optimizer.step()
    params = [jnp.ones(5, jnp.bfloat16)]
    state: Any = torch.state_from(optimizer.state_dict(), params, optax.adam(1e-3))
    assert state[0].nu[0].dtype == jnp.bfloat16
    theirs = optimizer.state_dict()["state"][0]
    back = torch.state_to(state, params)["state"][0]
    for key in ("exp_avg", "exp_avg_sq"):
        np.testing.assert_array_equal(back[key].astype(np.float32), theirs[key].float().numpy())
        assert_bits_equal(back[key], np.asarray(back[key]))


def test_pytorchs_rule_for_complex_parameters_is_that_of_their_parts(relaxed_promotion):
    pytorch = pytest.importorskip("torch")
    start = normal(0, 3, dtype=np.complex64)
    z = pytorch.nn.Parameter(pytorch.from_numpy(start.copy()))
    optimizer = pytorch.optim.Adam([z], lr=0.1)
    tx = optax.contrib.split_real_and_imaginary(at.adam(0.1))
    params = jnp.asarray(start)
    state = tx.init(params)
    for _ in range(3):
        optimizer.zero_grad()
        (z**3).imag.sum().backward()
        optimizer.step()
        grads = jnp.conj(jax.grad(lambda z: jnp.sum(jnp.imag(z**3)))(params))
        updates, state = tx.update(grads, state, params)
        params = at.apply_updates(params, updates)
    assert_close(params, z.detach().numpy(), rtol=1e-5, atol=1e-6)


# Keras


def keras3() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for module in ("tensorflow", "keras"):
        pytest.importorskip(module)
    import keras  # pyright: ignore[reportMissingImports]

    return keras


def stored(store: Any) -> dict[str, np.ndarray]:
    """As NumPy arrays; Keras's integers are int64 on TensorFlow, int32 elsewhere."""
    arrays = {key: np.asarray(value) for key, value in store.items()}
    return {key: x.astype(np.int64) if x.dtype == np.int32 else x for key, x in arrays.items()}


def ema_of_calls(tx: Any, momentum: float, overwrite: int, k: int) -> Any:
    """As Keras averages: with every call, from a copy after the first k of them."""

    def momentum_at(count: Any) -> jax.Array:
        return jnp.where(count < k, 0.0, momentum)

    return optax.chain(
        tx, track_params_ema(momentum_at, lambda count: (count // k + 1) % overwrite == 0)
    )


KERAS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "default": ({}, lambda: at.adam(0.01, eps=1e-7, eps_hat=True)),
    "amsgrad": (
        {"amsgrad": True, "beta_2": 0.95, "weight_decay": 0.1, "global_clipnorm": 0.5},
        lambda: at.adam(
            *(0.01, 0.9, 0.95, 1e-7),
            eps_hat=True,
            amsgrad=True,
            weight_decay=0.1,
            clip_global_norm=0.5,
        ),
    ),
    "ema": (
        {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 7},
        lambda: at.adam(0.01, eps=1e-7, eps_hat=True, ema=0.9, ema_overwrite_every=7),
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 4, "amsgrad": True},
        lambda: at.adam(0.01, eps=1e-7, eps_hat=True, amsgrad=True, accumulate_every=4),
    ),
    "ema and accumulation": (
        {
            "gradient_accumulation_steps": 4,
            "use_ema": True,
            "ema_momentum": 0.9,
            "ema_overwrite_frequency": 5,
        },
        lambda: ema_of_calls(at.adam(0.01, eps=1e-7, eps_hat=True, accumulate_every=4), 0.9, 5, 4),
    ),
    "loss scale": ({}, lambda: at.adam(0.01, eps=1e-7, eps_hat=True, loss_scale="dynamic")),
    "schedule": (
        {},
        lambda: at.adam(optax.exponential_decay(0.01, 40, 0.5), eps=1e-7, eps_hat=True),
    ),
}


@pytest.mark.parametrize("name", KERAS)
def test_keras_goes_on_here_and_back_there(name, relaxed_promotion):
    k = keras3()
    options, make_tx = KERAS[name]
    rate = 0.01
    if name == "schedule":
        rate = k.optimizers.schedules.ExponentialDecay(0.01, 40, 0.5)
    every = options.get("gradient_accumulation_steps")
    scale = 2.0**15 if name == "loss scale" else 1.0

    def make(values):
        variables = [k.Variable(value) for value in values.values()]
        optimizer = k.optimizers.Adam(learning_rate=rate, **options)
        if name == "loss scale":
            optimizer = k.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(variables)
        return variables, optimizer

    def values_of(variables):
        return {n: np.array(v.numpy()) for n, v in zip(SHAPES, variables, strict=True)}

    def train_there(variables, optimizer, steps):
        for t in steps:
            by_name = gradients(values_of(variables), t)
            grads = [k.ops.convert_to_tensor(by_name[n] * np.float32(scale)) for n in SHAPES]
            optimizer.apply(grads, variables)

    variables, optimizer = make(start())
    train_there(variables, optimizer, range(STEPS))
    before, tx = values_of(variables), make_tx()
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    state = keras.state_from(store, before, tx, list(SHAPES), every=every)
    out: dict[str, Any] = {"every": every, "learning_rate": None if name == "schedule" else 0.01}
    back = keras.state_to(state, before, list(SHAPES), **out)
    assert_bits_equal(back, stored(store))

    ours, state = train_here(tx, before, state, scale)
    train_there(variables, optimizer, range(STEPS, 2 * STEPS))
    assert_same_run(ours, values_of(variables), before)

    returned, again = make(values_of(variables))
    again.load_own_variables(keras.state_to(state, ours, list(SHAPES), **out))
    later = range(2 * STEPS, 2 * STEPS + 5)
    train_there(variables, optimizer, later)
    train_there(returned, again, later)
    assert_close(values_of(returned), values_of(variables), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("file", ["model.weights.h5", "model.keras"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keras_files_are_read(tmp_path, file, scaled, dtype, relaxed_promotion):
    k = keras3()
    pytest.importorskip("h5py")
    layers = [k.layers.Input((4,)), *(k.layers.Dense(size, dtype=dtype) for size in (8, 7, 1))]
    model = k.Sequential(layers)
    optimizer = k.optimizers.Adam(0.01, amsgrad=True)
    if scaled:
        optimizer = k.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, "mse")
    model.fit(_X, _Y, batch_size=16, epochs=2, verbose=0)
    save = model.save if file.endswith(".keras") else model.save_weights
    save(tmp_path / file)

    names = [v.path for v in model.trainable_variables]
    params = {v.path: jnp.zeros(v.shape, dtype) for v in model.trainable_variables}
    tx = at.adam(amsgrad=True, loss_scale="dynamic" if scaled else None, nu_dtype=dtype)
    state = keras.state_from(tmp_path / file, params, tx, names)
    store: dict[str, Any] = {}
    optimizer.save_own_variables(store)
    assert_bits_equal(state, keras.state_from(store, params, tx, names))
    assert int(optax.tree.get_all_with_path(state, "mu")[0][1][names[0]].size) == 32
    back = keras.state_to(state, params, names, learning_rate=0.01)
    assert_bits_equal(back, stored(store))


# TensorFlow 1


def test_tensorflow_1_goes_on_here_and_back_there(tmp_path):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    tf = pytest.importorskip("tensorflow")
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        values = start()
        variables = {n: v1.get_variable(n, initializer=value) for n, value in values.items()}
        feeds = {n: v1.placeholder(tf.float32, value.shape) for n, value in values.items()}
        optimizer = v1.train.AdamOptimizer(0.01, epsilon=1e-6)
        step = optimizer.apply_gradients(
            [(feeds[n], variables[n]) for n in variables],
            global_step=v1.train.get_or_create_global_step(),
        )
        session.run(v1.global_variables_initializer())
        saver = v1.train.Saver()

        def train_there(steps):
            for t in steps:
                grads = gradients(session.run(variables), t)
                session.run(step, {feeds[n]: g for n, g in grads.items()})

        def checkpoint(name):
            reader = tf.train.load_checkpoint(saver.save(session, str(tmp_path / name)))
            return {n: reader.get_tensor(n) for n in reader.get_variable_to_shape_map()}

        train_there(range(STEPS))
        arrays, before = checkpoint("first"), session.run(variables)
        tx = at.adam(0.01, eps=1e-6, eps_hat=True)
        state = tf1.state_from(arrays, before, tx)
        assert int(optax.tree.get(state, "count")) == STEPS
        back = tf1.state_to(state, before)
        assert arrays.keys() - back.keys() == {*SHAPES, "global_step"}
        assert_bits_equal(back, {n: np.asarray(arrays[n]) for n in back})

        ours, state = train_here(tx, before, state)
        train_there(range(STEPS, 2 * STEPS))
        after = session.run(variables)
        assert_same_run(ours, after, before)

        later = range(2 * STEPS, 2 * STEPS + 5)
        train_there(later)
        expected = session.run(variables)
        by_name = {v.op.name: v for v in v1.global_variables()}
        for n, value in {**after, **tf1.state_to(state, ours)}.items():
            by_name[n].load(value, session)
        train_there(later)
        assert_close(session.run(variables), expected, rtol=2e-5, atol=2e-5)


# Files of Keras 2 and of TensorFlow 2


@pytest.mark.filterwarnings("ignore")  # Keras advises its newer format
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["legacy", "later", "keras3"])
def test_models_and_checkpoints_of_tensorflow_2_are_read(tmp_path, kind, scaled):
    tf: Any = pytest.importorskip("tensorflow")
    k: Any = keras3() if kind == "keras3" else pytest.importorskip("tf_keras")
    optimizers = k.optimizers.legacy if kind == "legacy" else k.optimizers
    optimizer = optimizers.Adam(0.01, amsgrad=True)
    if scaled:
        scalers = k.optimizers if kind == "keras3" else k.mixed_precision
        optimizer = scalers.LossScaleOptimizer(optimizer)
    layers = ("hidden", "out")
    model = k.Sequential([k.layers.Input((4,)), *(k.layers.Dense(8, name=x) for x in layers)])
    model.compile(optimizer, "mse")
    model.fit(_X, np.repeat(_Y, 8, axis=1), batch_size=16, epochs=2, verbose=0)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    variables: Any = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
    weights = [np.asarray(v.numpy()) for v in variables]
    names = [f"{name}/{v}" for name in layers for v in ("kernel", "bias")]
    shapes = dict(zip(names, [(4, 8), (8,), (8, 8), (8,)], strict=True))
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    plain = at.adam(amsgrad=True)
    expected = keras.state_from(weights, params, plain, names, legacy=kind == "legacy")
    assert int(optax.tree.get(expected, "count")) == 8

    def rename(name):
        for i, layer in enumerate(layers):
            name = name.replace(layer, f"model/layer_with_weights-{i}")
        return name

    saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / "c"))
    reader = tf.train.load_checkpoint(saved)
    arrays = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    tx = at.adam(amsgrad=True, loss_scale="dynamic" if scaled else None)
    options: Any = {"rename": rename} if kind == "legacy" else {}
    state = tf2.state_from(arrays, params, tx, names, **options)
    for slot in ("count", "mu", "nu", "nu_max"):
        assert_bits_equal(optax.tree.get(state, slot), optax.tree.get(expected, slot))
    if scaled:
        scale = [x for key, x in arrays.items() if re.search("(current_loss|dynamic)_scale", key)]
        assert [optax.tree.get(state, "scale")] == scale

    model.save(tmp_path / "model.h5")
    if kind == "keras3":  # whose file has the scale too
        assert_bits_equal(keras.state_from(tmp_path / "model.h5", params, tx, names), state)
    else:
        assert_bits_equal(keras.state_from(tmp_path / "model.h5", params, plain, names), expected)
