"""Dense Adam's trajectory at the cost of the rows touched.

While its gradient is zero, a row of dense Adam still moves on its remaining momentum. Here such a
row is left alone, and the updates that it misses are pending. They are applied in closed form
(`missed_updates`) when the row is next read, when it is next touched, or when its turn comes in the
round robin that synchronizes every row after at most `max_idle` idle steps.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adam_transforms._core import arguments, dtypes, patterns, trees
from adam_transforms._core.sparse_rows import SparseRows, is_rows
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._embeddings.deferred.chebyshev import Rule, make_rule
from adam_transforms._embeddings.deferred.missed_updates import advance, empty_history, next_count
from adam_transforms._embeddings.deferred.state import (
    DeferredAdamState,
    IdleRows,
    deferred_tables,
    history_dtype,
    is_like,
    map_idle,
    slot_trees,
    with_last_steps,
    with_numbers,
    with_slots,
)
from adam_transforms._embeddings.deferred.table_step import Step, step_leaf, step_table
from adam_transforms._transforms import numerics
from adam_transforms._transforms.adam import Hyperparameters, coefficients_of, init_state
from adam_transforms._xla.scheduling import depend_on


@arguments.suggest_names
def deferred_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    tables: patterns.Selection,
    eps_hat: bool = False,
    amsgrad: bool = False,
    max_of: Literal["corrected", "raw"] = "raw",
    weight_decay: float | jax.Array | None = None,
    weight_decay_mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    max_idle: int = 65536,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam(W) that updates the touched rows of a table now, and the others when they are needed.

    The parameters are dense Adam's, to rounding. A step costs time and memory for the touched rows.
    Let a row have the moments m and v after step s, and be idle (without a gradient) until step t.
    In these steps dense Adam subtracts from the row, without weight decay and AMSGrad,

    .. math::
      \sum_{j=1}^{t-s} \frac{A_{s+j}\, \rho^j\, m}{\sqrt v + x_j}, \qquad
      A_t = \eta_t \frac{\sqrt{1-b_2^t}}{1-b_1^t}, \quad \rho = \frac{b_1}{\sqrt{b_2}}, \quad
      x_j = \epsilon \sqrt{1-b_2^{s+j}}\, b_2^{-j/2}

    (with `eps_hat`, :math:`x_j = \epsilon\, b_2^{-j/2}`). This is the pending update of the row. It
    is computed from a few terms, however long the gap, when the row is synchronized. Until then the
    row in `params` is stale. Read tables through one of:

    - ``value_and_grad(loss, rows_from=state)`` in training;
    - `catch_up`, for any other code that reads some rows;
    - `flush`, before the whole table is read: evaluated, exported, or handed to another optimizer.

    `owed` returns the number of stale rows and the longest idle gap.

    Args:
      learning_rate: a number, a scalar array or a schedule ``count -> value``.
      b1, b2: decay rates, 0 <= b1 < sqrt(b2) < 1 (with `amsgrad`, any below 1): Python numbers, or
        arrays of one element that are not traced.
      eps: a number like b1 and b2; at the default rates at least 1.3e-17, with `eps_hat` 4e-19.
      tables: selects the parameters (V, D...) that are tables: one regular expression or several,
        searched for in the path, or a predicate ``(path, leaf) -> bool``. All other parameters get
        dense Adam.
      eps_hat, amsgrad, max_of, mu_dtype, nu_dtype: as for `adam`.
      weight_decay: decoupled: ``learning_rate * weight_decay * p`` is subtracted. A number or a
        scalar array.
      weight_decay_mask: as for `adam`.
      max_idle: the most steps that a row is idle. In each step a round robin synchronizes
        ceil(V / (max_idle + 1)) rows. The state stores about 30 to 400 bytes for each of these
        steps.

    Returns:
      A transformation with `DeferredAdamState`; `update` needs `params`. The gradient of a table is
      a `SparseRows` marked as `synchronized`, as ``value_and_grad(loss, rows_from=state)`` returns
      it. The update of the table contains the touched rows and the rows of the round robin. In a
      step with a gradient of no rows, all rows are idle. A dense gradient, or None, first applies
      all pending updates of the table. With None, the step then adds nothing. A dense gradient too
      must be computed from rows without pending updates: by `rows_from`, or after `flush`. This is
      not checked, because an array has no mark. Where one jitted function computes gradient and
      update, the pending updates of the rows read are computed once for both.

    Raises:
      ValueError: b1 >= sqrt(b2); eps is too small; `max_idle` is too short for the momentum of an
        idle row to vanish; `tables` matches nothing, or a scalar. In update: rows are not marked as
        `synchronized`; the state was made with other `tables`, `max_idle`, `b1`, `b2`, `eps`,
        `eps_hat`, `amsgrad` or `max_of`, or only the state or only this transformation has
        weight decay.
      TypeError: a table is not of a real floating dtype; b1, b2, eps or max_idle is traced, as
        ``optax.inject_hyperparams`` does with arguments that are not in its ``static_args``.

    After `catch_up` or `flush`, a gradient may be computed without `rows_from`: mark it by
    ``rows.as_synchronized()``. Rows built by hand are marked by
    ``SparseRows(..., synchronized=True)``, as in the example below.

    L2 decay, which is added to the gradient, is not supported: use `weight_decay`. To clip
    gradients, use ``optax.chain(lazy(optax.clip_by_global_norm(1.0)), deferred_adam(...))``.

    >>> import jax.numpy as jnp, optax
    >>> from adam_transforms import SparseRows, flush
    >>> tx = deferred_adam(0.1, tables="table")
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> state = tx.init(params)
    >>> for row in (2, 0):
    ...     rows = SparseRows(jnp.array([row]), jnp.ones((1, 1)), num_rows=4, synchronized=True)
    ...     grads = {"table": rows}
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["table"].round(3).tolist()  # row 2 has moved once; one update is pending
    [[-0.074...], [0.0], [-0.1...], [0.0]]
    >>> params, state = flush(params, state)
    >>> params["table"].round(3).tolist()
    [[-0.074...], [0.0], [-0.16...], [0.0]]
    """
    amsgrad = arguments.flag("amsgrad", amsgrad)
    arguments.choice("max_of", max_of, ("corrected", "raw"))
    b1, b2, eps, max_idle = (
        arguments.static_number(name, value, _STATIC_ARGUMENTS)
        for name, value in (("b1", b1), ("b2", b2), ("eps", eps), ("max_idle", max_idle))
    )
    learning_rate = arguments.scalar_or_schedule("learning_rate", learning_rate)
    if weight_decay is not None:
        weight_decay = arguments.scalar("weight_decay", weight_decay, at_least=0.0)
    hp = Hyperparameters(
        *(b1, b2, eps, 0.0, mu_dtype, nu_dtype, eps_hat), max_of=max_of if amsgrad else None
    ).checked()

    @functools.cache
    def rule_in(dtype: Any) -> Rule:
        form = {"eps_hat": hp.eps_hat, "max_of": hp.max_of, "max_idle": max_idle}
        return make_rule(hp.b1, hp.b2, hp.eps, **form, dtype=dtype)

    rule_in(dtypes.scalar_dtype())  # refuses arguments out of range
    select = patterns.selector("tables", tables)

    def is_decayed(params: Params) -> list[bool]:
        """Whether weight decay acts on each leaf."""
        paths, treedef = trees.flatten_with_paths(params)
        if weight_decay is None or weight_decay_mask is None:
            return [weight_decay is not None for _ in paths]
        mask = weight_decay_mask(params) if callable(weight_decay_mask) else weight_decay_mask
        return [bool(flag) for flag in treedef.flatten_up_to(mask)]

    def init(params: Params) -> State:
        return init_by(rule_in(dtypes.scalar_dtype()), params)

    def init_by(rule: Rule, params: Params) -> DeferredAdamState:
        if trees.is_placeholder(params):
            idle, idle_decayed = placeholders(rule, params)
        else:
            idle, idle_decayed = idle_groups(rule, params)
        slots = init_state(hp, params)
        nu_max = slots.nu_max if amsgrad else None
        rate = jnp.array(numerics.at_count(learning_rate, slots.count), dtypes.scalar_dtype())
        return DeferredAdamState(slots.count, slots.mu, slots.nu, nu_max, idle, idle_decayed, rate)

    def idle_groups(rule: Rule, params: Params) -> list[IdleRows | None]:
        """The idle rows of the tables without weight decay, and of those with it."""
        leaves, treedef = trees.flatten_with_paths(params)
        chosen = select(leaves)
        for i in chosen:
            _check_table(*leaves[i])
        decayed = {i for i, decays in enumerate(is_decayed(params)) if decays}
        groups = []
        for members, decays in ((chosen - decayed, False), (chosen & decayed, True)):
            last_step = [
                trees.zeros_per_row(leaf, jnp.int32) if i in members else optax.MaskedNode()
                for i, (_, leaf) in enumerate(leaves)
            ]
            idle = IdleRows(treedef.unflatten(last_step), empty_history(rule, decays=decays))
            groups.append(idle if members else None)
        return groups

    def placeholders(rule: Rule, params: Params) -> list[Any]:
        """As `idle_groups`, for `optax.tree.map_params`."""
        if weight_decay is not None and weight_decay_mask is not None:
            # The paths decide which groups there are: each is left as it is.
            return ["idle", "idle_decayed"]
        decays = weight_decay is not None
        history = jax.eval_shape(functools.partial(empty_history, rule, decays=decays))
        idle = IdleRows(params, history)
        return [None, idle] if decays else [idle, None]

    def update(
        updates: Updates, state: State, params: Params | None = None, **_: Any
    ) -> tuple[Updates, State]:
        if params is None:
            raise ValueError(
                "deferred_adam moves parameters: update needs params, got None: "
                "call update(grads, state, params)"
            )
        if type(state) is not DeferredAdamState:
            raise wrong_state(init, updates, state, params)
        old_slots = slot_trees(state)
        names = ("the updates", "the parameters", *("the state's moments" for _ in old_slots))
        aligned, treedef = trees.align(updates, params, *old_slots, names=names)
        dtype = history_dtype(state)
        rule = rule_in(dtype)
        expected = jax.eval_shape(functools.partial(init_by, rule), params)
        expected = with_numbers(rule, dtype, expected)
        if not is_like(expected, state):
            raise wrong_state(init, updates, state, params, expected)
        rate = numerics.scalar_at(learning_rate, state.count)
        count_after = next_count(state.count, rule.max_idle + 1)
        coefficients = coefficients_of(hp, state.count)
        tables, last_steps, tokens = deferred_tables(state), {}, []
        results = []
        for (path, g, p, *slots), decays in zip(aligned, is_decayed(params), strict=True):
            if not (g is None or is_rows(g)):
                g = trees.as_gradient(path, g)
            step = Step(state.count, count_after, rate, weight_decay if decays else None)
            if path in tables:
                _refuse_stacked(path, g)
                _refuse_stale(path, g)
                _refuse_complex(path, g)
                done = step_table(hp, step, g, jnp.asarray(p), tables[path])
                results.append((done.update, *done.slots))
                last_steps[path] = done.last_step
                tokens.append(done.token)
            elif g is None:
                results.append((None, *slots))
            else:
                g = trees.as_gradient(path, g)
                p = jnp.asarray(p)
                results.append(tuple(step_leaf(hp, coefficients, step, path, g, p, *slots)))
        updates, *new_slots = trees.unzip(results, treedef, 1 + len(old_slots))
        # All that is written into the histories depends on this count.
        count_after_reads = depend_on(count_after, tokens)

        def advanced(field: str, group: IdleRows) -> IdleRows:
            decay = weight_decay if field == "idle_decayed" else 0.0
            return group._replace(ring=advance(rule, group.ring, count_after_reads, rate, decay))

        state = with_last_steps(with_slots(state, new_slots), last_steps)
        state = state._replace(count=count_after)
        if state.rate is not None:
            state = state._replace(rate=jnp.array(rate, state.rate.dtype))
        return updates, map_idle(advanced, state)

    return optax.GradientTransformationExtraArgs(init, update)


# What `optax.inject_hyperparams` would otherwise trace, or take for schedules.
_STATIC_ARGUMENTS = tuple("b1 b2 eps tables weight_decay_mask mu_dtype nu_dtype max_idle".split())


def _check_table(path: Path, leaf: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise TypeError(
            f"{path!r} is selected by tables and must be of a real floating dtype, "
            f"got {jnp.result_type(leaf)}"
        )


def _refuse_stacked(path: Path, g: Any) -> None:
    if isinstance(g, SparseRows) and len(g.leading_shape) > 1:
        raise ValueError(
            f"{path!r} has a row gradient of stacked tables, {g}, but deferred_adam keeps rows "
            f"along the first axis: make it one table of {g.num_rows} rows, in which row (f, v) is "
            f"row f * {math.prod(g.leading_shape[1:])} + v, or use lazy_adam"
        )


def _refuse_complex(path: Path, g: Any) -> None:
    if g is not None and jnp.issubdtype(g.dtype, jnp.complexfloating):
        raise TypeError(
            f"{path!r} is a table of a real dtype and cannot take a gradient in {g.dtype}"
        )


def _refuse_stale(path: Path, g: Any) -> None:
    if isinstance(g, SparseRows) and g.values.shape[0] and not g.synchronized:
        raise ValueError(
            f"{path!r} is a table of deferred_adam, whose rows in params may have pending updates, "
            "but its row gradient is not marked as computed from synchronized rows. Compute it by "
            "value_and_grad(loss, rows_from=state)(params, ...). If catch_up or flush has "
            "synchronized the rows that the loss reads, mark it: rows.as_synchronized(). Rows "
            "built by hand: SparseRows(indices, values, num_rows, synchronized=True)"
        )
