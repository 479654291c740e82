"""Row gradients of Equinox modules.

``import adam_transforms`` does not import this module, because it needs Equinox.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from adam_transforms._core.patterns import Selection
from adam_transforms._core.types import P, Updates
from adam_transforms._embeddings import value_and_grad as _row_gradients
from adam_transforms._transforms import apply_updates as _updates

__all__ = ["apply_updates", "filter_grad", "filter_value_and_grad"]

_ABSENT = object()


def filter_value_and_grad(
    fun: Any = _ABSENT, *, has_aux: bool = False, tables: Selection = "auto", rows_from: Any = None
) -> Callable[..., Any]:
    r"""As `equinox.filter_value_and_grad`, but the gradient of a table is a `SparseRows`.

    The equivalent of `adam_transforms.value_and_grad` for modules. The floating and complex arrays
    of the first argument are differentiated. All its other leaves, and all other arguments, are
    constants.

    Args:
      fun: a function of a module, or of any tree, and any other arguments; returns a scalar, or
        with `has_aux` (scalar, anything). Without `fun` the result is a decorator.
      has_aux: whether `fun` returns a pair.
      tables, rows_from: as for `adam_transforms.value_and_grad`. Paths are relative to the module:
        ``embed/weight`` for ``model.embed``, an `equinox.nn.Embedding`.

    Returns:
      A function from `fun`'s arguments to (value, gradient). The value is `fun`'s result. The
      gradient has the structure of ``eqx.filter(model, eqx.is_inexact_array)``: it is None where
      the model has no floating or complex array.

    Raises:
      TypeError: `fun` is not callable, or its first argument is not passed by position.
      ValueError: as `adam_transforms.value_and_grad`.

    The optimizer is called with the arrays alone: ``tx.init(params)`` and
    ``tx.update(grads, state, params)`` for ``params = eqx.filter(model, eqx.is_inexact_array)``.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> import adam_transforms as at
    >>> model = eqx.nn.Embedding(1000, 2, key=jax.random.key(0))
    >>> tx = at.lazy_adam(0.1, tables="weight")
    >>> state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    >>> def loss(model, ids):
    ...     return jnp.sum((jax.vmap(model)(ids) - 1.0) ** 2)
    >>> @eqx.filter_jit
    ... def step(model, state, ids):
    ...     value, grads = filter_value_and_grad(loss)(model, ids)
    ...     params = eqx.filter(model, eqx.is_inexact_array)
    ...     updates, state = tx.update(grads, state, params)
    ...     return apply_updates(model, updates), state, value
    >>> ids = jnp.array([3, 1])
    >>> model, state, before = step(model, state, ids)
    >>> model, state, value = step(model, state, ids)
    >>> bool(value < before)
    True
    """
    if fun is _ABSENT:
        return functools.partial(
            filter_value_and_grad, has_aux=has_aux, tables=tables, rows_from=rows_from
        )
    _row_gradients.check_loss(fun)
    return eqx.module_update_wrapper(_Differentiated(fun, True, has_aux, tables, rows_from))


def filter_grad(
    fun: Any = _ABSENT, *, has_aux: bool = False, tables: Selection = "auto", rows_from: Any = None
) -> Callable[..., Any]:
    """As `equinox.filter_grad`, but the gradient of a table is a `SparseRows`: see
    `filter_value_and_grad`.

    Returns:
      A function from `fun`'s arguments to its gradient, or with `has_aux` to (gradient, aux).

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> model = eqx.nn.Embedding(1000, 2, key=jax.random.key(0))
    >>> filter_grad(lambda model: jnp.sum(model(jnp.array(3))))(model).weight
    SparseRows(float32[1000,2], 1 of 1000 distinct rows)
    """
    if fun is _ABSENT:
        return functools.partial(filter_grad, has_aux=has_aux, tables=tables, rows_from=rows_from)
    _row_gradients.check_loss(fun)
    return eqx.module_update_wrapper(_Differentiated(fun, False, has_aux, tables, rows_from))


def apply_updates(model: P, updates: Updates, key: jax.Array | None = None) -> P:
    """As `equinox.apply_updates`, but an update may be a `SparseRows`.

    It is `adam_transforms.apply_updates`: each sum is rounded once to the parameter's dtype,
    stochastically with `key`.

    Args:
      model: a module, or any tree.
      updates: a tree like `model`; where a leaf is None the leaf of `model` is unchanged, whatever
        it is.
      key: a PRNG key, a new one for every step; None rounds to nearest.

    Returns:
      The new model, with the structure, shapes and dtypes of `model`.

    Raises:
      ValueError: a structure or shape differs; names the path.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> from adam_transforms import SparseRows
    >>> model = eqx.nn.Embedding(weight=jnp.ones((3, 1)))
    >>> rows = SparseRows(jnp.array([1]), jnp.array([[0.5]]), num_rows=3)
    >>> updates = eqx.tree_at(lambda model: model.weight, model, rows)
    >>> apply_updates(model, updates).weight.tolist()
    [[1.0], [1.5], [1.0]]
    """
    return _updates.apply_updates(model, updates, key=key)


class _Differentiated(eqx.Module):
    """The result of `filter_value_and_grad`, or without `has_value` that of `filter_grad`.

    A module as in Equinox: `eqx.filter_jit` traces the arrays in it, and as an attribute of a class
    it binds to an instance.
    """

    fun: Callable[..., Any]
    has_value: bool
    has_aux: bool
    tables: Any
    rows_from: Any

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.fun

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else eqx.Partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            raise TypeError("the first argument is differentiated and must be given by position")
        model, *others = args
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def of_params(params: Any) -> Any:
            return self.fun(eqx.combine(params, static), *others, **kwargs)

        value, grads = _row_gradients.value_and_grad(
            of_params, has_aux=self.has_aux, tables=self.tables, rows_from=self.rows_from
        )(params)
        if self.has_value:
            return value, grads
        return (grads, value[1]) if self.has_aux else grads


def __dir__() -> list[str]:
    return __all__
