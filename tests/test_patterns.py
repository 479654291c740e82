# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import types, x64

import adam_transforms as at

PARAMS = {
    "embed": {"table": np.ones((3, 2), np.float32)},
    "layers": [
        {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)},
        {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)},
    ],
}


def first_elements(tree):
    """The tree with every array replaced by its first element."""
    return jax.tree.map(lambda x: float(np.asarray(x).ravel()[0]), tree)


def update(tx, gradients, params=None, steps=1):
    """The first elements of the last of `steps` updates."""
    state = tx.init(gradients if params is None else params)
    for _ in range(steps):
        updates, state = tx.update(gradients, state, params)
    return first_elements(updates)


# path_mask


@pytest.mark.parametrize(
    ("patterns", "embed", "kernel_0", "bias_0", "kernel_1", "bias_1"),
    [
        ("bias", False, False, True, False, True),
        (["bias", "embed"], True, False, True, False, True),
        (("^layers/0/",), False, True, True, False, False),
        (r"layers/\d/kernel$", False, True, False, True, False),
        ("", True, True, True, True, True),
    ],
)
def test_path_mask_selects_what_any_pattern_finds(
    patterns, embed, kernel_0, bias_0, kernel_1, bias_1
):
    expected = {
        "embed": {"table": embed},
        "layers": [{"kernel": kernel_0, "bias": bias_0}, {"kernel": kernel_1, "bias": bias_1}],
    }
    assert at.path_mask(patterns)(PARAMS) == expected
    excluded = at.path_mask(patterns, exclude=True)(PARAMS)
    assert excluded == jax.tree.map(lambda selected: not selected, expected)


def test_path_mask_needs_no_values_and_covers_none_leaves():
    shapes = {"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": None}
    assert at.path_mask("b")(shapes) == {"a": False, "b": True}


def test_path_mask_decides_what_decays():
    tx = optax.add_decayed_weights(0.5, at.path_mask("bias", exclude=True))
    gradients = jax.tree.map(np.zeros_like, PARAMS)
    layer = {"kernel": 0.5, "bias": 0.0}
    expected = {"embed": {"table": 0.5}, "layers": [layer, layer]}
    assert update(tx, gradients, PARAMS) == expected


def test_path_mask_of_an_empty_tree_is_empty():
    assert at.path_mask("bias")({}) == {}
    assert at.path_mask("bias")({"a": ()}) == {"a": ()}


def test_a_mask_that_matches_nothing_is_refused_with_the_paths():
    message = r"^no parameter matches 'biass', 'norm'; the paths are 'a', 'b/0'$"
    with pytest.raises(ValueError, match=message):
        at.path_mask(["biass", "norm"])({"a": 1.0, "b": [2.0]})
    with pytest.raises(ValueError, match=message):
        at.path_mask(["biass", "norm"], exclude=True)({"a": 1.0, "b": [2.0]})


def test_an_error_lists_no_more_than_the_first_paths():
    tree = {f"p{i:02}": 1.0 for i in range(20)}
    with pytest.raises(ValueError, match=r"'p00', .*'p07' and 12 more$"):
        at.path_mask("bias")(tree)


# Patterns and rules


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ("(", ValueError, r"patterns holds '\('"),
        (["ok", "[a"], ValueError, r"patterns holds '\[a'"),
        ([], ValueError, "patterns must hold at least one pattern"),
        (3, TypeError, "patterns must be a pattern or a list of patterns, got 3"),
        (None, TypeError, "patterns must be .*, got None"),
        (["a", 3], TypeError, r"patterns must be .*, got \['a', 3\]"),
        (b"a", TypeError, "patterns must be .*, got b'a'"),
        ({"a"}, TypeError, "patterns must be .*, got {'a'}"),
    ],
)
def test_what_is_no_pattern_is_refused(patterns, error, message):
    with pytest.raises(error, match=f"^{message}"):
        at.path_mask(patterns)


def test_exclude_is_a_flag():
    with pytest.raises(TypeError, match="^exclude must be True or False, got 1"):
        at.path_mask("bias", exclude=1)


@pytest.mark.parametrize("factory", [at.by_path, at.scale_by_path_learning_rate])
@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ("bias", TypeError, "rules must be a list of "),
        ({"bias": 1}, TypeError, "rules must be a list of "),
        (None, TypeError, "rules must be a list of "),
        ([("bias",)], TypeError, r"rules\[0\] must be a \(patterns, value\) pair"),
        (["bi"], TypeError, r"rules\[0\] must be a \(patterns, value\) pair, got 'bi'"),
        ([("(", 1.0)], ValueError, r"rules\[0\] holds '\('"),
        ([(3, 1.0)], TypeError, r"rules\[0\] must be a pattern"),
        ([([], 1.0)], ValueError, r"rules\[0\] must hold at least one pattern"),
    ],
)
def test_what_is_no_list_of_rules_is_refused(factory, rules, error, message):
    default = optax.identity() if factory is at.by_path else 0.1
    with pytest.raises(error, match=f"^{message}"):
        factory(rules, default)


@pytest.mark.parametrize(
    ("tx", "pattern"),
    [
        (
            at.by_path([("bias", optax.identity()), ("nrm", optax.identity())], optax.identity()),
            "nrm",
        ),
        (at.scale_by_path_learning_rate([("bias", 0.1), (["nrm", "x$"], 0.1)], 0.2), "nrm', 'x"),
    ],
)
def test_a_rule_that_matches_nothing_is_refused_unless_the_tree_is_empty(tx, pattern):
    with pytest.raises(ValueError, match=rf"^no parameter matches '{pattern}.*'layers/0/bias'"):
        tx.init(PARAMS)
    tx.init({})
    tx.init({"a": [], "b": ()})


def test_a_rule_that_only_repeats_earlier_ones_is_no_error():
    tx = at.scale_by_path_learning_rate([("bias", 1.0), ("layers/./bias", 2.0)], default=3.0)
    assert update(tx, PARAMS)["layers"][0] == {"bias": -1.0, "kernel": -3.0}


# Learning rates


def test_each_path_gets_the_learning_rate_of_its_first_rule():
    tx = at.scale_by_path_learning_rate(
        [("layers/0", 0.25), (["bias$", "table"], 0.5), ("layers", 2.0)], default=8.0
    )
    assert update(tx, PARAMS) == {
        "embed": {"table": -0.5},
        "layers": [{"kernel": -0.25, "bias": -0.25}, {"kernel": -2.0, "bias": -0.5}],
    }


def test_the_default_learning_rate_goes_to_the_rest():
    tx = at.scale_by_path_learning_rate([("bias", 0.0)], default=0.5)
    layer = {"kernel": -0.5, "bias": 0.0}
    assert update(tx, PARAMS) == {"embed": {"table": -0.5}, "layers": [layer, layer]}
    assert update(
        at.scale_by_path_learning_rate([], default=0.5), {"a": np.ones(1, np.float32)}
    ) == {"a": -0.5}


def test_schedules_are_read_at_the_steps_taken_before():
    tx = at.scale_by_path_learning_rate(
        [("a", lambda count: 1.0 + count.astype(jnp.float32)), ("b", lambda count: 2)], default=0.5
    )
    gradients = {
        "a": np.ones(1, np.float32),
        "b": np.ones(1, np.float32),
        "c": np.ones(1, np.float32),
    }
    for steps in (1, 2, 4):
        assert update(tx, gradients, steps=steps) == {"a": -float(steps), "b": -2.0, "c": -0.5}


def test_learning_rates_can_be_arrays_and_tracers():
    gradients = {"a": jnp.ones(1), "b": jnp.ones(1, jnp.bfloat16)}

    @jax.jit
    def step(rate):
        tx = at.scale_by_path_learning_rate([("a", rate)], default=jnp.asarray(0.25))
        return tx.update(gradients, tx.init(gradients))[0]

    for rate in (0.5, 3.0):
        updates = step(jnp.asarray(rate))
        assert (updates["a"].tolist(), updates["b"].tolist()) == ([-rate], [-0.25])
        assert updates["b"].dtype == jnp.bfloat16


def test_the_state_keeps_the_learning_rates_of_the_last_step():
    tx = at.scale_by_path_learning_rate(
        [("a", lambda count: 1.0 + count.astype(jnp.float16)), ("b", lambda count: 2 * count)],
        default=jnp.bfloat16(0.5),
    )
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    state = tx.init(params)
    first = types(state)
    assert [float(rate) for rate in state.rates] == [1.0, 0.0, 0.5]
    for taken in (0, 1, 2):
        _, state = jax.jit(tx.update)(params, state)
        assert [float(rate) for rate in state.rates] == [1.0 + taken, 2.0 * taken, 0.5]
        assert types(state) == first
    assert {rate.dtype for rate in state.rates} == {jnp.dtype("float32")}
    with x64():
        assert {rate.dtype for rate in tx.init(params).rates} == {jnp.dtype("float64")}


def test_a_donated_state_takes_no_learning_rate_of_the_callers_along():
    rate = jnp.float32(0.5)
    tx = at.scale_by_path_learning_rate([("a", rate)], default=rate)
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    state = tx.init(params)
    _, state = tx.update(params, state)
    updates, _ = jax.jit(tx.update, donate_argnums=1)(params, state)
    assert float(rate) == 0.5
    assert updates["a"].tolist() == updates["b"].tolist() == [-0.5]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_learning_rates_keep_the_dtype_of_the_update(dtype):
    with x64():
        gradients = {"a": jnp.full(2, 4.0, dtype), "b": jnp.full(2, 4.0, dtype)}
        tx = at.scale_by_path_learning_rate([("a", jnp.float32(0.5))], lambda count: jnp.float32(2))
        updates, _ = tx.update(gradients, tx.init(gradients))
        assert updates["a"].dtype == updates["b"].dtype == dtype
        assert updates["a"].tolist() == [-2.0, -2.0]
        assert updates["b"].tolist() == [-8.0, -8.0]


def test_learning_rates_pass_over_none_gradients():
    tx = at.scale_by_path_learning_rate([("a", 0.5)], default=0.25)
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    updates, state = tx.update({"a": None, "b": jnp.ones(1)}, tx.init(params), params)
    assert updates["a"] is None
    assert updates["b"].tolist() == [-0.25]
    assert int(state.count) == 1


def test_learning_rates_work_inside_masked_and_multi_transform():
    gradients = {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}
    rates = at.scale_by_path_learning_rate([("a", 0.5)], default=0.25)
    masked = optax.masked(rates, {"a": True, "b": True, "c": False})
    assert update(masked, gradients) == {"a": -0.5, "b": -0.25, "c": 1.0}
    groups = optax.multi_transform(
        {"rates": rates, "still": optax.set_to_zero()}, {"a": "rates", "b": "still", "c": "rates"}
    )
    assert update(groups, gradients) == {"a": -0.5, "b": 0.0, "c": -0.25}


@pytest.mark.parametrize(
    ("rules", "default", "error", "message"),
    [
        ([("a", "0.1")], 0.1, TypeError, r"rules\[0\] must be a number.*, got '0.1'"),
        ([("a", 0.1), ("b", np.nan)], 0.1, ValueError, r"rules\[1\] must be a finite number"),
        ([("a", 0.1)], None, TypeError, "default must be a number.*, got None"),
        ([("a", 0.1)], np.ones(2), TypeError, r"default must be a number .* got float64\[2\]"),
    ],
)
def test_a_learning_rate_that_is_none_is_refused(rules, default, error, message):
    with pytest.raises(error, match=f"^{message}"):
        at.scale_by_path_learning_rate(rules, default)


# Groups


def test_each_group_gets_its_own_transformation():
    tx = at.by_path(
        [("bias", optax.set_to_zero()), ("layers/1", optax.scale(-2.0))], default=optax.scale(-3.0)
    )
    assert update(tx, PARAMS, PARAMS) == {
        "embed": {"table": -3.0},
        "layers": [{"kernel": -3.0, "bias": 0.0}, {"kernel": -2.0, "bias": 0.0}],
    }


def test_groups_keep_their_own_state():
    tx = at.by_path(
        [("a", optax.chain(at.scale_by_adam(), at.params_ema(0.5)))], default=optax.trace(0.5)
    )
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = tx.init(params)
    # mu, nu, the average and its last steps; the trace.
    shapes = sorted(x.shape for x in jax.tree.leaves(state) if x.ndim)
    assert shapes == [(2,), (2,), (2,), (2,), (3,)]
    updates, _ = tx.update(params, state, params)
    np.testing.assert_allclose(updates["a"], 1.0, rtol=1e-6)
    assert updates["b"].tolist() == [1.0, 1.0, 1.0]


def test_groups_pass_over_none_gradients():
    tx = at.by_path([("a", at.scale_by_adam())], default=optax.scale(-1.0))
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    state = tx.init(params)
    updates, _ = tx.update({"a": None, "b": None, "c": jnp.ones(2)}, state, params)
    assert updates["a"] is None
    assert updates["b"] is None
    assert updates["c"].tolist() == [-1.0, -1.0]


def test_groups_nest():
    inner = at.by_path([("bias", optax.scale(2.0))], default=optax.scale(3.0))
    tx = at.by_path([("layers", inner)], default=optax.scale(5.0))
    layer = {"kernel": 3.0, "bias": 2.0}
    assert update(tx, PARAMS, PARAMS) == {"embed": {"table": 5.0}, "layers": [layer, layer]}


@pytest.mark.parametrize(
    ("rules", "default", "name"),
    [
        ([("a", 0.1)], optax.identity(), "rules[0]"),
        ([("a", optax.identity()), ("b", optax.adam)], optax.identity(), "rules[1]"),
        ([], 0.1, "default"),
    ],
)
def test_a_group_that_is_no_transformation_is_refused(rules, default, name):
    message = rf"^{re.escape(name)} must be an optax.GradientTransformation, got "
    with pytest.raises(TypeError, match=message):
        at.by_path(rules, default)
