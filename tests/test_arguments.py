import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, x64

import adam_transforms as at
from adam_transforms._core import arguments

NUMBERS = [
    1,
    0.25,
    np.float64(0.25),
    np.float32(0.25),
    np.int64(3),
    jnp.bfloat16(0.25),
]
SCALAR_ARRAYS = [
    jnp.array(0.25),
    jnp.array(0.25, jnp.bfloat16),
    jnp.array(3, jnp.int32),
]


def traced(check, *args):
    """Runs `check` on a tracer of float32 ()."""
    seen = []
    jax.eval_shape(lambda x: seen.append(check(*args, x)), jax.ShapeDtypeStruct((), jnp.float32))
    return seen[0]


# scalar


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_scalar_gives_a_python_float_for_a_number(value):
    result = arguments.scalar("rate", value)
    assert type(result) is float or result is value
    assert float(result) == float(value)


def test_scalar_makes_numpy_numbers_python_floats():
    for value in (np.float64(0.25), np.float32(0.25), np.array(0.25), np.int64(3), 3):
        assert type(arguments.scalar("rate", value)) is float


@pytest.mark.parametrize("value", SCALAR_ARRAYS, ids=repr)
def test_scalar_leaves_an_array_as_it_is(value):
    assert arguments.scalar("rate", value, at_least=0.0) is value


def test_scalar_leaves_a_tracer_as_it_is_and_unchecked():
    result = traced(lambda name, x: (arguments.scalar(name, x, at_least=2.0, below=1.0), x), "rate")
    assert result[0] is result[1]


@pytest.mark.parametrize(
    ("value", "came"),
    [
        (True, "True"),
        (None, "None"),
        ("0.1", "'0.1'"),
        ([0.1], "[0.1]"),
        (0.1j, "0.1j"),
        (jnp.ones(1), "float32[1]"),
        (np.ones((2, 3)), "float64[2, 3]"),
        (jnp.array(True), "bool[]"),
        (np.array("x"), "<U1[]"),
    ],
    ids=repr,
)
def test_scalar_refuses_what_is_no_number(value, came):
    message = rf"^rate must be a number.*got {re.escape(came)}"
    with pytest.raises(TypeError, match=message):
        arguments.scalar("rate", value)


@pytest.mark.parametrize("value", [jnp.array(1j, jnp.complex64), np.array(1j)], ids=repr)
def test_scalar_refuses_a_complex_array(value):
    with pytest.raises(TypeError, match=r"^rate must be a .*number.*got complex"):
        arguments.scalar("rate", value)


def test_scalar_refuses_a_traced_array_of_another_shape():
    with pytest.raises(TypeError, match=r"^rate must be a number.*float32\[2\]"):
        jax.eval_shape(lambda x: arguments.scalar("rate", x), jax.ShapeDtypeStruct((2,), "float32"))


@pytest.mark.parametrize("make", [float, np.float32, np.array, jnp.array])
@pytest.mark.parametrize(
    ("limits", "value", "expected"),
    [
        (dict(at_least=0.0), -0.5, ">= 0, got -0.5"),
        (dict(above=0.0), 0.0, "> 0, got 0"),
        (dict(below=1.0), 1.0, "< 1, got 1"),
        (dict(at_least=0.0, below=1.0), 1.5, ">= 0 and < 1, got 1.5"),
        (dict(at_least=0.0, below=1.0), np.nan, ">= 0 and < 1, got nan"),
        (dict(), np.nan, "a finite number, got nan"),
        (dict(), np.inf, "a finite number, got inf"),
        (dict(), -np.inf, "a finite number, got -inf"),
    ],
)
def test_scalar_refuses_a_value_out_of_range(make, limits, value, expected):
    with pytest.raises(ValueError, match=rf"^rate must be {re.escape(expected)}$"):
        arguments.scalar("rate", make(value), **limits)


def test_scalar_takes_the_ends_that_its_range_includes():
    assert arguments.scalar("rate", 0, at_least=0.0, below=1.0) == 0.0
    assert arguments.scalar("rate", 1.0, at_least=1.0) == 1.0


# Schedules and rates


def test_a_schedule_passes_and_a_number_is_checked():
    schedule = optax.constant_schedule(5.0)
    assert arguments.scalar_or_schedule("rate", schedule, below=1.0) is schedule
    assert arguments.scalar_or_schedule("rate", 0.5, below=1.0) == 0.5
    with pytest.raises(ValueError, match="^rate must be < 1, got 5$"):
        arguments.scalar_or_schedule("rate", 5, below=1.0)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 1 - 1e-12, np.float32(0.999)])
def test_a_decay_rate_lies_in_zero_to_one(value):
    assert arguments.decay_rate("b1", value) == float(value)


@pytest.mark.parametrize("value", [-1e-9, 1, 1.0, 2.0, np.nan, jnp.array(1.0)])
def test_a_decay_rate_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="^b1 must be >= 0 and < 1, got "):
        arguments.decay_rate("b1", value)


# positive_int


@pytest.mark.parametrize("value", [1, 7, np.int32(7), jnp.array(7)], ids=repr)
def test_positive_int_gives_a_python_int(value):
    result = arguments.positive_int("every", value)
    assert type(result) is int
    assert result == int(value)


@pytest.mark.parametrize("value", [True, np.True_, 2.0, "2", None, [2], np.ones(2, int)], ids=repr)
def test_positive_int_refuses_what_is_no_integer(value):
    with pytest.raises(
        TypeError, match=rf"^every must be an integer, got {re.escape(repr(value))}"
    ):
        arguments.positive_int("every", value)


@pytest.mark.parametrize("value", [0, -3])
def test_positive_int_refuses_less_than_one(value):
    with pytest.raises(ValueError, match=f"^every must be at least 1, got {value}$"):
        arguments.positive_int("every", value)


def test_positive_int_says_how_to_keep_a_traced_value_static():
    with pytest.raises(TypeError, match=r"^every must be .* static_args=\('every',\)"):
        traced(arguments.positive_int, "every")


# flag, choice


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_])
def test_flag_takes_booleans(value):
    assert arguments.flag("debias", value) is bool(value)


@pytest.mark.parametrize("value", [1, 0, "True", None, 1.0, jnp.array(True)], ids=repr)
def test_flag_refuses_everything_else(value):
    with pytest.raises(
        TypeError, match=rf"^debias must be True or False, got {re.escape(repr(value))}"
    ):
        arguments.flag("debias", value)


def test_choice_takes_its_options_only():
    assert arguments.choice("max_of", "raw", ("corrected", "raw")) == "raw"
    for wrong in ("Raw", None, 1, True, ["raw"]):
        with pytest.raises(ValueError, match="^max_of must be one of 'corrected', 'raw', got "):
            arguments.choice("max_of", wrong, ("corrected", "raw"))


# float_dtype


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ("bfloat16", jnp.bfloat16),
        (jnp.float16, jnp.float16),
        (np.dtype("float32"), jnp.float32),
        (np.float32, jnp.float32),
        (float, jnp.float32),
        (jnp.complex64, jnp.complex64),
    ],
)
def test_float_dtype_takes_every_spelling(value, dtype):
    result = arguments.float_dtype("mu_dtype", value)
    assert isinstance(result, np.dtype)
    assert result == dtype


def test_float_dtype_none_stays_none():
    assert arguments.float_dtype("mu_dtype", None) is None


def test_float_dtype_is_the_widest_that_jax_is_configured_for():
    assert arguments.float_dtype("mu_dtype", "float64") == jnp.float32
    with x64():
        assert arguments.float_dtype("mu_dtype", "float64") == jnp.float64


@pytest.mark.parametrize("value", ["floaty", 3, 0.5, np.ones(2), jnp.ones(2)], ids=repr)
def test_float_dtype_refuses_what_is_no_dtype(value):
    with pytest.raises(
        TypeError, match=rf"^mu_dtype must be a dtype, got {re.escape(repr(value))}"
    ):
        arguments.float_dtype("mu_dtype", value)


@pytest.mark.parametrize(("value", "came"), [(int, "int"), ("int8", "int8"), (bool, "bool")])
def test_float_dtype_refuses_integers(value, came):
    message = f"^mu_dtype must be a floating or complex dtype, got {came}"
    with pytest.raises(TypeError, match=message):
        arguments.float_dtype("mu_dtype", value)


# transformation


def test_a_transformation_is_made_to_accept_extra_arguments():
    inner = arguments.transformation("inner", optax.scale(2.0))
    assert isinstance(inner, optax.GradientTransformationExtraArgs)
    update, _ = inner.update([jnp.ones(1)], inner.init(jnp.ones(1)), None, loss=jnp.ones(()))
    assert_close(update, [np.array([2.0])])


@pytest.mark.parametrize("value", [None, 3, "adam", (lambda p: p, lambda u, s: (u, s))])
def test_what_is_no_transformation_is_refused(value):
    with pytest.raises(TypeError, match=r"^inner must be an optax.GradientTransformation, got "):
        arguments.transformation("inner", value)


@pytest.mark.parametrize("factory", [optax.adam, at.scale_by_adam])
def test_an_uncalled_factory_is_refused_with_the_remedy(factory):
    with pytest.raises(TypeError, match=r"^inner must be .*call the factory first$"):
        arguments.transformation("inner", factory)
