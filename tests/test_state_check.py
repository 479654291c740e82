"""Every update refuses a state that its own init does not make, by name."""

import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from helpers import assert_bits_equal, assert_close, types, x64

import adam_transforms as at

pytestmark = pytest.mark.usefixtures("relaxed_promotion")
V = 10
PARAMS = {"table": jnp.ones((V, 2)), "w": jnp.ones(2)}
DENSE = jax.tree.map(jnp.ones_like, PARAMS)
ROWS = {
    "table": at.SparseRows(np.array([1]), np.ones((1, 2), np.float32), V, synchronized=True),
    "w": jnp.ones(2),
}
HEADING = "the state is not as this configuration makes it:"


@functools.cache
def deferred(**options: Any) -> Any:
    return at.deferred_adam(0.1, tables="table", **{"max_idle": 300, **options})


TRANSFORMATIONS: dict[str, Any] = {
    "scale_by_adam": at.scale_by_adam(),
    "scale_by_amsgrad": at.scale_by_amsgrad(),
    "scheduled": at.scale_by_adam(b1=optax.constant_schedule(0.9)),
    "scheduled AMSGrad": at.scale_by_amsgrad(b1=optax.constant_schedule(0.9)),
    "clip_by_norm": at.clip_by_norm(1.0),
    "params_ema": at.params_ema(0.9),
    "rates by path": at.scale_by_path_learning_rate([("w", 0.1)], 0.2),
    "more rates by path": at.scale_by_path_learning_rate([("w", 0.1), ("table", 0.1)], 0.2),
    "by_path": at.by_path([("w", at.adam())], at.adam(amsgrad=True)),
    "more groups": at.by_path([("w", at.adam()), ("tab", at.adam())], at.adam()),
    "adam": at.adam(),
    "adam with a schedule": at.adam(optax.constant_schedule(0.1)),
    "adam, AMSGrad": at.adam(amsgrad=True),
    "adam, clipped": at.adam(clip_norm=1.0),
    "adam, averaged": at.adam(ema=0.9),
    "adam, accumulated": at.adam(accumulate_every=2),
    "static_loss_scale": at.static_loss_scale(at.adam(), 2.0),
    "dynamic_loss_scale": at.dynamic_loss_scale(at.adam()),
    "skip_nonfinite": at.skip_nonfinite(at.adam()),
    "skip_nonfinite, limited": at.skip_nonfinite(at.adam(), max_consecutive=2),
    "master_weights": at.master_weights(at.adam()),
    "lazy": at.lazy_adam(),
    "lazy, AMSGrad": at.lazy_adam(amsgrad=True),
    "lazy, clipped": at.lazy_adam(clip_norm=1.0),
    "freeze_rows": at.freeze_rows(at.lazy_adam(), {"table": 0}),
    "freeze_rows of w": at.freeze_rows(at.lazy_adam(), {"w": 0}),
    "deferred": deferred(),
    "deferred, max_idle": deferred(max_idle=400),
    "deferred, decayed": deferred(weight_decay=0.1),
    "deferred, AMSGrad": deferred(amsgrad=True),
    "deferred, corrected": deferred(amsgrad=True, max_of="corrected"),
    "deferred, b1": deferred(b1=0.8),
    "deferred, b2": deferred(b2=0.99),
    "deferred, eps": deferred(eps=1e-7),
    "deferred, eps_hat": deferred(eps_hat=True),
    "no tables": at.deferred_adam(0.1, tables=lambda path, leaf: False),
}
BY_ROW = ("lazy", "freeze_rows", "deferred")


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.every_case
def test_the_state_of_any_other_configuration_is_refused(name: str) -> None:
    """At trace time, and so under jit; the error is short."""
    tx, gradients = TRANSFORMATIONS[name], ROWS if name.startswith(BY_ROW) else DENSE
    states = {other: jax.eval_shape(made.init, PARAMS) for other, made in TRANSFORMATIONS.items()}
    jax.eval_shape(tx.update, gradients, states[name], PARAMS)
    for other in states.keys() - {name}:
        with pytest.raises(ValueError, match=HEADING) as error:
            jax.eval_shape(tx.update, gradients, states[other], PARAMS)
        assert 1 < len(str(error.value).splitlines()) <= 8, other
        assert len(str(error.value)) < 1000, other
    nothing = [(), {"count": jnp.zeros(())}, jnp.zeros(3)]
    if states[name] != optax.EmptyState():  # Optax's own tests give None to what keeps no state
        nothing.append(None)
    for state in nothing:
        with pytest.raises(ValueError, match=HEADING):
            tx.update(gradients, state, PARAMS)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.every_case
def test_arguments_in_another_order_are_refused(name: str) -> None:
    tx = TRANSFORMATIONS[name]
    state = jax.eval_shape(tx.init, PARAMS)
    for arguments in ((DENSE, PARAMS, state), (ROWS, PARAMS, state), (state, DENSE, PARAMS)):
        with pytest.raises(ValueError, match=r"update takes \(gradients, state, params\)"):
            tx.update(*arguments)


LINES: list[tuple[str, str, list[str]]] = [
    ("scale_by_amsgrad", "scale_by_adam", ["the tree is ScaleByAdamState", "'nu_max' is missing"]),
    ("scale_by_adam", "scale_by_amsgrad", ["'nu_max' is there, expected nothing"]),
    ("adam, AMSGrad", "adam", ["'0' is ScaleByAdamState, expected ScaleByAmsgradState"]),
    ("scheduled", "scale_by_adam", ["'inner_state' is missing"]),
    ("adam, clipped", "adam", ["the tree is tuple of 2, expected tuple of 3"]),
    ("adam with a schedule", "adam", ["'1' is EmptyState, expected ScaleByLearningRateState"]),
    ("lazy", "adam", ["the tree is tuple, expected LazyState"]),
    ("lazy, clipped", "lazy", ["'inner_state' is tuple of 2, expected tuple of 3"]),
    ("freeze_rows", "lazy", ["'frozen' is missing"]),
    ("freeze_rows", "freeze_rows of w", ["'frozen/table' is missing, expected bool[10]"]),
    ("more groups", "by_path", ["'inner_states' is dict of 2, expected dict of 3"]),
    ("adam, accumulated", "adam", ["'mini_step' is missing, expected int32[]"]),
    ("dynamic_loss_scale", "static_loss_scale", ["'finite_steps' is missing"]),
    ("more rates by path", "rates by path", ["'rates/2' is missing"]),
    ("deferred", "deferred, max_idle", ["max_idle was 400, is 300", "flush(params, state)"]),
    ("deferred, decayed", "deferred", ["'idle' is there, expected nothing"]),
    ("deferred, AMSGrad", "deferred", ["'nu_max' is missing", "max_of was None, is raw"]),
    ("deferred, corrected", "deferred, AMSGrad", ["max_of was raw, is corrected"]),
    ("deferred, b1", "deferred", ["b1 was 0.9, is 0.8"]),
    ("deferred, b2", "deferred", ["b2 was 0.999, is 0.99"]),
    ("deferred, eps", "deferred", ["eps was 1e-08, is 1e-07"]),
    ("deferred, eps_hat", "deferred", ["eps_hat was False, is True"]),
]


@pytest.mark.parametrize("in_jit", [False, True])
def test_the_error_says_what_differs_and_what_to_do(in_jit: bool) -> None:
    for name, other, lines in LINES:
        tx, state = TRANSFORMATIONS[name], TRANSFORMATIONS[other].init(PARAMS)
        gradients = ROWS if name.startswith(BY_ROW) else DENSE
        with pytest.raises(ValueError) as error:
            (jax.jit(tx.update) if in_jit else tx.update)(gradients, state, PARAMS)
        for line in [HEADING, *lines, "transfer_state(state, old_tx, new_tx, params)"]:
            assert line in str(error.value), (name, other, str(error.value))


def test_numbers_of_another_rule_are_refused_where_they_are_known() -> None:
    """A restore may put them into the structure of the new configuration."""
    new, old = deferred(b1=0.8), deferred().init(PARAMS)
    state = new.init(PARAMS)
    ring = state.idle.ring._replace(scalars=old.idle.ring.scalars)
    state = state._replace(idle=state.idle._replace(ring=ring))
    with pytest.raises(ValueError, match="b1 was 0.9, is 0.8"):
        new.update(ROWS, state, PARAMS)


def test_a_state_without_settings_goes_on_as_it_is() -> None:
    """As pickled before a state had them."""
    tx = deferred()
    state = tx.init(PARAMS)
    ring = type(state.idle.ring)(*state.idle.ring[:4])
    old = state._replace(idle=state.idle._replace(ring=ring))
    assert ring.settings is None
    (updates, new), (expected, _) = (tx.update(ROWS, s, PARAMS) for s in (old, state))
    assert types(new) == types(old)
    assert_bits_equal(updates, expected)
    with pytest.raises(ValueError, match="max_idle was 300, is 400"):
        deferred(max_idle=400).update(ROWS, old, PARAMS)


def test_a_state_of_float32_goes_on_in_x64_mode_with_its_own_rule() -> None:
    """Which has more terms and nodes in float64."""
    state = deferred().init(PARAMS)
    expected = jax.jit(deferred().update)(ROWS, state, PARAMS)
    with x64():
        tx = at.deferred_adam(0.1, tables="table", max_idle=300)
        actual = jax.jit(tx.update)(ROWS, state, PARAMS)
        assert types(actual[1]) == types(expected[1])
        with pytest.raises(ValueError, match=HEADING):
            tx.update(ROWS, deferred(b2=0.99).init(PARAMS), PARAMS)
    assert_close(*map(at.to_dense, (actual, expected)), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if "," not in name])
def test_a_state_is_taken_in_every_form_that_it_comes_back_in(name: str) -> None:
    tx, gradients = TRANSFORMATIONS[name], ROWS if name.startswith(BY_ROW) else DENSE
    state = tx.init(PARAMS)
    expected = tx.update(gradients, state, PARAMS)
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    for form in (jax.device_get(state), pickle.loads(pickle.dumps(state)), restored):
        assert_bits_equal(
            jax.device_get(tx.update(gradients, form, PARAMS)), jax.device_get(expected)
        )
    with pytest.raises(ValueError, match="init\\(params\\)"):
        tx.update(gradients, serialization.to_state_dict(state), PARAMS)


def test_a_preset_of_flax_nnx_refuses_too() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    old, new = (nnx.Optimizer(model, at.adam(amsgrad=a), wrt=nnx.Param) for a in (False, True))
    gradients = nnx.grad(lambda model: jnp.sum(model(jnp.ones(2))))(model)
    old.update(model, gradients)
    new.opt_state = old.opt_state
    with pytest.raises(ValueError, match="'0/nu_max' is missing"):
        new.update(model, gradients)


def test_what_keeps_no_state_takes_none() -> None:
    for tx in (at.clip_by_value(1.0), at.clip_by_global_norm(1.0), at.max_row_norm(1.0)):
        for state in (PARAMS, at.scale_by_adam().init(PARAMS)):
            with pytest.raises(ValueError, match=HEADING):
                tx.update(DENSE, state, PARAMS)
