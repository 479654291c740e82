"""Any per-row chain of transformations, run on the touched rows alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms import _arguments, _trees
from adam_transforms._accumulation import AccumulateState
from adam_transforms._averaging import ParamsEmaState
from adam_transforms.sparse._rows import SparseRows


class LazyState(NamedTuple):
    """State of `lazy`: that of the inner transformation, with slots of whole tables."""

    inner_state: Any


def lazy(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Makes a chain lazy: of a table with a row gradient, only the touched rows are updated.

    For each gradient that is a `SparseRows` it gathers the touched rows of the parameter and of
    every slot that mirrors it, runs `inner` on these small dense arrays as if they were the whole
    parameter, and scatters the slots' rows back. All other rows, of slots and parameters, stay
    bit-identical. Dense gradients pass through `inner` in the same call, and a global norm spans
    both. Time and memory are O(rows touched), whatever V, and in place where the state is donated.

    Duplicate rows are summed first. Counts are global: bias corrections and schedules are those of
    the step, not of a row's own history. Decay of weights acts on touched rows only.

    Args:
      inner: any transformation, or chain, that treats the rows of a table alike and apart. What
        mixes rows and shows it in the shapes of its state is refused; a transformation that
        mixes rows and keeps no such state (one that normalizes by the norm of a column, say)
        cannot be told from one that does not, and would see the touched rows only.

    Returns:
      A transformation with `LazyState`. Updates are `SparseRows` where the gradients are.

    Raises:
      ValueError: `inner` accumulates gradients, averages a table's parameters, or has a state that
        is not kept by row; update was given row gradients but no `params`.

    References:
      The rule is that of TensorFlow's contrib.opt.LazyAdamOptimizer.

    >>> import jax.numpy as jnp, optax
    >>> tx = lazy(optax.adam(0.1))
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> rows = SparseRows(jnp.array([2, 2]), jnp.array([[1.0], [1.0]]), num_rows=4)
    >>> updates, state = tx.update({"table": rows}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["table"].round(3).tolist()
    [[0.0], [0.0], [-0.1...], [0.0]]
    """
    inner = _arguments.transformation("inner", inner)

    def init(params: Any) -> LazyState:
        state = inner.init(params)
        if any(_trees.find_states(state, k) for k in (AccumulateState, optax.MultiStepsState)):
            raise ValueError(
                "lazy cannot hold a transformation that accumulates gradients, for its buffers are "
                "of whole tables; put accumulation around lazy: accumulate(lazy(chain), every)"
            )
        return LazyState(state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        leaves, treedef = _trees.flatten_with_paths(updates)
        tables = {
            i: leaf.sum_duplicates()
            for i, (_, leaf) in enumerate(leaves)
            if isinstance(leaf, SparseRows)
        }
        if not tables:
            updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
            return updates, LazyState(inner_state)
        if params is None:
            raise ValueError(
                "lazy takes the touched rows out of params: update needs them, got None"
            )
        names = ("the updates", "the parameters")
        rows, _ = _trees.align(updates, params, names=names)
        param_leaves = [p for _, _, p in rows]

        owners = _slot_owners(inner, treedef, param_leaves, list(tables), [p for p, *_ in rows])
        state_leaves, state_def = jax.tree.flatten(state.inner_state)
        if len(owners) != len(state_leaves):
            raise ValueError("the state is not one that init made for these parameters")

        small_updates = treedef.unflatten(
            [tables[i].masked_values() if i in tables else g for i, (_, g) in enumerate(leaves)]
        )
        small_params = treedef.unflatten(
            [_gather(p, tables.get(i)) for i, p in enumerate(param_leaves)]
        )
        small_state = state_def.unflatten(
            [_gather(x, tables.get(owner)) for x, owner in zip(state_leaves, owners, strict=True)]
        )
        small_updates, small_state = inner.update(
            small_updates, small_state, small_params, **extra_args
        )
        new_updates = [
            tables[i].with_values(u) if i in tables else u
            for i, u in enumerate(treedef.flatten_up_to(small_updates))
        ]
        new_state = [
            _scatter(x, tables.get(owner), small)
            for x, owner, small in zip(
                state_leaves, owners, state_def.flatten_up_to(small_state), strict=True
            )
        ]
        return treedef.unflatten(new_updates), LazyState(state_def.unflatten(new_state))

    return optax.GradientTransformationExtraArgs(init, update)


def _slot_owners(
    inner: optax.GradientTransformationExtraArgs,
    treedef: Any,
    params: list[Any],
    tables: list[int],
    paths: list[str],
) -> list[int]:
    """For each leaf of the inner state, the table whose slot it is, or -1.

    A slot is what grows by one row when the table does: `inner.init` is asked for its shapes, with
    each table as it is and with one row more.
    """

    def state_of(params: list[Any]) -> Any:
        return jax.eval_shape(inner.init, treedef.unflatten(params))

    shapes = [jax.eval_shape(lambda p=p: p) for p in params]
    before = jax.tree_util.tree_flatten_with_path(state_of(shapes))[0]
    owners = [-1] * len(before)
    for table in tables:
        shape = shapes[table].shape
        taller = jax.ShapeDtypeStruct((shape[0] + 1, *shape[1:]), shapes[table].dtype)
        grown = state_of([taller if i == table else s for i, s in enumerate(shapes)])
        for i, ((key_path, old), new) in enumerate(
            zip(before, jax.tree.leaves(grown), strict=True)
        ):
            if old.shape == new.shape:
                continue
            if new.shape != (old.shape[0] + 1, *old.shape[1:]) or old.shape[0] != shape[0]:
                raise ValueError(
                    f"lazy needs a state that is kept by row, but {_trees.path_str(key_path)!r} "
                    f"changes from {list(old.shape)} to {list(new.shape)} when {paths[table]!r} "
                    "gets a row more"
                )
            owners[i] = table
        for ema in _trees.find_states(grown, ParamsEmaState):
            if any(x.shape == taller.shape for x in jax.tree.leaves(ema.ema)):
                raise ValueError(
                    f"params_ema inside lazy would not average the idle rows of {paths[table]!r}; "
                    "mask it to the other parameters (optax.masked)"
                )
    return owners


def _gather(x: Any, rows: SparseRows | None) -> Any:
    """The touched rows of `x`, zeros at padding; all of it if there is no row gradient."""
    if rows is None or x is None:
        return x
    return rows.gather(jnp.asarray(x))


def _scatter(x: Any, rows: SparseRows | None, small: Any) -> Any:
    """`x` with its touched rows replaced."""
    if rows is None:
        return small
    return rows.scatter(x, small.astype(x.dtype))
