"""How far float32 trajectories are from float64: ours against Optax's, on the same gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import in_tiers, optimized_jit

import adam_transforms as at

STEPS = 1000
# Scale of the initial parameters, learning rate. Near 1.0 and at 1e-3 the rounding of the
# parameters themselves, about 3e-6 for both, would hide the difference.
REGIMES = {"from zero at the default rate": (0.0, 1e-3), "from one at ten times it": (1.0, 1e-2)}

# Each parameter's shape and the scale of its gradients.
LEAVES = {
    "bias": ((16,), 1.0),
    "kernel": ((8, 12), 1e-3),
    "stack": ((3, 4, 5), 1e3),
}


@functools.cache
def start_and_gradients(start_scale):
    rng = np.random.default_rng(0)
    start, grads = {}, {}
    for name, (shape, scale) in LEAVES.items():
        start[name] = (start_scale * rng.standard_normal(shape)).astype(np.float32)
        grads[name] = (scale * rng.standard_normal((STEPS, *shape))).astype(np.float32)
    return start, grads


def float32_trajectory(tx, start, grads):

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    @optimized_jit
    def run(params, grads):
        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    trajectory = run(jax.tree.map(jnp.asarray, start), grads)
    assert all(p.dtype == jnp.float32 for p in trajectory.values())
    return {name: np.asarray(p, np.float64) for name, p in trajectory.items()}


def float64_trajectory(adam, learning_rate, start, grads):
    training = reference.Training(start, adam, learning_rate)
    steps = [training.step({name: g[t] for name, g in grads.items()}) for t in range(STEPS)]
    return {name: np.stack([params[name] for params in steps]) for name in start}


def largest_difference(a, b):
    return {name: np.max(np.abs(a[name] - b[name])) for name in a}


RULES = {
    "adam": (at.adam, optax.adam, reference.Adam),
    "nadam": (
        functools.partial(at.adam, nesterov=True),
        optax.nadam,
        functools.partial(reference.Adam, nesterov=True),
    ),
    "amsgrad": (
        functools.partial(at.adam, amsgrad=True, max_of="corrected"),
        optax.amsgrad,
        functools.partial(reference.Adam, max_of="corrected"),
    ),
}


# The first tier tries each rule, the b2 that is hardest for float32, and both regimes.
QUICK = [
    ("from zero at the default rate", 0.999999, "adam"),
    ("from one at ten times it", 0.999, "nadam"),
    ("from zero at the default rate", 0.999, "amsgrad"),
]


@pytest.mark.parametrize(
    ("regime", "b2", "rule"),
    in_tiers(
        itertools.product(REGIMES, [0.999, 0.9999, 0.999999], RULES),
        lambda *case: case in QUICK,
    ),
)
def test_float32_trajectory_is_closer_to_float64_than_optax(rule, b2, regime, relaxed_promotion):
    make_ours, make_optax, make_reference = RULES[rule]
    start_scale, learning_rate = REGIMES[regime]
    data = start_and_gradients(start_scale)
    exact = float64_trajectory(make_reference(b2=b2), learning_rate, *data)
    ours = float32_trajectory(make_ours(learning_rate, b2=b2), *data)
    theirs = float32_trajectory(make_optax(learning_rate, b2=b2), *data)

    our_error = largest_difference(ours, exact)
    their_error = largest_difference(theirs, exact)
    apart = largest_difference(ours, theirs)
    for name in LEAVES:
        print(f"{name}: ours {our_error[name]:.1e}, Optax {their_error[name]:.1e} from float64")
        assert our_error[name] < their_error[name]
        assert apart[name] <= their_error[name] + 1e-6
