"""Float64 values that know how far float32 arithmetic may be from them: a running error analysis.

The formulas of `reference` take these in place of arrays. What comes out is the exact result, and a
bound of the error of any program that computes the same formula in float32. So a comparison needs
no tolerance that somebody chose: it follows from the precision and from the sizes of the values met
on the way.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

# Half a unit in the last place of one, and the smallest number that is not flushed to zero.
UNIT, TINY = 2.0**-24, 2.0**-126
# One operation of a formula takes up to so many of a program. For example, of `b * m` the accurate
# form of a moving average makes `m - (1 - b) * m`: a rounding of 1 - b, of the product, of the sum.
ROUNDINGS = 4


class Bounded(np.lib.mixins.NDArrayOperatorsMixin):
    """A float64 or complex128 array, and a bound of the distance of each element's float32 value.

    Operations with numbers and arrays take these for exact. An infinity is exact.
    """

    def __init__(self, value: Any, error: Any = 0.0):
        value = np.asarray(value)
        self.value = value.astype(np.result_type(value, np.float64))
        error = np.where(np.isnan(error), np.inf, error)
        self.error = np.where(np.isfinite(self.value), error, 0.0)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **_: Any) -> Any:
        if method != "__call__" or ufunc not in _UFUNCS:
            return NotImplemented
        with np.errstate(all="ignore"):
            return _UFUNCS[ufunc](*(x if isinstance(x, Bounded) else Bounded(x) for x in inputs))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return _FUNCTIONS[function](*args, **kwargs)

    def __repr__(self) -> str:
        return f"{self.value} +- {self.error}"


def rounded(x: Bounded, dtype: Any) -> Bounded:
    """`x` as it is stored in `dtype`."""
    info = jnp.finfo(dtype)
    if info.nmant >= 23:
        return x
    half = float(info.eps) / 2 * (np.abs(x.value) + x.error)
    return Bounded(x.value, x.error + half + float(info.smallest_subnormal))


def overflowing(x: Any) -> Any:
    """`x`, with infinity for what float32 does not represent; an array is of float64 and stays."""
    if not isinstance(x, Bounded):
        return x
    largest = float(np.finfo(np.float32).max)
    return Bounded(np.where(x.value > largest, np.inf, x.value), x.error)


def _operation(value: Any, error: Any) -> Bounded:
    """The result of an operation on numbers whose own errors lead to `error`."""
    return Bounded(value, error + ROUNDINGS * (UNIT * (np.abs(value) + error) + TINY))


def _multiply(x: Bounded, y: Bounded) -> Bounded:
    error = np.abs(x.value) * y.error + np.abs(y.value) * x.error + x.error * y.error
    return _operation(x.value * y.value, error)


def _divide(x: Bounded, y: Bounded) -> Bounded:
    value = x.value / y.value
    least = np.abs(y.value) - y.error
    error = np.where(least > 0, (x.error + np.abs(value) * y.error) / least, np.inf)
    return _operation(value, error)


def _sqrt(x: Bounded) -> Bounded:
    root = np.sqrt(x.value)
    least = np.sqrt(np.maximum(x.value - x.error, 0.0))
    # The difference of two roots is that of their squares divided by their sum.
    error = x.error / np.maximum(root + least, np.sqrt(x.error))
    return _operation(root, np.where(x.error > 0, error, 0.0))


def _either(choose: np.ufunc) -> Callable[[Bounded, Bounded], Bounded]:
    def chosen(x: Bounded, y: Bounded) -> Bounded:
        value = choose(x.value, y.value)
        highest = choose(x.value + x.error, y.value + y.error)
        lowest = choose(x.value - x.error, y.value - y.error)
        return Bounded(value, np.maximum(highest - value, value - lowest))

    return chosen


def _of_values(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: fn(*(x.value for x in arguments))


_UFUNCS: dict[Any, Callable[..., Any]] = {
    np.add: lambda x, y: _operation(x.value + y.value, x.error + y.error),
    np.subtract: lambda x, y: _operation(x.value - y.value, x.error + y.error),
    np.multiply: _multiply,
    np.divide: _divide,
    np.sqrt: _sqrt,
    np.square: lambda x: _multiply(x, x),
    np.negative: lambda x: Bounded(-x.value, x.error),
    np.absolute: lambda x: _operation(np.abs(x.value), x.error),
    np.maximum: _either(np.maximum),
    np.minimum: _either(np.minimum),
    **{fn: _of_values(fn) for fn in (np.isfinite, np.greater, np.less)},
}


def _sum(x: Bounded) -> Bounded:
    error = np.sum(x.error) + x.value.size * UNIT * np.sum(np.abs(x.value))
    return _operation(np.sum(x.value), error)


def _where(condition: Any, x: Any, y: Any) -> Bounded:
    x, y = (z if isinstance(z, Bounded) else Bounded(z) for z in (x, y))
    return Bounded(np.where(condition, x.value, y.value), np.where(condition, x.error, y.error))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.sum: _sum,
    np.where: _where,
    np.zeros_like: lambda x: Bounded(np.zeros_like(x.value)),
    np.real: lambda x: Bounded(x.value.real, x.error),
    np.imag: lambda x: Bounded(x.value.imag, x.error),
    np.clip: lambda x, low, high: np.minimum(np.maximum(x, low), high),
    np.iscomplexobj: lambda x: np.iscomplexobj(x.value),
}
