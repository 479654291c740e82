"""Parameters whose gradient is None, but which Keras overwrites by their averages.

A variable without a gradient keeps its slots and takes no step. Keras still averages it, and
overwrites it when it overwrites parameters by their averages.
"""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import optax

from adam_transforms._core import trees
from adam_transforms._core.types import Params, Path, State, Updates


def zero_updates() -> optax.GradientTransformationExtraArgs:
    """Replaces updates that are None by zeros, so that later transformations can change all."""

    def update(updates: Updates, state: State, params: Params = None, **_: Any):
        return _fill_with_zeros(updates, params)[0], state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def accept_absent_paths(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, with the gradients of the paths in the argument `without_gradient` set to None."""
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: Updates,
        state: State,
        params: Params = None,
        *,
        without_gradient: Collection[Path] = (),
        **extra_args: Any,
    ):
        leaves, treedef = trees.flatten_with_paths(updates)
        updates = treedef.unflatten([None if path in without_gradient else g for path, g in leaves])
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def pass_absent_paths(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Replaces None gradients by zeros and passes their paths to `inner` as `without_gradient`.

    `inner` wraps a transformation of `accept_absent_paths`. A wrapper that may skip steps returns
    updates only where it receives gradients; the zeros let it return updates everywhere.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates: Updates, state: State, params: Params = None, **extra_args: Any):
        updates, absent = _fill_with_zeros(updates, params)
        return inner.update(updates, state, params, without_gradient=absent, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _fill_with_zeros(updates: Updates, params: Params) -> tuple[Updates, frozenset[Path]]:
    """`updates` with zeros for floating parameters whose update is None, and their paths."""
    rows, treedef = trees.align(params, updates, names=("the parameters", "the gradients"))
    absent = frozenset(
        path
        for path, p, u in rows
        if u is None and p is not None and jnp.issubdtype(jnp.result_type(p), jnp.inexact)
    )
    filled = [jnp.zeros_like(p) if path in absent else u for path, p, u in rows]
    return treedef.unflatten(filled), absent
