"""Optax's own tests of its Adam, AMSGrad, clipping and apply_updates, with ours in their place.

The tests ship in Optax's wheel. They are imported, and run, while every module of Optax that holds
one of the functions below holds ours instead: `adam` and `adamw` are our presets; `nadam`, `nadamw`
and `amsgrad` are Optax's aliases over our `scale_by_adam` and `scale_by_amsgrad`.

A test is chosen if what it is parametrised with, or named after, is one of these (`SUBJECTS`), and
it passes only if the piece of ours that stands for its subject has really run.
"""

import collections
import contextlib
import functools
import importlib
import inspect
import os
import re
import sys
import unittest
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax
import pytest
from optax._src import alias, transform, update
from optax.transforms import _clipping

import adam_transforms as at

# Optax's code mixes dtypes and its tests count on it; they use what JAX has deprecated since.
pytestmark = [
    pytest.mark.usefixtures("relaxed_promotion"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# For each test module: which tests, by "method" or "method(parameters)", and their subject.
SUBJECTS = {
    "optax._src.alias_test": r"opt_name='(adam|adamw|nadam|nadamw|amsgrad)'",
    "optax._src.transform_test": r"^test_(scalers_adam|rms_match_adam)$",
    "optax._src.float64_test": r"_outputs_(scale_by_adam|adamw?|clip|clip_by_global_norm)$",
    "optax._src.sharding_test": r"_(adamw?|nadamw?|amsgrad)$",
    "optax._src.update_test": r"^test_(?:none_argument_)?(apply_updates)(?:_mixed_precision)?$",
    "optax.transforms._clipping_test": r"^test_(clip|clip_by_global_norm)$",
}

# scale_by_rms against scale_by_adam(b1=0), to 1e-6: asks for the rounding error of Optax's own
# bias correction, which both of its own have and ours has not.
# Two tests outside these modules ask for the like: contrib's test_schedule_free_adamw, for the same
# correction, and test_mu_dtype_controls_moment_dtype, for a nu in bfloat16.
EXCEPTED = "test_rms_match_adam"

# What must have run for a subject: itself, unless named here.
STANDS_FOR = {
    "nadam": "scale_by_adam",
    "nadamw": "scale_by_adam",
    "amsgrad": "scale_by_amsgrad",
    "scalers_adam": "scale_by_adam",
    "rms_match_adam": "scale_by_adam",
}

# What the second tier alone tries: adam and nadamw are the same with decay and without Nesterov.
ALIKE = ("adamw", "nadam")

USED: collections.Counter[str] = collections.Counter()


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        USED[name] += 1
        return function(*args, **kwargs)

    return wrapper


def counted_factory(name: str, factory: Callable[..., Any]) -> Callable[..., Any]:
    """Counts the calls of the transformation's init and update: tests may make it at import."""

    @functools.wraps(factory)
    def wrapper(*args, **kwargs):
        init, update = factory(*args, **kwargs)
        return optax.GradientTransformationExtraArgs(counted(name, init), counted(name, update))

    return wrapper


def clip(max_delta):
    """Our `clip_by_value`, under the argument name that Optax's `clip` has."""
    return at.clip_by_value(max_delta)


REPLACEMENTS = [
    (transform.scale_by_adam, counted_factory("scale_by_adam", at.scale_by_adam)),
    (transform.scale_by_amsgrad, counted_factory("scale_by_amsgrad", at.scale_by_amsgrad)),
    (alias.adam, counted_factory("adam", at.adam)),
    (alias.adamw, counted_factory("adamw", at.adamw)),
    (_clipping.clip, counted_factory("clip", clip)),
    (_clipping.clip_by_global_norm, counted_factory("clip_by_global_norm", at.clip_by_global_norm)),
    (update.apply_updates, counted("apply_updates", at.apply_updates)),
]


@contextlib.contextmanager
def ours_in_optax() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "optax"]:
            for attribute, value in list(vars(module).items()):
                for theirs, ours in REPLACEMENTS:
                    if value is theirs:
                        patch.setattr(module, attribute, ours)
        yield


class Chosen(NamedTuple):
    case: unittest.TestCase
    subject: str


def chosen_tests() -> Iterator[Any]:
    with ours_in_optax(), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv(
            "XLA_FLAGS", os.environ.get("XLA_FLAGS", "")
        )  # sharding_test sets it at import
        for name in SUBJECTS:
            sys.modules.pop(name, None)
        modules = {name: importlib.import_module(name) for name in SUBJECTS}
    seen = set()
    for name, pattern in SUBJECTS.items():
        for _, kind in inspect.getmembers(modules[name], inspect.isclass):
            if not issubclass(kind, unittest.TestCase):
                continue
            for method in unittest.TestLoader().getTestCaseNames(kind):
                parameters = getattr(getattr(kind, method), "__x_params_repr__", "")
                found = re.search(pattern, method + parameters)
                if found:
                    excepted = pytest.mark.xfail(raises=AssertionError, strict=True)
                    marks = [excepted] if method == EXCEPTED else []
                    # The first tier tries each of its tests once on each piece that is not alike.
                    test = name, method.rstrip("0123456789"), found[1]
                    marks += [pytest.mark.slow] if test in seen or found[1] in ALIKE else []
                    seen.add(test)
                    yield pytest.param(
                        Chosen(kind(method), found[1]),
                        id=f"{name.rpartition('.')[2]}-{readable(method, parameters)}",
                        marks=marks,
                    )


def readable(method: str, parameters: str) -> str:
    """ "test_x12(a='b', c=<class 'm.d'>)" as "test_x12-b-d"."""
    values = re.sub(r"<\w+ '?(?:\w+\.)*(\w+)[^>]*>", r"\1", parameters.strip("()"))
    values = re.sub(r"(, )?opt_kwargs=\{.*?\}|\w+=|'", "", values).replace(", ", "-")
    return f"{method}-{values}" if values else method


CHOSEN = list(chosen_tests())


@pytest.fixture
def ours(monkeypatch) -> Iterator[None]:
    was = jax.config.read("jax_enable_x64")  # float64_test leaves it on where it fails
    if jax.__version_info__ >= (0, 10):
        # sharding_test skips below "0.7.2", and compares as text: "0.10" would be skipped.
        monkeypatch.setattr(jax, "__version__", "0.9")
    USED.clear()
    with ours_in_optax():
        yield
    jax.config.update("jax_enable_x64", was)


@pytest.mark.parametrize("chosen", CHOSEN)
def test_passes_optax_test(chosen: Chosen, ours):
    result = unittest.TestResult()
    chosen.case.run(result)
    if result.errors:
        pytest.fail("\n".join(trace for _, trace in result.errors), pytrace=False)
    if result.failures:
        raise AssertionError("\n".join(trace for _, trace in result.failures))
    if result.skipped:
        pytest.skip(result.skipped[0][1])
    piece = STANDS_FOR.get(chosen.subject, chosen.subject)
    assert USED[piece] > 0, f"our {piece} did not run; {dict(USED)} did"


def test_every_piece_of_ours_is_put_to_optax_tests():
    subjects = {param.values[0].subject for param in CHOSEN}
    pieces = {STANDS_FOR.get(subject, subject) for subject in subjects}
    assert pieces == {
        "adam",
        "adamw",
        "scale_by_adam",
        "scale_by_amsgrad",
        "clip",
        "clip_by_global_norm",
        "apply_updates",
    }
    counts = collections.Counter(param.id.split("-")[0] for param in CHOSEN)
    assert counts.keys() == {name.rpartition(".")[2] for name in SUBJECTS}
    assert counts["alias_test"] >= 100


def test_optax_is_left_as_it_was():
    with ours_in_optax():
        assert optax.adam is not REPLACEMENTS[2][0]
    for theirs, ours in REPLACEMENTS:
        for module in (optax, transform, alias, _clipping, update):
            assert getattr(module, theirs.__name__, theirs) is theirs
            assert ours not in vars(module).values()
