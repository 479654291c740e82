# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import assert_bits_equal, assert_close, normal

import adam_transforms as at

# The chains hold Optax's learning rates and decay, which promote implicitly.
pytestmark = pytest.mark.usefixtures("relaxed_promotion")

PARAMS = {"kernel": normal(50, 3, 2), "bias": normal(51, 2)}
GRADIENTS = [{"kernel": normal(t, 3, 2), "bias": 3 * normal(100 + t, 2)} for t in range(6)]


def run(tx, gradients=GRADIENTS, params=PARAMS):
    """Parameters and states after every step."""

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return at.apply_updates(params, updates), state

    state, steps = tx.init(params), []
    for g in gradients:
        params, state = step(params, state, g)
        steps.append((params, state))
    return steps


def assert_same(tx, expected, gradients=GRADIENTS):
    """The same parameters and state, bit for bit, after every step."""
    assert_bits_equal(run(tx, gradients), run(expected, gradients))


def plain(**options) -> Any:
    return at.scale_by_adam(**options), at.scale_by_learning_rate(1e-3)


def decaying(count):
    return 0.1 * 0.5**count


not_bias = at.path_mask("bias", exclude=True)

# Options, and the parts of the chain that they stand for.
CHAINS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "defaults": ({}, plain()),
    "learning rate": (
        dict(learning_rate=0.5),
        (at.scale_by_adam(), at.scale_by_learning_rate(0.5)),
    ),
    "schedule": (
        dict(learning_rate=decaying),
        (at.scale_by_adam(), at.scale_by_learning_rate(decaying)),
    ),
    "betas": (dict(b1=0.5, b2=0.8, eps=1e-2), plain(b1=0.5, b2=0.8, eps=1e-2)),
    "scheduled beta": (dict(b1=decaying), plain(b1=decaying)),
    "eps_hat": (dict(eps=1e-2, eps_hat=True), plain(eps=1e-2, eps_hat=True)),
    "nesterov": (dict(nesterov=True), plain(nesterov=True)),
    "dtypes": (
        dict(mu_dtype="bfloat16", nu_dtype=jnp.float16),
        plain(mu_dtype="bfloat16", nu_dtype=jnp.float16),
    ),
    "amsgrad": (
        dict(amsgrad=True),
        (at.scale_by_amsgrad(max_of="raw"), at.scale_by_learning_rate(1e-3)),
    ),
    "amsgrad corrected": (
        dict(amsgrad=True, max_of="corrected", b2=0.9),
        (at.scale_by_amsgrad(b2=0.9, max_of="corrected"), at.scale_by_learning_rate(1e-3)),
    ),
    "amsgrad eps_hat": (
        dict(amsgrad=True, eps_hat=True, eps=1e-2, mu_dtype="float16", nu_dtype="bfloat16"),
        (
            at.scale_by_amsgrad(
                eps=1e-2, max_of="raw", eps_hat=True, mu_dtype="float16", nu_dtype="bfloat16"
            ),
            at.scale_by_learning_rate(1e-3),
        ),
    ),
    "clip_value": (dict(clip_value=0.5), (at.clip_by_value(0.5), *plain())),
    "clip_norm": (dict(clip_norm=0.5), (at.clip_by_norm(0.5), *plain())),
    "clip_global_norm": (dict(clip_global_norm=0.5), (at.clip_by_global_norm(0.5), *plain())),
    "weight_decay": (
        dict(weight_decay=0.1),
        (at.scale_by_adam(), optax.add_decayed_weights(0.1), at.scale_by_learning_rate(1e-3)),
    ),
    "no weight_decay": (
        dict(weight_decay=0.0),
        (at.scale_by_adam(), optax.add_decayed_weights(0.0), at.scale_by_learning_rate(1e-3)),
    ),
    "weight_decay_mask": (
        dict(weight_decay=0.1, weight_decay_mask=not_bias),
        (
            at.scale_by_adam(),
            optax.add_decayed_weights(0.1, not_bias),
            at.scale_by_learning_rate(1e-3),
        ),
    ),
    "ema": (dict(ema=0.9), (*plain(), at.params_ema(0.9))),
    "ema_overwrite_every": (
        dict(ema=0.9, ema_overwrite_every=2),
        (*plain(), at.params_ema(0.9, overwrite_every=2)),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_each_option_is_the_documented_part_of_the_chain(name):
    options, chain = CHAINS[name]
    assert_same(at.adam(**options), optax.chain(*chain))


@pytest.mark.parametrize(
    ("options", "wrap"),
    [
        (dict(accumulate_every=3), lambda tx: at.accumulate(tx, 3)),
        (dict(loss_scale=8.0), lambda tx: at.static_loss_scale(tx, 8.0)),
        (dict(loss_scale="dynamic"), at.dynamic_loss_scale),
        (
            dict(loss_scale="dynamic", accumulate_every=2),
            lambda tx: at.dynamic_loss_scale(at.accumulate(tx, 2)),
        ),
        (
            dict(loss_scale=3, accumulate_every=2),
            lambda tx: at.static_loss_scale(at.accumulate(tx, 2), 3),
        ),
    ],
)
def test_accumulation_and_loss_scale_wrap_the_chain_as_documented(options, wrap):
    overflow = {**GRADIENTS[2], "bias": np.full(2, np.inf, np.float32)}
    gradients = GRADIENTS if options.get("loss_scale") != "dynamic" else [*GRADIENTS[:2], overflow]
    assert_same(at.adam(**options), wrap(optax.chain(*plain())), gradients)


EVERYTHING: dict[str, Any] = dict(
    learning_rate=decaying,
    b1=0.8,
    b2=0.99,
    eps=1e-3,
    weight_decay=0.1,
    weight_decay_mask=not_bias,
    clip_global_norm=1.0,
    ema=0.7,
    ema_overwrite_every=2,
    accumulate_every=2,
)


def test_all_options_together_are_the_documented_chain():
    chain = optax.chain(
        at.clip_by_global_norm(1.0),
        at.scale_by_amsgrad(
            0.8, 0.99, 1e-3, mu_dtype="bfloat16", nu_dtype="float32", eps_hat=True, max_of="raw"
        ),
        optax.add_decayed_weights(0.1, not_bias),
        at.scale_by_learning_rate(decaying),
        at.params_ema(0.7, overwrite_every=2),
    )
    tx = at.adam(
        **EVERYTHING,
        loss_scale="dynamic",
        amsgrad=True,
        eps_hat=True,
        mu_dtype="bfloat16",
        nu_dtype="float32",
    )
    assert_same(tx, at.dynamic_loss_scale(at.accumulate(chain, 2)))


def test_all_options_together_follow_the_reference():
    tx = at.adam(**EVERYTHING, loss_scale=4.0, nesterov=True)
    training = reference.Training(
        PARAMS,
        reference.Adam(0.8, 0.99, 1e-3, nesterov=True),
        decaying,
        loss_scale=4.0,
        accumulation=reference.Accumulation(2),
        clips=[lambda g: reference.clip_by_global_norm(g, 1.0)],
        weight_decay=0.1,
        decayed=["kernel"],
        ema=reference.Ema(0.7, reference.on_every(2)),
    )
    for (params, _), g in zip(run(tx), GRADIENTS, strict=True):
        assert_close(params, training.step(g), rtol=1e-5, atol=1e-6)


def test_hyperparameters_can_be_tracers():
    @jax.jit
    def step(rate, b1, decay, limit, g):
        tx = at.adam(rate, b1, weight_decay=decay, clip_global_norm=limit)
        return tx.update(g, tx.init(PARAMS), PARAMS)[0]

    values = [jnp.float32(x) for x in (0.5, 0.75, 0.25, 2.0)]
    updates = step(*values, GRADIENTS[0])
    plain_updates = run(at.adam(0.5, 0.75, weight_decay=0.25, clip_global_norm=2.0), GRADIENTS[:1])
    assert_close(at.apply_updates(PARAMS, updates), plain_updates[0][0])


def test_the_learning_rate_is_optaxs_and_that_of_a_schedule_is_kept():
    for rate in (0.3, jnp.float32(0.3), decaying):
        ours, optaxs = at.scale_by_learning_rate(rate), optax.scale_by_learning_rate(rate)
        state, inner = ours.init(PARAMS), optaxs.init(PARAMS)
        for g in GRADIENTS[:2]:
            g = {"kernel": jnp.asarray(g["kernel"], jnp.bfloat16), "bias": g["bias"], "none": None}
            updates, state = ours.update(g, state)
            expected, inner = optaxs.update(g, inner)
            own = state.inner_state if callable(rate) else state
            assert_bits_equal((updates, own), (expected, inner))
    assert_close(state.rate, np.float32(decaying(1)))
    with pytest.raises(ValueError, match="is ScaleByScheduleState, expected ScaleByLearningRate"):
        ours.update(GRADIENTS[0], inner)


# adamw


def test_adamw_is_adam_with_optaxs_default_decay():
    assert_same(at.adamw(), at.adam(weight_decay=1e-4))
    assert_close(run(at.adamw(0.1))[-1][0], run(optax.adamw(0.1))[-1][0], rtol=2e-5, atol=1e-5)


def test_adamw_takes_every_option_of_adam():
    options = {**EVERYTHING, "nesterov": True, "loss_scale": 2.0}
    assert_same(at.adamw(**options), at.adam(**options))
    adam, adamw = (inspect.signature(preset).parameters for preset in (at.adam, at.adamw))
    assert set(adamw) == {*adam, "mask"}
    different = {name for name in adam if adam[name].default != adamw[name].default}
    assert different == {"weight_decay"}
    assert adamw["weight_decay"].default == 1e-4


def positional(fn):
    parameters = inspect.signature(fn).parameters.items()
    return [name for name, p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def test_the_positional_arguments_are_optaxs():
    assert positional(at.adam) == positional(at.lazy_adam) == positional(optax.adam)
    assert positional(at.adamw) == positional(optax.adamw)


def test_presets_drop_in_for_optaxs():
    arguments, decay = (0.1, 0.8, 0.99, 1e-3, 1e-4), (0.2, {"kernel": True, "bias": False})
    for ours, theirs in (
        (at.adam(*arguments), optax.adam(*arguments)),
        (at.adamw(*arguments, None, *decay), optax.adamw(*arguments, None, *decay)),
    ):
        assert_close(run(ours)[-1][0], run(theirs)[-1][0], rtol=2e-5)
    state: Any = at.adam(*arguments, "bfloat16").init(PARAMS)
    assert state[0].mu["bias"].dtype == jnp.bfloat16


def test_both_names_of_the_mask_are_not_taken_together():
    with pytest.raises(ValueError, match="weight_decay_mask"):
        at.adamw(mask=not_bias, weight_decay_mask=not_bias)


@pytest.mark.parametrize("options", [{"lr": 0.1}, {"betas": (0.9, 0.99)}, {"beta_1": 0.9}])
def test_the_name_of_an_argument_elsewhere_is_told(options):
    own = {"lr": "learning_rate", "betas": "b1 and b2", "beta_1": "b1"}[next(iter(options))]
    for preset in (at.adam, at.adamw, at.lazy_adam, at.deferred_adam):
        with pytest.raises(TypeError, match=f"{preset.__name__} has no argument .*{own}"):
            preset(**options)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("clip_global_norm", "chain(lazy(clip_by_global_norm(...)), deferred_adam(...))"),
        ("clipnorm", "chain(lazy(clip_by_norm(...)), deferred_adam(...))"),
        ("accumulate_every", "accumulate(deferred_adam(...), every, like=...)"),
        ("nesterov", "lazy_adam(..., nesterov=True)"),
        ("mask", "weight_decay_mask"),
        ("loss_scale", "dynamic_loss_scale(deferred_adam(...))"),
        ("ema", "lazy_adam(..., ema=...)"),
        ("state_bits", "lazy_adam(..., state_bits=...)"),
    ],
)
@pytest.mark.every_case
def test_what_stands_for_an_argument_that_deferred_adam_lacks_is_told(name, instead):
    with pytest.raises(TypeError, match=re.escape(f"{name!r}: here it is {instead}")):
        at.deferred_adam(0.1, tables="t", **{name: 1.0})


def test_what_stands_for_an_argument_computes_it():
    def loss(params):
        return jnp.sum((params["t"][jnp.array([1, 3, 1])] - 2.0) ** 2)

    params = {"t": jnp.ones((6, 2))}
    tx = at.deferred_adam(0.1, tables="t")
    of_state = at.grad(loss, rows_from=tx.init(params))
    like = jax.eval_shape(of_state, params)
    rows = of_state(params)
    for options, instead in (
        ({"clip_global_norm": 1.0}, optax.chain(at.lazy(at.clip_by_global_norm(1.0)), tx)),
        ({"accumulate_every": 2}, at.accumulate(tx, 2, like=like)),
        ({"loss_scale": 8.0}, at.static_loss_scale(tx, 8.0)),
    ):
        results = []
        for optimizer, grads in ((instead, rows), (at.adam(0.1, **options), at.to_dense(rows))):
            step = jax.jit(functools.partial(at.update_and_apply, optimizer))
            now, state = params, optimizer.init(params)
            for _ in range(2):
                now, state = step(grads, state, now)
            results.append(now["t"])
        assert_close(*results, rtol=1e-6)


# Wrong arguments


@pytest.mark.parametrize("preset", [at.adam, at.adamw])
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (dict(clip_value=1.0, clip_norm=1.0), ["clip_value", "clip_norm"]),
        (dict(clip_norm=1.0, clip_global_norm=1.0), ["clip_norm", "clip_global_norm"]),
        (dict(clip_value=1.0, clip_global_norm=1.0), ["clip_value", "clip_global_norm"]),
        (dict(amsgrad=True, nesterov=True), ["amsgrad", "nesterov"]),
        (
            dict(weight_decay=None, weight_decay_mask=not_bias),
            ["weight_decay_mask", "weight_decay"],
        ),
        (dict(ema_overwrite_every=2), ["ema_overwrite_every", "ema"]),
        (dict(amsgrad=True, max_of="corrected", eps_hat=True), ["eps_hat", "max_of"]),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(preset, options, names):
    with pytest.raises(ValueError) as error:
        preset(**options)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("preset", [at.adam, at.adamw])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(learning_rate="0.1"), TypeError),
        (dict(learning_rate=None), TypeError),
        (dict(learning_rate=np.nan), ValueError),
        (dict(learning_rate=np.ones(2)), TypeError),
        (dict(b1=1.0), ValueError),
        (dict(b1="x"), TypeError),
        (dict(b2=-0.5), ValueError),
        (dict(b2=None), TypeError),
        (dict(eps=-1.0), ValueError),
        (dict(eps=True), TypeError),
        (dict(eps_hat="yes"), TypeError),
        (dict(amsgrad=1), TypeError),
        (dict(max_of="v_hat"), ValueError),
        (dict(max_of=None, amsgrad=True), ValueError),
        (dict(nesterov=None), TypeError),
        (dict(weight_decay="1e-4"), TypeError),
        (dict(weight_decay=np.inf), ValueError),
        (dict(weight_decay=1e-4, weight_decay_mask="bias"), TypeError),
        (dict(weight_decay=1e-4, weight_decay_mask=3), TypeError),
        (dict(clip_value=0.0), ValueError),
        (dict(clip_value="1"), TypeError),
        (dict(clip_norm=-1.0), ValueError),
        (dict(clip_norm=[1.0]), TypeError),
        (dict(clip_global_norm=np.nan), ValueError),
        (dict(clip_global_norm=True), TypeError),
        (dict(ema=1.0), ValueError),
        (dict(ema=True), TypeError),
        (dict(ema=0.9, ema_overwrite_every=0), ValueError),
        (dict(ema=0.9, ema_overwrite_every=1.5), TypeError),
        (dict(accumulate_every=0), ValueError),
        (dict(accumulate_every=2.0), TypeError),
        (dict(loss_scale="static"), ValueError),
        (dict(loss_scale=0), ValueError),
        (dict(loss_scale=True), TypeError),
        (dict(loss_scale=[8.0]), TypeError),
        (dict(mu_dtype="int32"), TypeError),
        (dict(nu_dtype=3), TypeError),
    ],
    ids=repr,
)
def test_a_wrong_argument_is_refused_by_name(preset, options, error):
    name = list(options)[-1] if "max_of" not in options else "max_of"
    with pytest.raises(error, match=rf"\b{name}\b"):
        preset(**options)


@pytest.mark.parametrize("preset", [at.adam, at.adamw])
def test_an_unknown_option_is_refused_by_name(preset):
    with pytest.raises(TypeError, match="clipnorm"):
        preset(clipnorm=1.0)


def test_gradients_that_differ_from_the_parameters_are_refused_by_path():
    for options in ({}, {"accumulate_every": 2, "loss_scale": "dynamic"}):
        tx = at.adam(**options)
        state = tx.init(PARAMS)
        with pytest.raises(ValueError, match="'bias'.*only in"):
            tx.update({"kernel": GRADIENTS[0]["kernel"]}, state, PARAMS)
        wrong = {**GRADIENTS[0], "bias": np.ones(3, np.float32)}
        with pytest.raises(
            ValueError, match=r"'bias' has shape \[3\] in the updates, but \[2\] in"
        ):
            tx.update(wrong, state, PARAMS)
