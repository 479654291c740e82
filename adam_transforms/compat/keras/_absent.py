"""Gradients that are None, where Keras writes to the parameter all the same.

A variable without a gradient keeps its slots and takes no step, but Keras averages it, and when it
overwrites parameters by their averages, it overwrites this one too.
"""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import optax

from adam_transforms._core import trees


def zero_updates() -> optax.GradientTransformationExtraArgs:
    """Zeros in place of updates that are None: what comes after may move every parameter."""

    def update(updates: Any, state: Any, params: Any = None, **_: Any):
        return _complete(updates, params)[0], state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def by_name(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, to which the gradients of the paths in `without_gradient` are None."""
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        without_gradient: Collection[str] = (),
        **extra_args: Any,
    ):
        leaves, treedef = trees.flatten_with_paths(updates)
        updates = treedef.unflatten([None if path in without_gradient else g for path, g in leaves])
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def named(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, a wrapper around what `by_name` gives, with updates for gradients that are None.

    A transformation that may skip the step returns updates for what it was given gradients for.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        updates, absent = _complete(updates, params)
        return inner.update(updates, state, params, without_gradient=absent, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _complete(updates: Any, params: Any) -> tuple[Any, frozenset[str]]:
    """Zeros for what is None and a floating parameter, and the paths of these."""
    rows, treedef = trees.align(params, updates, names=("the parameters", "the gradients"))
    absent = frozenset(
        path
        for path, p, u in rows
        if u is None and p is not None and jnp.issubdtype(jnp.result_type(p), jnp.inexact)
    )
    complete = [jnp.zeros_like(p) if path in absent else u for path, p, u in rows]
    return treedef.unflatten(complete), absent
