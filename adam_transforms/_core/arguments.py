"""Checks of arguments. Errors name the argument, the expected value and the actual value.

A hyperparameter is a Python number, a scalar array (possibly a tracer), or a schedule
``count -> value``. Its range is checked if its value is known at trace time.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adam_transforms._core.types import A

_NUMBERS = int | float | np.integer | np.floating
_ARRAYS = jax.Array | np.ndarray
_SCALARS = _NUMBERS | _ARRAYS

R = TypeVar("R")


def scalar(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Any:
    """Returns a number, NumPy's too, as a Python float, a scalar JAX array unchanged.

    Raises:
      TypeError: `value` is neither a number nor a floating or integer array of shape ().
      ValueError: `value` is known at trace time, and is NaN or out of range.
    """
    if isinstance(value, np.ndarray) and value.shape == () and _is_real(value.dtype):
        value = float(value)
    if isinstance(value, _NUMBERS) and not isinstance(value, bool):
        value = float(value)
        known = value
    elif isinstance(value, _ARRAYS):
        if value.shape != () or not _is_real(value.dtype):
            raise TypeError(
                f"{name} must be a number or a real array of shape (), "
                f"got {value.dtype}{list(value.shape)}"
            )
        known = None if isinstance(value, Tracer) else float(value)
    else:
        raise TypeError(f"{name} must be a number, got {value!r:.200}")
    if known is not None and not (known >= at_least and known > above and known < below):
        limits = [
            text.format(limit)
            for text, limit in ((">= {:g}", at_least), ("> {:g}", above), ("< {:g}", below))
            if math.isfinite(limit)
        ]
        if math.isinf(known) or not limits:
            limits.append("a finite number")
        expected = " and ".join(limits)
        raise ValueError(f"{name} must be {expected}, got {known:g}")
    return value


def _is_real(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def static_number(name: str, value: Any, static_args: Sequence[str] = ()) -> Any:
    """An array of one element, whose value is known, as a Python number; any other value unchanged.

    Args:
      static_args: the arguments that the error tells to list; `name` alone if there are none.

    Raises:
      TypeError: the value is traced.
    """
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} must be a Python number, got a traced value; write "
            f"optax.inject_hyperparams(..., static_args={(*static_args,) or (name,)})"
        )
    is_one = isinstance(value, _ARRAYS) and value.size == 1 and _is_real(value.dtype)
    return value.item() if is_one else value


def scalar_or_schedule(name: str, value: Any, **limits: float) -> Any:
    """`scalar` that also accepts a schedule ``count -> value``, any callable."""
    if callable(value):
        return value
    if isinstance(value, bool) or not isinstance(value, _SCALARS):
        raise TypeError(
            f"{name} must be a number, a scalar array or a schedule, got {value!r:.200}"
        )
    return scalar(name, value, **limits)


def decay_rate(name: str, value: Any) -> Any:
    """A decay rate in [0, 1), or a schedule of decay rates."""
    return scalar_or_schedule(name, value, at_least=0.0, below=1.0)


def positive_int(name: str, value: Any) -> int:
    """A static integer >= 1."""
    value = static_number(name, value)
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an integer, got {value!r:.200}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def flag(name: str, value: Any) -> bool:
    """A static boolean."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r:.200}")
    return bool(value)


def condition(name: str, value: Any) -> Any:
    """A boolean, or a boolean array of shape (), which may be traced."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if not isinstance(value, _ARRAYS) or value.shape != () or value.dtype != bool:
        raise TypeError(f"{name} must be True, False or a boolean array of shape (), got {value!r}")
    return value


def choice(name: str, value: Any, options: tuple[str, ...]) -> str:
    """A string that is one of `options`."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, options))}, got {value!r:.200}"
        )
    return value


def float_dtype(name: str, value: Any) -> np.dtype | None:
    """A floating or complex dtype, or None."""
    if value is None:
        return None
    try:
        dtype = jax.dtypes.canonicalize_dtype(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a dtype, got {value!r:.200}") from error
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"{name} must be a floating or complex dtype, got {dtype}")
    return dtype


_NAMES_ELSEWHERE = {
    "lr": "learning_rate",
    "betas": "b1 and b2",
    "beta1": "b1",
    "beta2": "b2",
    "beta_1": "b1",
    "beta_2": "b2",
    "epsilon": "eps",
    "clipvalue": "clip_value",
    "clipnorm": "clip_norm",
    "global_clipnorm": "clip_global_norm",
    "use_ema": "ema",
    "ema_momentum": "ema",
    "ema_overwrite_frequency": "ema_overwrite_every",
    "gradient_accumulation_steps": "accumulate_every",
    "loss_scale_factor": "loss_scale",
    "mask": "weight_decay_mask",
}
"""{argument of PyTorch, TensorFlow, Keras or `optax.adamw`: of this package}."""

_INSTEAD = {
    **{
        f"clip_{by}": f"chain(lazy(clip_by_{by}(...)), {{fn}}(...))"
        for by in ("value", "norm", "global_norm")
    },
    "accumulate_every": "accumulate({fn}(...), every, like=...), like its gradients",
    "accumulate_like": "accumulate({fn}(...), every, like=...), like its gradients",
    "loss_scale": "dynamic_loss_scale({fn}(...)) or static_loss_scale({fn}(...), scale)",
    "ema": "lazy_adam(..., ema=...): an average of rows with pending updates has no closed form",
    "ema_overwrite_every": "adam(..., ema_overwrite_every=...), which updates all rows",
    "eps_root": "lazy_adam(..., eps_root=...): the form of pending updates has no such term",
    "nesterov": "lazy_adam(..., nesterov=True): the form of pending updates has no such term",
    "state_bits": "lazy_adam(..., state_bits=...): pending updates need exact moments",
}
"""{argument of some presets: what to write where a preset, `fn`, does not have it}."""


def suggest_names(fn: Callable[A, R]) -> Callable[A, R]:
    """A decorator: the error for an argument that another library or another preset has says what
    to write here."""
    known = inspect.signature(fn).parameters

    @functools.wraps(fn)
    def checked(*args: A.args, **kwargs: A.kwargs) -> R:
        for name in kwargs:
            own = _NAMES_ELSEWHERE.get(name, name)
            if own not in known and own in _INSTEAD:
                own = _INSTEAD[own].format(fn=fn.__name__)
            if name not in known and own != name:
                raise TypeError(f"{fn.__name__} has no argument {name!r}: here it is {own}")
        return fn(*args, **kwargs)

    return checked


def transformation(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """A gradient transformation, extended to accept extra arguments."""
    if not isinstance(value, optax.GradientTransformation):
        hint = "; call the factory first" if inspect.isfunction(value) else ""
        raise TypeError(f"{name} must be an optax.GradientTransformation, got {value!r:.200}{hint}")
    return optax.with_extra_args_support(value)
