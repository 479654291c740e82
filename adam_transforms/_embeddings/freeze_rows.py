"""Rows of tables that never move."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adam_transforms._core import arguments, dtypes, patterns, state_layout, trees
from adam_transforms._core.slots import find_slots
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.state_layout import Role
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._embeddings.deferred.state import DeferredAdamState, deferred_tables
from adam_transforms._transforms import numerics
from adam_transforms._transforms.ema import ParamsEmaState


@state_layout.register(frozen=Role.ROW_MASK, inner_state=Role.INNER)
class FreezeRowsState(NamedTuple):
    """State of `freeze_rows`.

    Attributes:
      frozen: for each table with frozen rows a mask, True at these rows: bool (V,), or (F, V) for
        stacked tables. None in place of every other parameter.
      inner_state: the state of the inner transformation.
    """

    frozen: Any
    inner_state: Any


def freeze_rows(
    inner: optax.GradientTransformation, rows: Mapping[str | re.Pattern[str], Any]
) -> optax.GradientTransformationExtraArgs:
    """Keeps some rows of tables, and their slots, unchanged (PyTorch's padding_idx).

    The gradient of a frozen row reaches `inner` as zeros, or as padding in a row gradient: a global
    norm does not include it. Earlier momentum, weight decay and an average that overwrites
    parameters do not move the row or its slots either. An average of the parameters goes on with
    the row's constant value.

    Args:
      inner: the whole optimizer, learning rate and weight decay included.
      rows: {regular expression, searched for in the path: rows of the tables (V, D...) that it
        matches}. Rows are one or several integers in [0, V), a range, or a boolean mask (V,); a
        shorter mask leaves the rows behind it unfrozen. Rows of stacked tables (F, V, D...) are a
        boolean mask (F, V). Several expressions may match one table.

    Returns:
      A transformation with `FreezeRowsState`; `update` needs `params`. It may be inside `lazy` or
      around it. With row gradients it takes O(rows touched) time and no array of the table's size;
      with a dense gradient the rows are selected in the same pass as the update. Put wrappers that
      skip steps around it: ``accumulate(freeze_rows(lazy(chain), rows), every)``.

    Raises:
      ValueError: an expression finds no parameter, or a scalar; a row lies outside the table; a
        state array depends on the table's number of rows, but has no axis of rows;
        `deferred_adam` inside applies weight decay to the table, which moves idle rows. In update:
        `params` is missing; the row axes of a row gradient differ from those of the mask.
      TypeError: rows are given as something else.

    Freeze rows of a table of `deferred_adam` from its first step on: a row that has momentum when
    it is frozen goes on moving until the momentum has decayed.

    >>> import jax.numpy as jnp, optax
    >>> tx = freeze_rows(optax.adamw(0.1), {"embedding": 0})
    >>> params = {"embedding": jnp.ones((3, 1))}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["embedding"].round(2).tolist()
    [[1.0], [0.89...], [0.89...]]
    """
    inner = arguments.transformation("inner", inner)
    if not isinstance(rows, Mapping):
        raise TypeError(f"rows must be a mapping from patterns to rows, got {rows!r:.200}")
    if not rows:
        raise ValueError("rows must hold at least one pattern, got none")
    selections = [(patterns.selector("rows", pattern), rows[pattern]) for pattern in rows]

    def init(params: Any) -> FreezeRowsState:
        leaves, treedef = trees.flatten_with_paths(params)
        frozen: list[Any] = [None] * len(leaves)
        for select, selected in selections:
            for i in select(leaves):
                path, table = leaves[i]
                chosen = _mask(path, selected, table.shape)
                mask = trees.zeros_per_row(table, bool, chosen.ndim) | jnp.asarray(chosen)
                if frozen[i] is not None:
                    mask = _column(mask, frozen[i]) | _column(frozen[i], mask)
                frozen[i] = mask
        state = inner.init(params)
        chosen = {path for (path, _), mask in zip(leaves, frozen, strict=True) if mask is not None}
        _refuse_decayed(state, chosen)
        return FreezeRowsState(treedef.unflatten(frozen), state)

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, State]:
        if params is None:
            raise ValueError(
                "freeze_rows keeps rows of params: update needs params, got None: "
                "call update(grads, state, params)"
            )
        if type(state) is not FreezeRowsState:
            raise wrong_state(init, updates, state, params)
        names = ("the updates", "the parameters")
        aligned, treedef = trees.align(updates, params, names=names)
        masks = _masks(treedef, state.frozen, aligned)
        leaves = [(path, p) for path, _, p in aligned]
        chosen = {i for select, _ in selections for i in select(leaves)}
        if chosen != {i for i, mask in enumerate(masks) if mask is not None}:
            raise wrong_state(init, updates, state, params)
        gradients = [
            g if g is None or mask is None else _mask_rows(path, mask, _as_gradient(path, g))
            for (path, g, _), mask in zip(aligned, masks, strict=True)
        ]
        updates, inner_state = inner.update(
            treedef.unflatten(gradients), state.inner_state, params, **extra_args
        )
        deferred = {
            path
            for found in trees.find_states(inner_state, DeferredAdamState)
            for path in deferred_tables(found)
        }
        names = ("the parameters", "the updates of `inner`")
        moved, treedef = trees.align(params, updates, names=names)
        # A frozen row has no pending updates: its round-robin update is zero.
        kept = [
            u if u is None or mask is None or path in deferred else _mask_rows(path, mask, u)
            for (path, _, u), mask in zip(moved, masks, strict=True)
        ]
        # A row update leaves the slots of frozen rows alone: in it they are padding.
        dense = {
            i: mask
            for i, (mask, u) in enumerate(zip(masks, kept, strict=True))
            if mask is not None and u is not None and not isinstance(u, SparseRows)
        }
        if dense:
            axes = {i: mask.ndim for i, mask in dense.items()}
            slots, state_def = find_slots(
                *(inner.init, state.inner_state, treedef, [p for _, p, _ in moved], axes),
                caller="freeze_rows",
                probe_columns=False,
            )
            slots = state_def.unflatten(slots)
            tables = {i: (mask, jnp.asarray(moved[i][1])) for i, mask in dense.items()}
            inner_state = _keep_frozen_rows(tables, slots, state.inner_state, inner_state)
        return treedef.unflatten(kept), FreezeRowsState(state.frozen, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _mask(path: str, selected: Any, shape: tuple[int, ...]) -> np.ndarray:
    """bool (V,), or of the first axes of the table if `selected` has several: the selected rows."""
    if isinstance(selected, Tracer):
        raise TypeError(f"the rows of {path!r} must be known when the step is traced")
    chosen, num_rows = np.asarray(selected), shape[0]
    if chosen.dtype == bool:
        is_by_row = 0 < chosen.ndim <= max(1, len(shape) - 1)
        if not is_by_row or any(a > b for a, b in zip(chosen.shape, shape, strict=False)):
            stacked = f", of stacked tables {list(shape[:-1])}" if len(shape) > 2 else ""
            raise ValueError(
                f"a mask of the rows of {path!r} must have shape [{num_rows}]{stacked}, or be "
                f"shorter, got {list(chosen.shape)}"
            )
        mask = np.zeros(shape[: chosen.ndim], bool)
        mask[tuple(map(slice, chosen.shape))] = chosen
        return mask
    mask = np.zeros(num_rows, bool)
    if chosen.size:
        if chosen.dtype.kind not in "iu" or chosen.ndim > 1:
            raise TypeError(
                f"the rows of {path!r} must be integers or a boolean mask, got {selected!r:.200}"
            )
        chosen = np.atleast_1d(chosen)
        for row in chosen[(chosen < 0) | (chosen >= num_rows)]:
            raise ValueError(f"the rows of {path!r} must be in [0, {num_rows}), got {row}")
        mask[chosen] = True
    return mask


def _masks(treedef: Any, frozen: Any, aligned: list[tuple[Any, ...]]) -> list[Any]:
    """The mask of each parameter, or None."""
    try:
        masks = treedef.flatten_up_to(frozen)
    except (ValueError, TypeError):
        raise ValueError(
            "the state of freeze_rows was made for parameters of another structure"
        ) from None
    for (path, _, p), mask in zip(aligned, masks, strict=True):
        if mask is None or p is None:
            continue
        now, before = ("x".join(map(str, x[: mask.ndim])) for x in (jnp.shape(p), mask.shape))
        if now != before:
            raise ValueError(
                f"{path!r} has {now} rows in the parameters, but {before} in the state of "
                "freeze_rows"
            )
    return masks


def _as_gradient(path: str, g: Any) -> Any:
    return g if isinstance(g, SparseRows) else trees.as_gradient(path, g)


def _mask_rows(path: Path, mask: jax.Array, x: Any) -> Any:
    """A gradient or an update without the frozen rows."""
    if not isinstance(x, SparseRows):
        return jnp.where(_column(mask, x), jnp.zeros((), x.dtype), x)
    if mask.shape != x.leading_shape:
        raise ValueError(
            f"{path!r} has a row gradient with the row axes {list(x.leading_shape)}: give its "
            f"frozen rows as a boolean mask of this shape, got {list(mask.shape)}"
        )
    indices = jnp.where(x.gather(mask), x.num_rows, x.indices)
    return x.with_rows(indices, x.values, unique=x.unique)


def _column(mask: Any, x: Any) -> jax.Array:
    """A mask (V,) as (V, 1, ...), with at least as many axes as `x`."""
    return jnp.reshape(mask, (*mask.shape, *[1] * (jnp.ndim(x) - mask.ndim)))


def _refuse_decayed(state: State, frozen: set[Path]) -> None:
    for found in trees.find_states(state, DeferredAdamState):
        decayed = {path for path, table in deferred_tables(found).items() if table.decays}
        for path in sorted(frozen & decayed):
            raise ValueError(
                f"freeze_rows cannot keep rows of {path!r} from the weight decay of deferred_adam, "
                "which acts on rows while they are idle: exclude the table with weight_decay_mask, "
                "or use lazy_adam"
            )


def _keep_frozen_rows(
    tables: Mapping[int, tuple[jax.Array, jax.Array]], leaves: Any, old: State, new: State
) -> State:
    """`new` with the frozen rows of all slots as in `old`.

    Args:
      tables: for each table its frozen rows and its values.
      leaves: in the structure of the state, the `StateLeaf` of each leaf.
    """

    def is_special(x: Any) -> bool:
        if isinstance(x, ParamsEmaState):
            return x.last_step is None
        return isinstance(x, DeferredAdamState) or state_layout.is_accumulation(x)

    def keep_average(new: ParamsEmaState, old: ParamsEmaState, leaf: Any) -> ParamsEmaState:
        """With one more step of the constant value of each frozen row."""
        # 1 - weight is the product of the decays of a debiased average, and else zero.
        rest = 1.0 - old.weight
        decay = jnp.where(rest > 0, (1.0 - new.weight) / rest, 1.0)

        def one_more(new: Any, old: Any, leaf: Any) -> Any:
            if leaf.table is None:
                return new
            mask, p = tables[leaf.table]
            dtype = dtypes.compute_dtype(p.dtype, old.dtype)
            ema = numerics.moving_average(old.astype(dtype), p.astype(dtype), decay)
            return jnp.where(_column(mask, new), ema.astype(new.dtype), new)

        return new._replace(ema=jax.tree.map(one_more, new.ema, old.ema, leaf.ema))

    def keep(new: Any, old: Any, leaf: Any) -> Any:
        if isinstance(new, DeferredAdamState):
            return new  # a frozen row has no pending updates
        if isinstance(new, ParamsEmaState):
            return keep_average(new, old, leaf)
        if is_special(new):  # the buffer has zeros there
            inner = {
                name: _keep_frozen_rows(tables, getattr(leaf, name), getattr(old, name), value)
                for name, value in new._asdict().items()
                if state_layout.fields_of(type(new))[name].role is Role.INNER
            }
            return new._replace(**inner)
        if leaf.table is None:
            return new
        return jnp.where(_column(tables[leaf.table][0], new), old, new)

    return jax.tree.map(keep, new, old, leaves, is_leaf=is_special)
