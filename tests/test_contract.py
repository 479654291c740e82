"""What holds for every public transformation, each promise tried on each of them."""

import contextlib
import functools
import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, in_tiers, types, x64
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adam_transforms as at


def decaying(start: float) -> optax.Schedule:
    return lambda count: start * 0.9 ** jnp.asarray(count, jnp.float32)


ONE_DEVICE = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
TRANSFORMATIONS = {
    "scale_by_adam": lambda: at.scale_by_adam(),
    "scale_by_adam nesterov": lambda: at.scale_by_adam(nesterov=True, eps_root=1e-6),
    "scale_by_adam by row": lambda: at.scale_by_adam(nu_per="row"),
    "scale_by_adam eps_hat": lambda: at.scale_by_adam(eps_hat=True, mu_dtype=None),
    "scale_by_adam array": lambda: at.scale_by_adam(jnp.float32(0.9), jnp.float32(0.99)),
    "scale_by_adam scheduled": lambda: at.scale_by_adam(
        b1=decaying(0.9), b2=0.99, eps=decaying(1e-6), nesterov=True
    ),
    "scale_by_amsgrad corrected": lambda: at.scale_by_amsgrad(),
    "scale_by_amsgrad raw": lambda: at.scale_by_amsgrad(max_of="raw", eps_hat=True),
    "scale_by_amsgrad scheduled": lambda: at.scale_by_amsgrad(b2=decaying(0.99)),
    "compress_moments": lambda: at.compress_moments(at.scale_by_adam()),
    "compress_moments AMSGrad": lambda: at.compress_moments(
        at.scale_by_amsgrad(), {"mu": 16, "nu": 8}
    ),
    "compress_moments 16 bits": lambda: at.compress_moments(at.scale_by_adam(), 16),
    "clip_by_value": lambda: at.clip_by_value(0.5),
    "clip_by_norm": lambda: at.clip_by_norm(0.5),
    "clip_by_global_norm": lambda: at.clip_by_global_norm(0.5),
    "max_row_norm": lambda: at.max_row_norm(0.5),
    "params_ema": lambda: at.params_ema(0.9),
    "params_ema from params": lambda: at.params_ema(0.9, initial="params"),
    "params_ema overwriting": lambda: at.params_ema(decaying(0.9), overwrite_every=2),
    "params_ema debiased": lambda: at.params_ema(0.9, debias=True, overwrite_every=2),
    "accumulate": lambda: at.accumulate(at.scale_by_adam(), every=2),
    "accumulate scheduled": lambda: at.accumulate(at.scale_by_adam(), lambda cycles: 2),
    "static_loss_scale": lambda: at.static_loss_scale(at.scale_by_adam(), 8.0),
    "dynamic_loss_scale": lambda: at.dynamic_loss_scale(at.scale_by_adam(), 8.0, 2),
    "skip_nonfinite": lambda: at.skip_nonfinite(at.scale_by_adam()),
    "skip_nonfinite limited": lambda: at.skip_nonfinite(at.scale_by_adam(), max_consecutive=2),
    "wrapped": lambda: at.dynamic_loss_scale(
        at.accumulate(at.skip_nonfinite(at.params_ema(0.9)), every=2)
    ),
    "scale_by_learning_rate": lambda: at.scale_by_learning_rate(decaying(0.1)),
    "scale_by_path_learning_rate": lambda: at.scale_by_path_learning_rate(
        [("kernel", 0.1)], decaying(0.2)
    ),
    "lazy": lambda: at.lazy(at.scale_by_adam(), tables=()),
    "by_path": lambda: at.by_path([("kernel", at.scale_by_adam())], at.clip_by_norm(1.0)),
    "adam": lambda: at.adam(decaying(0.1)),
    "adam raw AMSGrad": lambda: at.adam(amsgrad=True, eps_hat=True),
    "adam with everything": lambda: at.adam(
        0.1,
        nesterov=True,
        weight_decay=0.1,
        weight_decay_mask=at.path_mask("kernel"),
        clip_global_norm=1.0,
        ema=0.9,
        ema_overwrite_every=2,
        accumulate_every=2,
        loss_scale="dynamic",
    ),
    "adamw": lambda: at.adamw(0.1, loss_scale=8.0, clip_norm=1.0),
    "deferred_adam": lambda: at.deferred_adam(
        decaying(0.1),
        tables=lambda path, leaf: "kernel" in path and not jnp.iscomplexobj(leaf),
        amsgrad=True,
        weight_decay=0.1,
        max_idle=300,
    ),
    "lazy_adam": lambda: at.lazy_adam(
        0.1, amsgrad=True, accumulate_every=2, weight_decay=0.1, tables=()
    ),
    "freeze_rows": lambda: at.freeze_rows(at.scale_by_adam(), {"kernel": 0}),
    "master_weights": lambda: at.master_weights(at.scale_by_adam()),
    "shard_slots": lambda: at.shard_slots(at.scale_by_adam(), ONE_DEVICE),
}
# These chain Optax's scale_by_learning_rate, schedules or decay, which promote implicitly.
OPTAX_INSIDE = ("adam", "adamw", "lazy_adam", "scale_by_learning_rate")
# These run a gradient through no arithmetic of their own.
KEEPS_GRADIENT_DTYPE = ("clip", "scale_by_learning", "scale_by_path", "params_ema", "wrapped")
# What it adds to a parameter below float32 that one does not hold.
UPDATES_IN_FLOAT32 = ("master_weights",)
# Whose parameters are to be on it.
HAS_A_MESH = ("shard_slots",)
# Which refuse complex parameters.
REAL_ONLY = ("compress_moments",)

# The first tier tries one of each,
VARIANTS = (
    "scale_by_adam nesterov",
    "scale_by_adam array",
    "scale_by_adam by row",
    "scale_by_adam scheduled",
    "scale_by_amsgrad raw",
    "scale_by_amsgrad scheduled",
    "compress_moments AMSGrad",
    "compress_moments 16 bits",
    "params_ema overwriting",
    "accumulate scheduled",
    "skip_nonfinite limited",
    "params_ema from params",
    "adam raw AMSGrad",
    "adam with everything",
)
# and where that takes a compiled step, one of each kind.
OF_A_KIND = (
    "scale_by_adam eps_hat",
    "clip_by_value",
    "clip_by_norm",
    "params_ema debiased",
    "static_loss_scale",
    "skip_nonfinite",
    "wrapped",
    "by_path",
    "adamw",
    "lazy_adam",
    "shard_slots",
)

every_transformation = pytest.mark.parametrize(
    "name", in_tiers(TRANSFORMATIONS, lambda name: name not in VARIANTS)
)
every_kind = pytest.mark.parametrize(
    "name", in_tiers(TRANSFORMATIONS, lambda name: name not in VARIANTS + OF_A_KIND)
)


@pytest.fixture
def tx(name: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    if name.startswith(OPTAX_INSIDE):
        request.getfixturevalue("relaxed_promotion")
    with jax.set_mesh(ONE_DEVICE) if name in HAS_A_MESH else contextlib.nullcontext():
        yield made(name)


def test_every_public_transformation_is_tried() -> None:
    functions = {name: getattr(at, name) for name in at.__all__}
    factories = {
        name
        for name, function in functions.items()
        if inspect.isfunction(function)
        and inspect.signature(function, eval_str=True).return_annotation
        is optax.GradientTransformationExtraArgs
    }
    assert factories == {name.split()[0] for name in TRANSFORMATIONS} - {"wrapped"}


@functools.cache
def made(name: str) -> Any:
    """One for all tests, so that `jax.jit(tx.update)` is traced and compiled once."""
    return TRANSFORMATIONS[name]()


def random_tree(seed: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A kernel, a bias and a 0-d leaf, the values of which every dtype represents."""
    generator = np.random.default_rng(seed)

    def leaf(*shape: int) -> jax.Array:
        values = generator.integers(-64, 65, shape) / 32
        if jnp.issubdtype(dtype, jnp.complexfloating):
            values = values + 1j * generator.integers(-64, 65, shape) / 32
        return jnp.asarray(values, dtype)

    return {"dense": {"kernel": leaf(4, 3), "bias": leaf(3)}, "scale": leaf()}


def run(tx: Any, params: Any, gradients: list[Any], state: Any = None, **extra: Any) -> Any:
    """Parameters and state after a jitted step for each of `gradients`."""
    state = tx.init(params) if state is None else state
    step = jax.jit(tx.update)
    for g in gradients:
        updates, state = step(g, state, params, **extra)
        params = at.apply_updates(params, updates)
    return params, state


@every_transformation
def test_returns_extra_args_transformation_with_arrays_for_state(tx: Any) -> None:
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(random_tree(0))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@every_kind
def test_jitted_equals_eager(tx: Any) -> None:
    params = random_tree(0)
    eager_params, eager_state = params, tx.init(params)
    for seed in range(1, 4):
        updates, eager_state = tx.update(random_tree(seed), eager_state, eager_params)
        eager_params = at.apply_updates(eager_params, updates)
    jitted = run(tx, params, [random_tree(seed) for seed in range(1, 4)])
    chex.assert_trees_all_close(jitted, (eager_params, eager_state), rtol=5e-6, atol=1e-6)


@every_kind
def test_second_step_does_not_retrace(tx: Any) -> None:
    traces = 0

    @jax.jit
    def update(*arguments: Any) -> Any:
        nonlocal traces
        traces += 1
        return tx.update(*arguments)

    params = random_tree(0)
    state = tx.init(params)
    for seed in range(1, 5):
        updates, state = update(random_tree(seed), state, params)
        params = at.apply_updates(params, updates)
    assert traces == 1


REAL = ("float16", "bfloat16", "float32", "float64")
DTYPES = [(p, g) for p in REAL for g in REAL] + [("complex64", "complex64")]


# Each dtype on either side.
QUICK_DTYPES = [
    ("float16", "float64"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
    ("float64", "float16"),
    ("complex64", "complex64"),
]


@pytest.mark.parametrize(
    ("param_dtype", "gradient_dtype"), in_tiers(DTYPES, lambda *pair: pair in QUICK_DTYPES)
)
@every_transformation
def test_state_is_a_scan_carry_for_every_mix_of_dtypes(
    name: str, tx: Any, param_dtype: str, gradient_dtype: str
) -> None:
    with x64():
        params = random_tree(0, param_dtype)
        if name.startswith(REAL_ONLY) and param_dtype == "complex64":
            with pytest.raises(TypeError, match="'dense/bias' is complex"):
                tx.init(params)
            return
        gradients = jax.tree.map(
            lambda *g: jnp.stack(g), *(random_tree(seed, gradient_dtype) for seed in (1, 2, 3))
        )

        def step(carry: Any, g: Any) -> Any:
            params, state = carry
            updates, new_state = tx.update(g, state, params)
            assert types(new_state) == types(state)
            met = [gradient_dtype]
            met += [] if name.startswith(KEEPS_GRADIENT_DTYPE) else [param_dtype]
            met += ["float32"] if name.startswith(UPDATES_IN_FLOAT32) else []
            with jax.numpy_dtype_promotion("standard"):
                wanted = jnp.result_type(*map(jnp.dtype, met))
            if not name.startswith(("by_path", "wrapped")):  # a mixture of both kinds
                assert {u.dtype for u in jax.tree.leaves(updates)} == {wanted}
            return (at.apply_updates(params, updates), new_state), None

        scan = functools.partial(jax.lax.scan, step)
        (new_params, _), _ = jax.eval_shape(scan, (params, tx.init(params)), gradients)
        assert types(new_params) == types(params)


LOW = ["float16", "bfloat16", "complex64"]


@pytest.mark.parametrize(
    "dtypes", in_tiers(["all", *LOW], lambda dtypes: dtypes == "all")
)  # a tree of all needs one compilation where trees of each need three
@every_kind
def test_low_precision_and_complex_parameters_stay_finite(name: str, tx: Any, dtypes: str) -> None:
    names = LOW if dtypes == "all" else [dtypes]
    if name.startswith(REAL_ONLY):
        names = [dtype for dtype in names if dtype != "complex64"]
    params = {dtype: random_tree(0, dtype) for dtype in names}
    params = jax.tree.map(jnp.zeros_like, params)
    gradients = [params, {dtype: random_tree(1, dtype) for dtype in names}]
    for x in jax.tree.leaves(run(tx, params, gradients)):
        assert bool(jnp.all(jnp.isfinite(x)))


@every_transformation
def test_the_dtypes_of_a_state_stay_when_x64_is_turned_on(tx: Any) -> None:
    params = random_tree(0)
    state = tx.init(params)
    with x64():
        updates, new_state = jax.eval_shape(tx.update, random_tree(1), state, params)
    assert types(new_state) == types(jax.eval_shape(lambda: state))
    assert {u.dtype for u in jax.tree.leaves(updates)} == {np.dtype(np.float32)}


@every_transformation
def test_init_works_on_abstract_parameters(tx: Any) -> None:
    params = random_tree(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert types(jax.eval_shape(tx.init, abstract)) == types(tx.init(params))
    assert types(tx.init(abstract)) == types(tx.init(params))


KINDS_OF_MESH = [AxisType.Explicit, AxisType.Auto]


# The slots of shard_slots are sharded as its own mesh says.
@pytest.mark.parametrize(
    ("name", "axis_type"),
    in_tiers(
        [(n, t) for n in TRANSFORMATIONS if n not in HAS_A_MESH for t in KINDS_OF_MESH],
        lambda name, kind: (
            (kind == AxisType.Explicit or name == "deferred_adam")
            and name not in VARIANTS + OF_A_KIND
        ),
    ),
)
def test_state_is_sharded_like_the_parameters_and_stays_so(tx: Any, axis_type: Any) -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    specs = {
        "dense": {"kernel": PartitionSpec("x", None), "bias": PartitionSpec()},
        "scale": PartitionSpec(),
    }
    with jax.set_mesh(mesh):

        def put(tree: Any) -> Any:
            return jax.tree.map(
                lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
            )

        params, g = put(random_tree(0)), put(random_tree(1))
        state = jax.jit(tx.init)(params) if axis_type == AxisType.Explicit else tx.init(params)
        updates, new_state = jax.jit(tx.update)(g, state, params)
        for tree in (state, new_state, updates):
            for x in jax.tree.leaves(tree):
                if x.shape == (4, 3):
                    assert x.sharding.spec[0] == "x"


@every_kind
def test_none_gradient_leaves_parameter_and_slots_alone(name: str, tx: Any) -> None:
    params = random_tree(0)
    state = tx.init(params)
    g = {"dense": {"kernel": random_tree(1)["dense"]["kernel"], "bias": None}, "scale": None}
    for _ in range(2):  # two, so that an accumulator emits
        updates, new_state = jax.jit(tx.update)(g, state, params)
        assert updates["dense"]["bias"] is None
        assert updates["scale"] is None
        new_params = at.apply_updates(params, updates)
        assert_bits_equal(new_params["dense"]["bias"], params["dense"]["bias"])
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True):
            # An average from zero has to take in what stays, or it would not be one.
            # So has the number of steps that an average includes.
            counts_steps = name.startswith(("params_ema", "wrapped")) and old.dtype == jnp.int32
            if old.shape == (3,) and name != "params_ema debiased" and not counts_steps:
                assert_bits_equal(new, old)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        state = new_state


@every_kind
def test_step_can_donate_parameters_and_state(tx: Any) -> None:
    params = random_tree(0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return at.apply_updates(params, updates), state

    expected = run(tx, random_tree(0), [random_tree(1), random_tree(2)])
    state = tx.init(params)  # shares no buffer with params, nor any of its own twice
    for seed in (1, 2):
        params, state = step(params, state, random_tree(seed))
    chex.assert_trees_all_close((params, state), expected, rtol=2e-6, atol=1e-6)


@every_kind
def test_unknown_extra_arguments_are_ignored(tx: Any) -> None:
    params = random_tree(0)
    run(tx, params, [random_tree(1)], value=jnp.float32(1.0))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: at.accumulate(inner, 1),
        lambda inner: at.static_loss_scale(inner, 2.0),
        at.dynamic_loss_scale,
        at.skip_nonfinite,
        lambda inner: at.by_path([("kernel", inner)], inner),
        lambda inner: at.lazy(inner, tables=()),
        lambda inner: at.freeze_rows(inner, {"kernel": 0}),
        at.master_weights,
        lambda inner: at.shard_slots(inner, ONE_DEVICE),
    ],
)
def test_extra_arguments_reach_the_inner_transformation(wrap: Any) -> None:
    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        return jax.tree.map(lambda g: g * extra_args["factor"], updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = wrap(inner)
    params, g = random_tree(0), random_tree(1)
    once, twice = (
        tx.update(g, tx.init(params), params, factor=jnp.float32(factor))[0] for factor in (1, 2)
    )
    assert np.any(once["scale"])
    assert_bits_equal(twice, jax.tree.map(lambda x: 2 * x, once))


@every_kind
def test_works_inside_chain_and_masked(tx: Any) -> None:
    params = random_tree(0)
    mask = {"dense": {"kernel": True, "bias": False}, "scale": False}
    chained = optax.chain(optax.masked(optax.chain(tx, optax.identity()), mask))
    g = random_tree(1)
    updates, state = jax.jit(chained.update)(g, chained.init(params), params)
    assert_bits_equal(updates["dense"]["bias"], g["dense"]["bias"])
    jax.jit(chained.update)(g, state, params)


@every_kind
def test_works_inside_multi_transform(name: str, tx: Any) -> None:
    params, g = random_tree(0), random_tree(1)
    labels = {"dense": {"kernel": "ours", "bias": "other"}, "scale": "other"}
    grouped = optax.multi_transform({"ours": tx, "other": optax.set_to_zero()}, labels)
    updates, state = jax.jit(grouped.update)(g, grouped.init(params), params)
    assert not np.any(updates["dense"]["bias"])
    updates, _ = jax.jit(grouped.update)(g, state, params)
    if name != "wrapped":  # a pure average of zero updates
        assert np.any(updates["dense"]["kernel"])


@every_kind
def test_works_inside_multi_steps(tx: Any, relaxed_promotion: None) -> None:
    params = random_tree(0)
    steps = optax.MultiSteps(tx, every_k_schedule=2)
    update = jax.jit(steps.update)
    state = steps.init(params)
    for seed in range(1, 5):
        updates, state = update(random_tree(seed), state, params)
        assert bool(steps.has_updated(state)) == (seed % 2 == 0)
    averaged = [
        jax.tree.map(lambda a, b: (a + b) / 2, random_tree(i), random_tree(i + 1)) for i in (1, 3)
    ]
    state = tx.init(params)
    for g in averaged:
        expected, state = jax.jit(tx.update)(g, state, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)


INJECTED: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "scale_by_adam": (at.scale_by_adam, {"b1": 0.8, "b2": 0.95, "eps": 1e-4}, ()),
    "scale_by_amsgrad": (at.scale_by_amsgrad, {"b1": 0.8, "b2": 0.95, "eps": 1e-4}, ()),
    "clip_by_value": (at.clip_by_value, {"limit": 0.5}, ()),
    "max_row_norm": (at.max_row_norm, {"limit": 0.5}, ()),
    "clip_by_norm": (at.clip_by_norm, {"max_norm": 0.5}, ()),
    "clip_by_global_norm": (at.clip_by_global_norm, {"max_norm": 0.5}, ()),
    "params_ema": (
        at.params_ema,
        {"decay": 0.5, "overwrite_every": 2},
        ("overwrite_every",),
    ),
    "adam": (at.adam, {"learning_rate": 0.1, "b1": 0.8, "clip_norm": 0.5, "ema": 0.5}, ()),
    "adamw": (at.adamw, {"learning_rate": 0.1, "weight_decay": 0.5}, ()),
}


@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparameters_act_as_constants_do(name: str, relaxed_promotion: None) -> None:
    factory, arguments, static = INJECTED[name]
    params, gradients = random_tree(0), [random_tree(1), random_tree(2)]
    injected = optax.inject_hyperparams(factory, static_args=static)(**arguments)
    actual, state = run(injected, params, gradients)
    expected, _ = run(factory(**arguments), params, gradients)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert {*arguments} - {*static} <= {*state.hyperparams}


def test_schedules_are_read_at_the_number_of_steps_taken(relaxed_promotion: None) -> None:
    """The decay's too, which Optax before 0.2.7 read at 0 for ever."""
    tx = at.adam(decaying(0.1), weight_decay=decaying(0.5))
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    for count in range(3):
        # A constant gradient moves Adam by the learning rate.
        updates, state = jax.jit(tx.update)(params, state, params)
        expected = -0.1 * 0.9**count * (1.0 + 0.5 * 0.9**count)
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("factory", [at.accumulate, at.params_ema])
def test_traced_structural_argument_says_how_to_make_it_static(
    factory: Any, relaxed_promotion: None
) -> None:
    argument = "every" if factory is at.accumulate else "overwrite_every"
    arguments: dict[str, Any] = {argument: 2}
    if factory is at.accumulate:
        arguments["inner"] = optax.identity()
    injected = optax.inject_hyperparams(factory)(**arguments)
    with pytest.raises(TypeError, match=rf"{argument}.*static_args"):
        jax.eval_shape(injected.init, random_tree(0))


@every_kind
def test_works_under_vmap(tx: Any) -> None:
    """A batch of independent parameter sets, as in ensembles."""
    members = [random_tree(seed) for seed in (0, 1)]
    gradients = [random_tree(seed) for seed in (2, 3)]
    stacked, stacked_gradients = (
        jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in (members, gradients)
    )
    update, batched_update = jax.jit(tx.update), jax.jit(jax.vmap(tx.update))
    states = jax.vmap(tx.init)(stacked)
    for _ in range(2):
        updates, states = batched_update(stacked_gradients, states, stacked)
    for i in (0, 1):
        state = tx.init(members[i])
        for _ in range(2):
            expected, state = update(gradients[i], state, members[i])
        member = jax.tree.map(lambda x, i=i: x[i], updates)
        chex.assert_trees_all_close(member, expected, rtol=1e-5, atol=1e-6)


@every_transformation
def test_works_on_an_empty_tree(tx: Any) -> None:
    updates, _ = tx.update({}, tx.init({}), {})
    assert updates == {}


@every_transformation
def test_tree_map_params_finds_the_slots(name: str, tx: Any) -> None:
    state = tx.init(random_tree(0))
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: x + jnp.ones_like(x), state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    changed = [
        x.shape
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(doubled), strict=True)
        if not np.array_equal(x, y)
    ]
    kernels = [x.shape for x in jax.tree.leaves(state) if x.shape == (4, 3)]
    assert [shape for shape in changed if shape == (4, 3)] == kernels


@every_transformation
def test_wrong_structure_or_shape_is_refused_by_path(tx: Any) -> None:
    params = random_tree(0)
    state = tx.init(params)
    misshapen = {**random_tree(1), "scale": jnp.ones(7)}
    lacking = {"dense": random_tree(1)["dense"]}
    for bad in (misshapen, lacking):
        try:
            at.apply_updates(params, tx.update(bad, state, params)[0])
        except (ValueError, TypeError) as error:
            assert "scale" in str(error)
        else:
            pytest.fail("accepted")


@every_transformation
def test_integer_gradient_is_refused_by_path(tx: Any) -> None:
    params = random_tree(0)
    bad = {**random_tree(1), "scale": jnp.ones((), jnp.int32)}
    with pytest.raises(TypeError, match="'scale'.*int32"):
        tx.update(bad, tx.init(params), params)


ADAM_PAIRS = {
    "adam": (optax.scale_by_adam, at.scale_by_adam),
    "nadam": (
        functools.partial(optax.scale_by_adam, nesterov=True),
        functools.partial(at.scale_by_adam, nesterov=True),
    ),
    "amsgrad": (optax.scale_by_amsgrad, at.scale_by_amsgrad),
}


@pytest.mark.parametrize("pair", ADAM_PAIRS)
@pytest.mark.parametrize("theirs_first", [True, False])
def test_states_pass_between_optax_and_here(
    pair: str, theirs_first: bool, relaxed_promotion: None
) -> None:
    theirs, ours = (factory(b1=0.8, b2=0.95, eps=1e-4) for factory in ADAM_PAIRS[pair])
    first, second = (theirs, ours) if theirs_first else (ours, theirs)
    params = random_tree(0)
    assert jax.tree.structure(first.init(params)) == jax.tree.structure(second.init(params))
    early = [random_tree(seed) for seed in (1, 2)]
    late = [random_tree(seed) for seed in (3, 4)]
    middle, state = run(first, params, early)
    continued, _ = run(second, middle, late, state=state)
    expected, _ = run(first, params, early + late)
    chex.assert_trees_all_close(continued, expected, rtol=1e-5, atol=1e-5)


def test_state_of_other_dtypes_is_kept_as_it_came(relaxed_promotion: None) -> None:
    """Optax keeps nu in the parameter's dtype, complex or bfloat16; such a state stays a carry."""
    for dtype in ("bfloat16", "complex64"):
        params = random_tree(0, dtype)
        state = optax.scale_by_adam().init(params)
        _, new_state = run(at.scale_by_adam(), params, [random_tree(1, dtype)], state=state)
        assert types(new_state) == types(state)


def test_tree_get_and_set_reach_the_fields() -> None:
    tx = optax.chain(at.clip_by_norm(1.0), at.accumulate(at.scale_by_adam(), 2))
    state = tx.init(random_tree(0))
    assert int(optax.tree_utils.tree_get(state, "count")) == 0
    state = optax.tree_utils.tree_set(state, mini_step=jnp.int32(1))
    assert int(optax.tree_utils.tree_get(state, "mini_step")) == 1


SKIPPING = [
    wrap(optax.chain(at.clip_by_global_norm(1.0), at.scale_by_adam(), at.params_ema(0.9)))
    for wrap in (
        at.skip_nonfinite,
        at.dynamic_loss_scale,
        lambda inner: at.dynamic_loss_scale(at.accumulate(inner, 2)),
        lambda inner: at.accumulate(at.skip_nonfinite(inner), 2),
    )
]


@pytest.mark.parametrize("tx", SKIPPING, ids=range(len(SKIPPING)))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_gradient_leaves_no_trace(tx: Any, bad: float) -> None:
    params = random_tree(0)
    poisoned = {**random_tree(1), "scale": jnp.float32(bad)}
    good = [random_tree(seed) for seed in (1, 2, 3, 4)]
    params, state = run(tx, params, good)
    moments = optax.tree_utils.tree_get(state, "nu"), optax.tree_utils.tree_get(state, "ema")
    after, state = run(tx, params, [poisoned, poisoned], state=state)
    assert_bits_equal(after, params)
    assert_bits_equal(
        (optax.tree_utils.tree_get(state, "nu"), optax.tree_utils.tree_get(state, "ema")), moments
    )
    after, state = run(tx, params, good, state=state)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((after, state)))
    assert not np.array_equal(after["scale"], params["scale"])


# What no import of the package itself may need.
NOT_IMPORTED = """
    equinox flax h5py keras matplotlib orbax pandas pytest rich sklearn tensorflow torch
""".split()
IMPORT_BUDGET = {"modules of the package": 85, "modules in all": 115}


def test_an_import_is_light() -> None:
    """How many modules it adds to those of JAX and Optax, and none of another system's."""
    code = """if True:
        import jax, optax, sys
        before = {*sys.modules}
        import adam_transforms
        print(*(sys.modules.keys() - before))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    added = run.stdout.split()
    ours = [name for name in added if name.split(".")[0] == "adam_transforms"]
    found = {"modules of the package": len(ours), "modules in all": len(added)}
    for what, budget in IMPORT_BUDGET.items():
        assert found[what] <= budget, f"{found[what]} {what}, of at most {budget}: {sorted(added)}"
    for name in NOT_IMPORTED:
        assert not any(x == name or x.startswith(f"{name}.") for x in added), name
