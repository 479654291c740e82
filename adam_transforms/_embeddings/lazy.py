"""Any per-row chain of transformations, run on the touched rows alone."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, patterns, trees
from adam_transforms._core.slots import StateLeaf, find_slots
from adam_transforms._core.sparse_rows import (
    SparseRows,
    distinct_rows,
    first_positions_of_each,
    sum_duplicates_at,
)
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.state_layout import FoundField, Role, find_fields, register
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._embeddings.row_blocks import (
    LAZY_BYTES,
    SMALL_BYTES,
    TABLES_AT_ONCE,
    block_length,
    is_on_mesh,
    over_blocks,
)
from adam_transforms._xla.platform import by_platform
from adam_transforms._xla.row_independence import RowFunction, as_row_function
from adam_transforms._xla.scheduling import materialize, materialize_outputs, token_of_all


@register(inner_state=Role.INNER)
class LazyState(NamedTuple):
    """State of `lazy`: the state of the inner transformation, with slots of whole tables."""

    inner_state: Any


def lazy(
    inner: optax.GradientTransformation, *, tables: patterns.Selection | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Makes a chain lazy: of a table with a row gradient, only the touched rows are updated.

    For each gradient that is a `SparseRows`, `lazy` gathers the touched rows of the parameter and
    of every slot that mirrors it, runs `inner` on these small dense arrays as if they were the
    whole parameter, and scatters the slots' rows back. All other rows, of slots and parameters,
    stay bit-identical. Dense gradients pass through `inner` in the same call, and a global norm
    spans both. Time and memory are O(rows touched), whatever V, and in place where the state is
    donated.

    On a CPU, row gradients of 16 MiB or more in total are updated in blocks of rows that fit into
    the caches. This requires a program of `inner` that computes each row from that row alone and
    from values that all rows share, such as the norm of the gradients. Without such a norm, tables
    with row gradients of less than 4 MiB are updated two at a time, without blocks.

    Duplicate rows are summed first. Counts are global: bias corrections and schedules are those of
    the step, not of a row's own history. Weight decay acts on touched rows only.

    `jax.tree.map` sees a `SparseRows` as two leaves, values and indices; arithmetic on the indices
    raises an error that names them. Use these replacements:

    - for `optax.clip`, `optax.clip_by_global_norm`, `optax.scale`: these, inside `lazy`;
    - for `optax.tree.norm`: `global_norm`; for ``lax.pmean``: `all_reduce_rows`;
    - for `optax.MultiSteps`: `accumulate`; for ``eqx.apply_updates``: `apply_updates`, or Optax's;
    - for a function as the mask or labels of `optax.masked` or `optax.multi_transform`: its result
      for the parameters, ``labels(params)``; or `path_mask` and `by_path`;
    - for ``jax.tree.map(lambda g: g / 4, grads)``: the same with
      ``is_leaf=lambda x: isinstance(x, SparseRows)``; rows have ``+``, ``-``, ``*``, ``/`` and
      `astype`.

    Args:
      inner: any transformation, or chain, that updates each row of a table independently of the
        others. A transformation that mixes rows is refused if the shapes of its state show it
        (Adafactor, SM3). Otherwise it cannot be detected (`optax.scale_by_trust_ratio`, say), and
        is applied to the touched rows only.
      tables: the parameters whose gradients must have rows: one regular expression or several,
        searched for in the path, or a predicate ``(path, leaf) -> bool``. Parameters that
        `optax.masked` or a group hides from `lazy` cannot be selected. A dense gradient of a
        selected parameter is an error; None is allowed. ``()`` selects no parameter. Without
        `tables`, there is a warning if no gradient has rows, once for each structure of gradients.

    Returns:
      A transformation with `LazyState`. Updates are `SparseRows` where the gradients are.

    Raises:
      ValueError: `inner` accumulates gradients over steps; `inner` averages a table by `params_ema`
        with a scheduled decay or with `overwrite_every`; a state array of `inner` depends on a
        table's number of rows, but has no axis of rows; `tables` matches nothing, or a scalar. In
        update: a parameter of `tables` has a dense gradient; `params` is missing although
        gradients have rows or `tables` is given; the state belongs to other parameters.

    A loss that uses a table as a whole has a dense gradient of it. In place of a softmax over all
    rows, sampled softmax reads the rows of the targets and of a sample; in place of an L2 term of
    the table, `inner` decays the rows read (the second example).

    References:
      The rule is that of TensorFlow's contrib.opt.LazyAdamOptimizer; sampled softmax is that of
      Jean et al., `On Using Very Large Target Vocabulary <https://arxiv.org/abs/1412.2007>`_, 2015.

    >>> import jax, jax.numpy as jnp, optax
    >>> tx = lazy(optax.adam(0.1))
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> rows = SparseRows(jnp.array([2, 2]), jnp.array([[1.0], [1.0]]), num_rows=4)
    >>> updates, state = tx.update({"table": rows}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["table"].round(3).tolist()
    [[0.0], [0.0], [-0.1...], [0.0]]

    >>> from adam_transforms import value_and_grad
    >>> def loss(params, hidden, targets, sample):  # for logsumexp(hidden @ table.T, axis=1)
    ...     table = params["table"]
    ...     of_targets = jnp.sum(hidden * table[targets], axis=1, keepdims=True)
    ...     # V / n times the sum over n sampled rows estimates that over all rows but the target.
    ...     of_sample = hidden @ table[sample].T + jnp.log(table.shape[0] / sample.size)
    ...     of_sample = jnp.where(sample == targets[:, None], -jnp.inf, of_sample)
    ...     logits = jnp.concatenate([of_targets, of_sample], axis=1)
    ...     return jnp.mean(jax.nn.logsumexp(logits, axis=1) - of_targets[:, 0])
    >>> tx = lazy(optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1)), tables="table")
    >>> params = {"table": jnp.ones((1000, 2))}
    >>> batch = jnp.ones((2, 2)), jnp.array([3, 5]), jnp.array([3, 7, 9])
    >>> value, grads = value_and_grad(loss)(params, *batch)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> updates["table"]
    SparseRows(float32[1000,2], 5 of 1000 distinct rows)
    """
    inner = arguments.transformation("inner", inner)
    has_tables = tables is not None and not (isinstance(tables, tuple | list) and not tables)
    select = patterns.selector("tables", tables) if has_tables else None
    warned: set[Any] = set()

    def init(params: Params) -> LazyState:
        state = inner.init(params)
        if find_fields(state, Role.BUFFER):
            raise ValueError(
                "lazy cannot hold a transformation that collects gradients over steps: each step "
                "would move the rows that it touches itself. Wrappers nest in this order: "
                "dynamic_loss_scale(accumulate("
                "lazy(optax.chain(clip, adam, decay, learning rate)), every))"
            )
        if find_fields(state, Role.LAST_STEP):
            raise ValueError(
                "lazy cannot hold deferred_adam, which takes row gradients itself: "
                "optax.chain(lazy(clip), deferred_adam(...))"
            )
        if select is not None:
            select(trees.non_none(params))
        return LazyState(state)

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, State]:
        if type(state) is not LazyState:
            raise wrong_state(init, updates, state, params)
        has_rows = bool(trees.find_states(updates, SparseRows))
        if params is None and (has_rows or select is not None):
            raise ValueError(
                "lazy takes the touched rows out of params: update needs params, got None: "
                "call update(grads, state, params)"
            )
        if select is not None:
            _refuse_dense(select, updates, params)
        if not has_rows:
            if tables is None:
                _warn_of_dense(updates, params, warned)
            updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
            return updates, LazyState(inner_state)
        aligned, treedef = trees.align(updates, params, names=("the updates", "the parameters"))
        _, gradients, param_leaves = zip(*aligned, strict=True)
        given = {i: g for i, g in enumerate(gradients) if isinstance(g, SparseRows)}
        first = dict(zip(given, first_positions_of_each([*given.values()]), strict=True))
        for i in given:
            if param_leaves[i] is None:
                raise ValueError(f"{aligned[i][0]!r} has a row gradient, but no parameter")
        axes = {i: len(g.leading_shape) for i, g in given.items()}
        leaves, made = find_slots(
            inner.init, state.inner_state, treedef, param_leaves, axes, caller="lazy"
        )
        state_leaves, state_def = jax.tree.flatten(state.inner_state)
        averages = find_fields(state.inner_state, Role.AVERAGE)
        if state_def != made:
            raise wrong_state(init, updates, state, params)
        found, expected = [*map(jnp.shape, state_leaves)], [leaf.shape for leaf in leaves]
        if found != expected:
            raise _wrong_shape(leaves, found, expected)
        if averages:
            _refuse_averages_by_row(averages, state_leaves, leaves)
        numbers = {aligned[i][0]: g for i, g in given.items() if g.values.ndim == 1}
        if numbers:
            _refuse_common_ranges(state.inner_state, numbers)
        k = len(gradients)

        def update_leaves(*flat: Any) -> list[Any]:
            """`inner` from the leaves of gradients, parameters and state to those of state and
            updates."""
            updates, params = (treedef.unflatten(part) for part in (flat[:k], flat[k : 2 * k]))
            old = flat[2 * k :]
            updates, state = inner.update(updates, state_def.unflatten(old), params, **extra_args)
            new = state_def.flatten_up_to(state)
            found, expected = [*map(jnp.shape, new)], [*map(jnp.shape, old)]
            if found != expected:
                raise _wrong_shape(leaves, found, expected)
            return [*new, *treedef.flatten_up_to(updates)]

        slots = {i: [j for j, leaf in enumerate(leaves) if leaf.table == i] for i in given}
        row_update = _RowUpdate(update_leaves, given, first, slots, bool(averages))
        dense = [None if i in given else g for i, g in enumerate(gradients)]
        done = row_update.run(dense, [*param_leaves], state_leaves)
        new_updates = [
            distinct_rows(given[i], done.indices[i], u) if i in given else u
            for i, u in enumerate(done.updates)
        ]
        return treedef.unflatten(new_updates), LazyState(state_def.unflatten(done.state))

    return optax.GradientTransformationExtraArgs(init, update)


# The leaves of gradients, parameters or state. Among the gradients, tables have None: their
# gradients are in `_RowUpdate.given`.
_Leaves = list[Any]


class _Updated(NamedTuple):
    """The result of a `_RowUpdate`.

    Attributes:
      updates: one for each parameter; that of a table is the values of its rows, (n, D...).
      indices: {table: the indices of these rows, int32 (n,)}.
      state: the new leaves of the state.
    """

    updates: list[Any]
    indices: dict[int, jax.Array]
    state: list[Any]


class _RowUpdate(NamedTuple):
    """An update of some rows of some tables.

    Attributes:
      update: from all leaves of gradients, parameters and state to those of state and updates. The
        leaf of a table's gradient is the values of its distinct rows.
      given: {position of a table among the parameters: its row gradient, with duplicates}.
      first: {table: the positions from `first_positions_of_each`}.
      slots: {table: the positions of its slots among the leaves of the state}.
      averages: whether parameters are averaged, and thus read beside the updates.
    """

    update: Callable[..., list[Any]]
    given: dict[int, SparseRows]
    first: dict[int, jax.Array | None]
    slots: dict[int, list[int]]
    averages: bool

    def run(self, gradients: _Leaves, params: _Leaves, state: _Leaves) -> _Updated:
        """The update, in parts where that pays."""
        sizes = [g.values.nbytes for g in self.given.values()]
        are_known = all(isinstance(size, int) for size in sizes)  # not so under `jax.export`
        are_many = are_known and sum(sizes) >= LAZY_BYTES
        if not are_many or any(is_on_mesh(g.values) for g in self.given.values()):
            return self.at_once(gradients, params, state)
        # First with abstract values: if that succeeds, no table needs the gradient of another.
        values = {i: jax.ShapeDtypeStruct(g.values.shape, g.dtype) for i, g in self.given.items()}
        by_row, rows = self.row_function(values, gradients, params, state), None
        if by_row is None:
            rows = self.summed()
            values = {i: some.values for i, some in rows.items()}
            by_row = self.row_function(values, gradients, params, state)
            if by_row is None:
                return self.at_once(gradients, params, state, rows)
        lengths = [n for g in self.given.values() if (n := block_length(g)) is not None]
        length = min(lengths, default=max(g.indices.size for g in self.given.values()))
        return by_platform(
            lambda params, state: self.in_parts(by_row, rows, length, params, state),
            lambda params, state: self.at_once(gradients, params, state, rows),
            *(params, state),
        )

    def summed(self) -> dict[int, SparseRows]:
        """{table: its touched rows, without duplicates}."""
        return {i: sum_duplicates_at(g, self.first[i]) for i, g in self.given.items()}

    def at_once(
        self,
        gradients: _Leaves,
        params: _Leaves,
        state: _Leaves,
        rows: dict[int, SparseRows] | None = None,
    ) -> _Updated:
        """`update`, with the touched rows of each table as if they were the whole table. `rows` is
        `summed`, where that has been computed before."""
        rows = self.summed() if rows is None else rows
        small_params, small_state = [*params], [*state]
        scattered = [False] * (len(state) + len(params))
        for table, some in rows.items():
            arrays = [params[table], *(state[i] for i in self.slots[table])]
            small_params[table], *gathered = some.gather_each(arrays)
            for i, x in zip(self.slots[table], gathered, strict=True):
                small_state[i], scattered[i] = x, True
        gradients = [rows[i].values if i in rows else g for i, g in enumerate(gradients)]
        small = [*gradients, *small_params, *small_state]
        outputs = materialize_outputs(self.update, small, scattered)
        new, updates = outputs[: len(state)], outputs[len(state) :]
        for table, some in rows.items():
            if self.averages:
                move = some.with_values(updates[table])
                updates[table] = move.after_read(small_params[table]).values
            slots = self.slots[table]
            after = some.scatter_each([state[i] for i in slots], [new[i] for i in slots])
            for i, x in zip(slots, after, strict=True):
                new[i] = x
        return _Updated(updates, {i: some.indices for i, some in rows.items()}, new)

    def row_function(
        self, values: Mapping[int, Any], gradients: _Leaves, params: _Leaves, state: _Leaves
    ) -> RowFunction | None:
        """`update` as a function of some rows; None if rows may interact. `values` are those of the
        row gradients, and may be abstract."""
        of_params = [i if i in self.given else None for i in range(len(params))]
        owner = {i: table for table, slots in self.slots.items() for i in slots}
        of_state = [owner.get(i) for i in range(len(state))]

        def abstract_rows(x: Any, table: int | None) -> Any:
            if table is None:
                return x
            g = self.given[table]
            shape = (g.values.shape[0], *jnp.shape(x)[len(g.leading_shape) :])
            return jax.ShapeDtypeStruct(shape, jnp.result_type(x))

        gradients = [values.get(i, g) for i, g in enumerate(gradients)]
        rest = map(abstract_rows, [*params, *state], [*of_params, *of_state])
        tables = [*of_params, *of_params, *of_state]
        return as_row_function(
            self.update, [*gradients, *rest], tables, out_tables=[*of_state, *of_params]
        )

    def in_parts(
        self,
        by_row: RowFunction,
        rows: dict[int, SparseRows] | None,
        length: int,
        params: _Leaves,
        state: _Leaves,
    ) -> _Updated:
        """As `at_once`, in blocks of `length` rows.

        `rows` is `summed`, or None if `by_row` needs no rows of other tables. The smaller tables
        are then updated as a whole, some at a time.
        """
        new, updates = by_row.shared[: len(state)], by_row.shared[len(state) :]
        indices: dict[int, jax.Array] = {}
        done: list[jax.Array] = []  # tokens of the tables updated as a whole
        for table, given in self.given.items():
            places = self.slots[table]

            def update_block(some: SparseRows, slots: Any, table: int = table) -> Any:
                arrays = [some.values, *some.gather_each([params[table], *slots])]
                *after, values = materialize_outputs(
                    lambda *arrays: by_row.of_rows(table, arrays),
                    arrays,
                    [True] * len(slots) + [False],
                )
                return values, some.scatter_each(slots, after)

            slots = [state[i] for i in places]
            is_small = rows is None and given.values.nbytes < SMALL_BYTES
            if rows is not None:
                some = rows[table]
            elif is_small and len(done) >= TABLES_AT_ONCE:
                # After the slots of an earlier table are written.
                after = done[-TABLES_AT_ONCE]
                some = sum_duplicates_at(given, self.first[table], after=[after])
            else:
                some = sum_duplicates_at(given, self.first[table])
            if is_small:
                updates[table], slots = update_block(some, slots)
                written: Any = slots or [updates[table]]
                # A kernel that contained the token's computation would differ from that of every
                # other table, and XLA would compile each.
                done.append(materialize(token_of_all([x[(slice(1),) * x.ndim] for x in written])))
            else:
                updates[table], slots = over_blocks(update_block, some, slots, length)
            indices[table] = some.indices
            for i, x in zip(places, slots, strict=True):
                new[i] = x
        return _Updated(updates, indices, new)


def _refuse_dense(select: Callable[..., set[int]], updates: Updates, params: Params | None) -> None:
    """Refuses a dense gradient of a parameter that `select` selects."""
    leaves = trees.non_none(params)
    tables = {leaves[i][0]: leaves[i][1] for i in select(leaves)}
    for path, g in trees.non_none(updates):
        if path not in tables or isinstance(g, SparseRows):
            continue
        raise ValueError(
            f"{path!r} is named by tables, but its gradient is dense: dense Adam would move all "
            f"{jnp.shape(tables[path])[0]} rows of the table, at O(V) cost. The gradients of "
            "jax.grad are dense: compute them by adam_transforms.value_and_grad(loss, "
            f"tables={path!r}); its default, tables='auto', leaves a table dense if as many rows "
            "are read as it has. The means of optax.MultiSteps are dense: use "
            "adam_transforms.accumulate. "
            f"adam_transforms.explain(loss, params, ..., tables={path!r}) says "
            "which operation needs the whole table. Such an operation has a substitute by "
            "rows: sampled softmax for a softmax over the table, weight_decay inside lazy for an "
            "L2 term of the table; help(adam_transforms.lazy) shows both"
        )


def _warn_of_dense(updates: Updates, params: Params | None, warned: set[Any]) -> None:
    """Warns that no gradient has rows; once for each structure that is not in `warned`. In scalars
    there are no rows, and a parameter without a gradient may be a table that the step leaves."""
    gradients, structure = jax.tree.flatten(updates)
    is_missing = len(gradients) < len(jax.tree.leaves(params))
    if structure in warned or is_missing or not any(map(trees.shape_of, gradients)):
        return
    warnings.warn(
        "lazy got no row gradient (SparseRows): all rows of all tables move, as without lazy, at "
        "O(V) cost. Compute gradients by adam_transforms.value_and_grad; "
        "adam_transforms.explain(loss, params, ...) says which operation makes one dense. Name "
        'the tables, as in lazy_adam(..., tables="embedding"), to make a dense gradient of one an '
        "error; tables=() says that there are none",
        stacklevel=_level_of_caller(),
    )
    warned.add(structure)


def _level_of_caller() -> int:
    """The `stacklevel`, in the calling function, of the innermost frame of no library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


# What calls `update` on behalf of a training loop.
_LIBRARIES = {"adam_transforms", "optax", "jax", "flax", "equinox", "contextlib"}


def _refuse_averages_by_row(
    averages: Sequence[FoundField], state: Sequence[Any], leaves: Sequence[StateLeaf]
) -> None:
    """Refuses averages that keep no last steps, and would miss the idle rows of a table."""
    by_row = [x for x, leaf in zip(state, leaves, strict=True) if leaf.table is not None]
    for average in averages:
        if average.owner.last_step is not None:
            continue
        for path, ema in average.leaves().items():
            if any(ema is x for x in by_row):
                raise ValueError(
                    f"params_ema inside lazy averages the idle rows of {path!r} only if decay is "
                    "a Python number (under optax.inject_hyperparams, in static_args) and "
                    "overwrite_every is None; or mask it to the other parameters (optax.masked)"
                )


def _refuse_common_ranges(state: State, rows: Mapping[Path, SparseRows]) -> None:
    """Refuses moments whose codes lie in one range for all rows, where each row is a number."""
    for path, of_table in rows.items():
        if any(path in found.leaves() for found in find_fields(state, Role.GROUP_RANGE)):
            raise ValueError(
                f"each row of {path!r} is a number, and compress_moments keeps one range for the "
                "8-bit codes of the whole table: give it the shape "
                f"{[*of_table.shape, 1]}, or 16 bits for nu"
            )


def _wrong_shape(
    leaves: Sequence[StateLeaf], found: Sequence[Any], expected: Sequence[Any]
) -> ValueError:
    """The error for a state in which a leaf has another shape than `inner.init` gave it."""
    i = [a == b for a, b in zip(found, expected, strict=True)].index(False)
    return ValueError(
        f"{leaves[i].path!r} has shape {list(found[i])} in the state, "
        f"but {list(expected[i])} is what init makes for these parameters"
    )
