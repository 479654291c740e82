"""Float32 copies of low-precision parameters, so that rounding loses no small updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.sparse_rows import SparseRows, on_values
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.state_layout import Role, find_fields, register
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._transforms.apply_updates import apply_update


@register(master=Role.COPY, inner_state=Role.INNER)
class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
      master: like the parameters: the unrounded float32 copy of each real parameter below float32,
        None for every other parameter.
      inner_state: the state of the inner transformation, as for float32 parameters.
    """

    master: Params
    inner_state: State


def master_weights(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs `inner` on float32 copies (masters) of parameters below float32.

    .. math::
      u_t = \mathrm{inner}(g_t, w_{t-1}), \qquad w_t = w_{t-1} + u_t, \qquad
      p_t = \mathrm{round}(w_t)

    A bfloat16 parameter at 1.0 does not change by steps of 1e-3; its master does, and the parameter
    is the rounded master. `inner` receives masters as parameters, and gradients in at least
    float32: its slots and updates are those of a float32 run with the same gradients. All other
    parameters are passed to `inner` unchanged.

    The updates, in at least float32, are the differences ``p_t - p_{t-1}``. Adding and rounding
    them, as `apply_updates` and `optax.apply_updates` do, gives ``p_t`` exactly. (One exception: if
    ``p_t`` is not zero but below about 2^-16 of ``p_{t-1}``, no float32 difference is exact. The
    parameter and its master then become the nearest reachable value, within 2^-24 of ``p_{t-1}``.)

    If an element of a parameter differs from its rounded master, other code has changed the
    parameter (by loading, clipping or a reset). The master then restarts from the parameter.

    Args:
      inner: any transformation or whole optimizer.

    Returns:
      A transformation with `MasterWeightsState`; update needs `params`. `inner` must accept row
      gradients (`lazy`) if there are any; only the updated rows are then read and written.

    Raises:
      ValueError: update got no `params`, or parameters of another dtype than init; `inner` is
        `deferred_adam` for a table below float32.
      TypeError: a parameter has 8 bits or less; JAX does not promote it to a wider dtype.

    Put it outermost, ``master_weights(adam(1e-3, accumulate_every=4, loss_scale="dynamic"))``, or
    directly inside `lazy`. Wrappers inside it compute in float32. A wrapper around it rounds
    updates to the dtype of the gradients, which is exact if each step changes a parameter by less
    than half its value. `params_ema` averages the masters if it is inside `master_weights`, and the
    rounded parameters if it follows.

    >>> import jax.numpy as jnp, optax
    >>> tx = master_weights(optax.sgd(1e-3))
    >>> params = jnp.ones(1, jnp.bfloat16)
    >>> state = tx.init(params)
    >>> for _ in range(10):
    ...     updates, state = tx.update(jnp.ones(1, jnp.bfloat16), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> state.master.round(3).tolist(), params.tolist()
    ([0.99...], [0.98828125])
    """
    inner = arguments.transformation("inner", inner)

    def init(params: Params) -> MasterWeightsState:
        leaves, treedef = trees.flatten_with_paths(params)
        for path, p in leaves:
            if _is_low_precision(p) and jnp.finfo(p.dtype).bits < 16:
                raise TypeError(
                    f"{path!r} is {p.dtype}, to which JAX cannot add a float32 update: "
                    "parameters with a master must be float16 or bfloat16"
                )
        masters = [_to_float32(p) if _is_low_precision(p) else None for _, p in leaves]
        state = inner.init(_with_masters(treedef, masters, leaves))
        _refuse_deferred(state, {path for path, p in leaves if _is_low_precision(p)})
        return MasterWeightsState(treedef.unflatten(masters), state)

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, State]:
        if params is None:
            raise ValueError(
                "master_weights returns updates relative to the parameters: update needs params, "
                "got None: call update(grads, state, params)"
            )
        if type(state) is not MasterWeightsState:
            raise wrong_state(init, updates, state, params)

        def widen(path: Path, g: Any, p: Any) -> Any:
            if not _is_low_precision(p):
                return g
            return on_values(lambda x: x.astype(dtypes.compute_dtype(x.dtype)), g)

        updates = trees.map_leaves(widen, updates, params, names=("the parameters",), rows=True)
        names = ("the parameters", "the updates", "the master weights")
        aligned, treedef = trees.align(params, updates, state.master, names=names)
        masters = []
        for path, p, g, master in aligned:
            if p is not None and _is_low_precision(p) != (master is not None):
                has, was = ("no", "not ") if master is None else ("a", "")
                raise ValueError(
                    f"{path!r} is {jnp.result_type(p)} and has {has} master: when the state was "
                    f"made it was {was}a parameter below float32"
                )
            # With a row gradient only the updated rows are synchronized, by `_update_master`.
            is_dense = master is not None and p is not None and not isinstance(g, SparseRows)
            masters.append(_resync(p, master) if is_dense else master)
        inner_params = _with_masters(treedef, masters, [(path, p) for path, p, *_ in aligned])
        updates, inner_state = inner.update(updates, state.inner_state, inner_params, **extra_args)

        def update_leaf(path: Path, p: Any, u: Any, master: Any) -> tuple[Any, Any]:
            if master is None or p is None or u is None:
                return u, master
            if not isinstance(u, SparseRows):
                return _update_master(path, jnp.asarray(p), master, u)
            rows = u.sum_duplicates()
            old_rows = rows.gather(jnp.asarray(p)), rows.gather(master)
            u, new_master_rows = _update_master(path, *old_rows, rows.values)
            return rows.with_values(u), rows.scatter(master, new_master_rows)

        names = ("the parameters", "the updates of `inner`", "the master weights")
        aligned, treedef = trees.align(params, updates, state.master, names=names)
        updates, master = trees.unzip([update_leaf(*leaf) for leaf in aligned], treedef, outputs=2)
        return updates, MasterWeightsState(master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_low_precision(p: Any) -> bool:
    """Whether `p` is real and below float32."""
    if p is None:
        return False
    dtype = jnp.result_type(p)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _to_float32(p: Any) -> jax.Array:
    """`p` in float32; zeros if it is abstract."""
    if isinstance(p, jax.ShapeDtypeStruct):
        return jnp.zeros_like(p, dtype=jnp.float32)
    return jnp.asarray(p).astype(jnp.float32)


def _with_masters(treedef: Any, masters: list[Any], leaves: list[tuple[Path, Any]]) -> Params:
    """The parameters; each that has a master is replaced by it."""
    return treedef.unflatten(
        [p if m is None else m for m, (_, p) in zip(masters, leaves, strict=True)]
    )


def _refuse_deferred(state: State, low_precision: set[Path]) -> None:
    """Refuses deferred tables below float32: pending updates are applied without the master."""
    for found in find_fields(state, Role.LAST_STEP):
        for path in sorted(low_precision & found.leaves().keys()):
            raise ValueError(
                f"{path!r} is a table of deferred_adam inside master_weights: keep it in float32, "
                "or use lazy_adam"
            )


def _resync(p: Any, master: Any) -> jax.Array:
    """The master, with elements that do not round to `p` replaced by those of `p`."""
    p = jnp.asarray(p)
    wide = p.astype(jnp.float32)
    return jnp.where(dtypes.round_to(master, p.dtype) == wide, master, wide)


def _update_master(
    path: Path, p: jax.Array, master: jax.Array, u: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds `u` to the master. Returns the update from `p` to the rounded master, and the master."""
    master = apply_update(path, _resync(p, master), u)
    target, wide = dtypes.round_to(master, p.dtype), p.astype(jnp.float32)
    # The difference of two equal infinities is NaN, not zero.
    change = jnp.where(target == wide, jnp.zeros((), jnp.float32), target - wide)
    reached = dtypes.round_to(wide + change, p.dtype)
    change = change.astype(dtypes.compute_dtype(u.dtype))
    return change, jnp.where(reached == target, master, reached)
