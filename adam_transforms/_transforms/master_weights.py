"""Float32 copies of low-precision parameters, which take the steps that the parameters round."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.sparse_rows import SparseRows, on_values
from adam_transforms._core.state_layout import Role, find_fields, register
from adam_transforms._transforms.apply_updates import apply_update


@register(master=Role.COPY, inner_state=Role.INNER)
class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
      master: like the parameters, float32: each of them that is real and below float32, unrounded;
        None in place of every other.
      inner_state: the state of the inner transformation, as for float32 parameters.
    """

    master: Any
    inner_state: Any


def master_weights(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs `inner` on float32 copies of the parameters that are kept in less.

    .. math::
      u_t = \mathrm{inner}(g_t, w_{t-1}), \qquad w_t = w_{t-1} + u_t, \qquad
      p_t = \mathrm{round}(w_t)

    A bfloat16 parameter at 1.0 never moves by steps of 1e-3; its master does, and takes the
    parameter along. `inner` sees masters for parameters and gradients in at least float32: its
    slots and steps are those of a float32 run with the same gradients. All other parameters are
    its own affair, without a copy.

    The updates, in float32 at least, are the differences ``p_t - p_{t-1}``. To add and
    round them, as `apply_updates` and `optax.apply_updates` do, gives ``p_t`` exactly. (In float32
    no difference leads from p to what is less than some 2^-16 of it, but for zero. The parameter
    then comes as near as float32 does, within 2^-24 of p, and the master with it.)

    A parameter that is not its master rounded was changed by other code - loaded, clipped, reset:
    that element's master starts anew from it.

    Args:
      inner: any transformation or whole optimizer.

    Returns:
      A transformation with `MasterWeightsState`; `update` needs `params`. Row gradients are for
      `inner` to take (`lazy`); of such a table the rows that are updated are read and written.

    Raises:
      ValueError: update got no `params`, or parameters of another dtype than init; `inner` defers
        the rows of a table below float32.
      TypeError: a parameter is in 8 bits or less, which JAX adds to nothing wider.

    It comes outermost: ``master_weights(adam(1e-3, accumulate_every=4, loss_scale="dynamic"))``, or
    right inside `lazy`. Wrappers inside see float32; those around it hand on what they make of low
    precision gradients in that precision, which is exact only while a step changes a parameter by
    less than half. `params_ema` inside averages the masters; after it, the rounded parameters.

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

    def init(params: Any) -> MasterWeightsState:
        leaves, treedef = trees.flatten_with_paths(params)
        for path, p in leaves:
            if _is_narrow(p) and jnp.finfo(p.dtype).bits < 16:
                raise TypeError(
                    f"{path!r} is {p.dtype}, which updates in float32 cannot be added to: "
                    "parameters with a master must be float16 or bfloat16"
                )
        masters = [_copy(p) if _is_narrow(p) else None for _, p in leaves]
        state = inner.init(_with_masters(treedef, masters, leaves))
        _refuse_deferred(state, {path for path, p in leaves if _is_narrow(p)})
        return MasterWeightsState(treedef.unflatten(masters), state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        if params is None:
            raise ValueError("master_weights rounds to the parameters: update needs params")

        def widen(path: str, g: Any, p: Any) -> Any:
            if not _is_narrow(p):
                return g
            return on_values(lambda x: x.astype(dtypes.compute_dtype(x.dtype)), g)

        updates = trees.map_leaves(widen, updates, params, names=("the parameters",), rows=True)
        names = ("the parameters", "the updates", "the master weights")
        aligned, treedef = trees.align(params, updates, state.master, names=names)
        masters = []
        for path, p, g, master in aligned:
            if _is_narrow(p) and master is None:
                raise ValueError(
                    f"{path!r} is {jnp.result_type(p)} and has no master: it was no parameter "
                    "below float32 when the state was made"
                )
            # Of a table with a row gradient the rows follow when they are updated.
            whole = master is not None and p is not None and not isinstance(g, SparseRows)
            masters.append(_resync(p, master) if whole else master)
        seen = _with_masters(treedef, masters, [(path, p) for path, p, *_ in aligned])
        updates, inner_state = inner.update(updates, state.inner_state, seen, **extra_args)

        def leaf(path: str, p: Any, u: Any, master: Any) -> tuple[Any, Any]:
            if master is None or p is None or u is None:
                return u, master
            if not isinstance(u, SparseRows):
                return _moved(path, jnp.asarray(p), master, u)
            rows = u.sum_duplicates()
            before = rows.gather(jnp.asarray(p)), rows.gather(master)
            u, after = _moved(path, *before, rows.values)
            return rows.with_values(u), rows.scatter(master, after)

        names = ("the parameters", "the updates of `inner`", "the master weights")
        aligned, treedef = trees.align(params, updates, state.master, names=names)
        updates, master = trees.unzip([leaf(*row) for row in aligned], treedef, outputs=2)
        return updates, MasterWeightsState(master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_narrow(p: Any) -> bool:
    """Whether `p` is real and below float32."""
    if p is None:
        return False
    dtype = jnp.result_type(p)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _copy(p: Any) -> jax.Array:
    """`p` in float32; zeros if it is abstract."""
    if isinstance(p, jax.ShapeDtypeStruct):
        return jnp.zeros_like(p, dtype=jnp.float32)
    return jnp.asarray(p).astype(jnp.float32)


def _with_masters(treedef: Any, masters: list[Any], leaves: list[tuple[str, Any]]) -> Any:
    """The parameters, with the masters of those that have one."""
    return treedef.unflatten(
        [p if m is None else m for m, (_, p) in zip(masters, leaves, strict=True)]
    )


def _refuse_deferred(state: Any, narrow: set[str]) -> None:
    """A deferred row is read ahead of its parameter, of which the master knows nothing."""
    for found in find_fields(state, Role.LAST_STEP):
        for path in sorted(narrow & found.leaves().keys()):
            raise ValueError(
                f"{path!r} is a table of deferred_adam inside master_weights: keep it in float32, "
                "or use lazy_adam"
            )


def _resync(p: Any, master: Any) -> jax.Array:
    """The master, started anew from `p` where it does not round to it."""
    p = jnp.asarray(p)
    wide = p.astype(jnp.float32)
    return jnp.where(dtypes.rounded(master, p.dtype) == wide, master, wide)


def _moved(path: str, p: jax.Array, master: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The update that takes `p` to the master's rounded value after `u`, and that master."""
    master = apply_update(path, _resync(p, master), u)
    target, wide = dtypes.rounded(master, p.dtype), p.astype(jnp.float32)
    # Of two infinities there is no difference.
    change = jnp.where(target == wide, jnp.zeros((), jnp.float32), target - wide)
    reached = dtypes.rounded(wide + change, p.dtype)
    change = change.astype(dtypes.compute_dtype(u.dtype))
    return change, jnp.where(reached == target, master, reached)
