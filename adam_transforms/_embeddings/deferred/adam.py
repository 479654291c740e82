"""Dense Adam's trajectory at the cost of the rows touched.

While its gradient is zero a row of dense Adam still moves, on the momentum it has left. What it
misses here while idle is summed in closed form (`_quadrature`) and made up for when the row is next
read, touched, or its turn comes in the round that brings every row up to date within `max_idle`
steps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, patterns, trees
from adam_transforms._core.sparse_rows import SparseRows, is_rows
from adam_transforms._embeddings.deferred import missed_updates
from adam_transforms._embeddings.deferred.chebyshev import make_rule
from adam_transforms._embeddings.deferred.state import (
    DeferredAdamState,
    IdleRows,
    Table,
    idle_by_path,
    slot_trees_of,
    turns_of,
    with_leaves,
    with_slots,
)
from adam_transforms._embeddings.row_blocks import block_length, over_blocks
from adam_transforms._transforms import numerics
from adam_transforms._transforms.adam import (
    Hyperparameters,
    coefficients_of,
    least_nu_dtype,
    update_leaf,
)
from adam_transforms._xla import scheduling


def deferred_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    tables: Any,
    eps_hat: bool = False,
    amsgrad: bool = False,
    max_of: str = "raw",
    weight_decay: float | jax.Array | None = None,
    weight_decay_mask: Any = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    max_idle: int = 65536,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam(W) that updates the touched rows of a table now, and the others when they are needed.

    The parameters that it yields are dense Adam's, to rounding, while a step takes time and memory
    in the rows touched. A row up to date after step s, with moments m and v, that is idle until t
    has missed

    .. math::
      \sum_{j=1}^{t-s} \frac{A_{s+j}\, \rho^j\, m}{\sqrt v + x_j}, \qquad
      A_t = \eta_t \frac{\sqrt{1-b_2^t}}{1-b_1^t}, \quad \rho = \frac{b_1}{\sqrt{b_2}}, \quad
      x_j = \epsilon_{s+j}\, b_2^{-j/2}

    which takes a few terms to sum, however long the gap. Reading a table therefore takes what
    knows of this: ``value_and_grad(loss, rows_from=state)`` in training, `catch_up` for any other
    code that reads some rows, `flush` before the whole table is read (evaluated, exported, or
    handed to another optimizer). Until then the rows in `params` lag behind. `owed` tells how far.

    Args:
      learning_rate: a number, a scalar array or a schedule ``count -> value``.
      b1, b2: decay rates, Python numbers, 0 <= b1 < sqrt(b2) < 1 (with `amsgrad` any below 1).
      eps: Python number > 0, and not below some 1e-17.
      tables: which parameters, all (V, D...), are tables: one regular expression or several,
        searched for in the path, or a predicate ``(path, leaf) -> bool``. All other parameters get
        Adam as it is.
      eps_hat, amsgrad, max_of, mu_dtype, nu_dtype: as for `adam`.
      weight_decay: decoupled: ``learning_rate * weight_decay * p`` is subtracted. A number or a
        scalar array.
      weight_decay_mask: as for `adam`.
      max_idle: every row is brought up to date at least once in so many steps, ceil(V / max_idle)
        rows a step. The state has some 30 to 400 bytes for each step of it.

    Returns:
      A transformation with `DeferredAdamState`; `update` needs `params`. A table takes a
      `SparseRows` gradient; its update has the rows touched and those whose turn it was (a
      `SparseRows` of no rows lets the momentum of all go on). A dense gradient brings the whole
      table up to date; so does None, and then the step leaves the table and its moments as they
      are.

    Raises:
      ValueError: b1 >= sqrt(b2), eps = 0, a momentum that outlasts `max_idle`; `tables` matches
        nothing, or a scalar.
      TypeError: a table is not of a real floating dtype.

    Decay by L2, added to the gradient, is not of this form: use `weight_decay`. Clip before, inside
    `lazy`: ``optax.chain(lazy(optax.clip_by_global_norm(1.0)), deferred_adam(...))``.

    >>> import jax.numpy as jnp, optax
    >>> from adam_transforms import SparseRows, flush
    >>> tx = deferred_adam(0.1, tables="table")
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> state = tx.init(params)
    >>> for row in (2, 0):
    ...     grads = {"table": SparseRows(jnp.array([row]), jnp.ones((1, 1)), num_rows=4)}
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["table"].round(3).tolist()  # row 2 has moved once, and owes a step
    [[-0.074...], [0.0], [-0.1...], [0.0]]
    >>> params, state = flush(params, state)
    >>> params["table"].round(3).tolist()
    [[-0.074...], [0.0], [-0.16...], [0.0]]
    """
    amsgrad = arguments.flag("amsgrad", amsgrad)
    max_of = arguments.choice("max_of", max_of, ("corrected", "raw"))
    for name, value in (("b1", b1), ("b2", b2), ("eps", eps)):
        if not isinstance(arguments.scalar(name, value), float):
            raise TypeError(f"{name} must be a Python number in deferred_adam, got {value!r}")
    learning_rate = arguments.scalar_or_schedule("learning_rate", learning_rate)
    if weight_decay is not None:
        weight_decay = arguments.scalar("weight_decay", weight_decay, at_least=0.0)
    hp = Hyperparameters(
        *(b1, b2, eps, 0.0, mu_dtype, nu_dtype, eps_hat), max_of=max_of if amsgrad else None
    ).checked()
    rule = make_rule(
        *(hp.b1, hp.b2, hp.eps),
        eps_hat=hp.eps_hat,
        max_of=hp.max_of,
        max_idle=max_idle,
        dtype=dtypes.scalar_dtype(),
    )
    select = patterns.selector("tables", tables)

    def is_decayed(params: Any) -> list[bool]:
        """Whether weight decay acts on each leaf."""
        paths, treedef = trees.flatten_with_paths(params)
        if weight_decay is None or weight_decay_mask is None:
            return [weight_decay is not None for _ in paths]
        mask = weight_decay_mask(params) if callable(weight_decay_mask) else weight_decay_mask
        return [bool(flag) for flag in treedef.flatten_up_to(mask)]

    def init(params: Any) -> Any:
        leaves, treedef = trees.flatten_with_paths(params)
        chosen = select(leaves)
        for i in chosen:
            _check_table(*leaves[i])

        def idle_rows(members: set[int], *, decays: bool) -> IdleRows | None:
            if not members:
                return None
            last_step = [
                trees.zeros_per_row(leaf, jnp.int32) if i in members else optax.MaskedNode()
                for i, (_, leaf) in enumerate(leaves)
            ]
            return IdleRows(
                treedef.unflatten(last_step), missed_updates.empty_ring(rule, decays=decays)
            )

        def nu() -> Any:
            return trees.zeros_like(params, lambda p: hp.nu_dtype or least_nu_dtype(p))

        decayed = {i for i, decays in enumerate(is_decayed(params)) if decays}
        return DeferredAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=trees.zeros_like(params, lambda p: hp.mu_dtype or p),
            nu=nu(),
            nu_max=nu() if amsgrad else None,
            idle=idle_rows(chosen - decayed, decays=False),
            idle_decayed=idle_rows(chosen & decayed, decays=True),
        )

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        if params is None:
            raise ValueError("deferred_adam moves parameters: update needs params, got None")
        rate = dtypes.as_scalar(arguments.at_count(learning_rate, state.count))
        count = numerics.increment(state.count)
        corrections = [numerics.bias_correction(b, count) for b in (hp.b1, hp.b2)]
        coefficients = coefficients_of(hp, state.count, hp.b1, hp.b2, corrections)

        def step(
            path: str, g: jax.Array, p: jax.Array, slots: Sequence[jax.Array], *, decays: bool
        ) -> tuple[jax.Array, Sequence[jax.Array]]:
            u, *slots = update_leaf(hp, coefficients, path, g, *slots, p)
            if decays:
                u = u + p.astype(u.dtype) * dtypes.as_scalar(weight_decay, u.dtype)
            return -dtypes.as_scalar(rate, u.dtype) * u, slots

        slot_trees = slot_trees_of(state)
        names = ("the updates", "the parameters", *("the state's moments" for _ in slot_trees))
        aligned, treedef = trees.align(updates, params, *slot_trees, names=names)
        idle, last_steps, witnesses = idle_by_path(state), {}, []
        results = []
        for (path, g, p, *slots), decays in zip(aligned, is_decayed(params), strict=True):
            if path in idle:
                last, ring = idle[path]
                table = Table(jnp.asarray(p), tuple(slots), last)
                if not (g is None or is_rows(g)):
                    g = trees.as_gradient(path, g)
                rule_of_table = functools.partial(step, path, decays=decays)
                u, table, witness = _step_table(g, table, ring, state.count, rule_of_table)
                results.append((u, *table.slots))
                last_steps[path] = table.last
                witnesses += witness
            elif g is None:
                results.append((None, *slots))
            else:
                g = trees.as_gradient(path, g)
                u, slots = step(path, g, jnp.asarray(p), slots, decays=decays)
                results.append((u, *slots))
        updates, *slot_trees = trees.unzip(results, treedef, 1 + len(slot_trees))

        def advance(group: IdleRows | None, decay: Any) -> IdleRows | None:
            if group is None:
                return None
            ring = missed_updates.advance(rule, group.ring, count, rate, decay, witnesses)
            return IdleRows(with_leaves(group.last_step, last_steps), ring)

        state = with_slots(state, slot_trees)._replace(
            count=count,
            idle=advance(state.idle, 0.0),
            idle_decayed=advance(state.idle_decayed, weight_decay),
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _step_table(
    g: Any,
    table: Table,
    ring: missed_updates.Ring,
    count: jax.Array,
    step: Callable[..., tuple[jax.Array, Sequence[jax.Array]]],
) -> tuple[Any, Table, tuple[jax.Array, ...]]:
    """The step after `count` others for one table.

    Args:
      step: from a gradient, parameters and slots to what is added to these, and the new slots.

    Returns:
      (update, the table with its new slots and last steps but the values as they are, witnesses
      that the ring was read).
    """
    if not is_rows(g):
        u, now, witness = _step_rows(g, table, ring, count, step)
        return u, table.put(None, now), witness
    rows = _with_those_in_turn(g, count, ring.weights.shape[0])

    def step_some(some: SparseRows, table: Table) -> tuple[jax.Array, Table, Any]:
        before = table.take(some)
        u, now, witness = _step_rows(some.values, before, ring, count, step)
        # What was read for the gradient, with `rows_from`, was read before; so was `before`.
        witness = (*witness, scheduling.witness(some.values[:1]))
        last = scheduling.after(witness, now.last)
        return u, table.put(some, now._replace(last=last)), witness

    length = block_length(rows)
    if length is None:
        u, table, witness = step_some(rows, table)
        return rows.with_values(u), table, witness

    def step_block(some: SparseRows, so_far: tuple[Any, Any]) -> tuple[jax.Array, tuple[Any, Any]]:
        u, table_now, _ = step_some(some, Table(table.values, *so_far))
        return u, (table_now.slots, table_now.last)

    rows, (slots, last) = over_blocks(step_block, rows, (table.slots, table.last), length)
    return rows, Table(table.values, slots, last), (scheduling.witness(rows.values[:1]),)


def _step_rows(
    g: jax.Array | None,
    before: Table,
    ring: missed_updates.Ring,
    count: jax.Array,
    step: Callable[..., tuple[jax.Array, Sequence[jax.Array]]],
) -> tuple[jax.Array, Table, tuple[jax.Array, ...]]:
    """The step of some rows, or a whole table, from a dense gradient or None.

    Returns:
      (update, what becomes of `before` with the values as they are, witnesses that the ring was
      read).
    """
    missed = before.missed(ring, count)
    values, slots = missed.p_now(before.values), before.slots_now(missed)
    made_up_for = missed.p_change(before.values)
    if g is None:  # this step does not move the table, so no row owes it
        u = made_up_for.astype(before.values.dtype)
    else:
        move, slots = step(g, values, slots)
        wide = dtypes.promote(made_up_for.dtype, move.dtype)
        u = made_up_for.astype(wide) + move.astype(wide)
        u = u.astype(dtypes.promote(g.dtype, before.values.dtype))
    last = jnp.maximum(before.last, numerics.increment(count))
    return u, Table(before.values, tuple(slots), last), missed.witness


def _check_table(path: str, leaf: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise TypeError(
            f"{path!r} is selected by tables and must be of a real floating dtype, "
            f"got {jnp.result_type(leaf)}"
        )


def _with_those_in_turn(rows: SparseRows, count: jax.Array, max_idle: int) -> SparseRows:
    """The rows, unique, and those whose turn it is to be brought up to date, with zeros."""
    turns, length = turns_of(rows.num_rows, max_idle)
    return rows.sum_duplicates(and_run=((count % turns) * length, length))
