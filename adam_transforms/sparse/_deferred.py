"""Dense Adam's trajectory at the cost of the rows touched.

While its gradient is zero a row of dense Adam still moves, on the momentum it has left. What it
misses here while idle is summed in closed form (`_quadrature`) and made up for when the row is next
read, touched, or its turn comes in the round that brings every row up to date within `max_idle`
steps.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adam_transforms import _adam, _arguments, _numerics, _paths, _trees
from adam_transforms.sparse import _quadrature
from adam_transforms.sparse._rows import SparseRows, put_rows, take_rows


class IdleRows(NamedTuple):
    """What is known of the idle rows of some tables.

    Attributes:
      last_step: for each of these tables, int32 (V,), the step that each row is up to date after;
        optax.MaskedNode in place of every other parameter.
      ring: what the steps since have done to a row that was idle.
    """

    last_step: Any
    ring: _quadrature.Ring


class DeferredAdamState(NamedTuple):
    """State of `deferred_adam`.

    Attributes:
      count: int32, shape (), the steps made.
      mu, nu: Adam's moments, like the parameters; each row of a table as of its last step.
      nu_max: AMSGrad's maximum of nu, likewise; None without AMSGrad.
      idle: of the tables without weight decay; None if there are none.
      idle_decayed: of the tables with weight decay; None if there are none.
    """

    count: jax.Array
    mu: Any
    nu: Any
    nu_max: Any
    idle: IdleRows | None
    idle_decayed: IdleRows | None


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
      eps: Python number > 0.
      tables: which parameters, all (V, D...), are tables: one regular expression or several,
        searched for in the path, or a predicate ``(path, leaf) -> bool``. All other parameters get
        Adam as it is.
      eps_hat, amsgrad, max_of, mu_dtype, nu_dtype: as for `adam`.
      weight_decay: decoupled: ``learning_rate * weight_decay * p`` is subtracted. A number or a
        scalar array.
      weight_decay_mask: as for `adam`.
      max_idle: every row is brought up to date at least once in so many steps, ceil(V / max_idle)
        rows a step. The state has some 40 to 200 bytes for each step of it.

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
    >>> from adam_transforms import SparseRows
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
    amsgrad = _arguments.flag("amsgrad", amsgrad)
    max_of = _arguments.choice("max_of", max_of, ("corrected", "raw"))
    for name, value in (("b1", b1), ("b2", b2), ("eps", eps)):
        if not isinstance(_arguments.scalar(name, value), float):
            raise TypeError(f"{name} must be a Python number in deferred_adam, got {value!r}")
    learning_rate = _arguments.scalar_or_schedule("learning_rate", learning_rate)
    if weight_decay is not None:
        weight_decay = _arguments.scalar("weight_decay", weight_decay, at_least=0.0)
    hp = _adam.Hyperparameters(
        *(b1, b2, eps, 0.0, mu_dtype, nu_dtype, eps_hat), max_of=max_of if amsgrad else None
    ).checked()
    rule = _quadrature.make_rule(
        *(hp.b1, hp.b2, hp.eps),
        eps_hat=hp.eps_hat,
        max_of=hp.max_of,
        max_idle=max_idle,
        dtype=_numerics.scalar_dtype(),
    )
    select = _paths.selector("tables", tables)

    def is_decayed(params: Any) -> list[bool]:
        """Whether weight decay acts on each leaf."""
        paths, treedef = _trees.flatten_with_paths(params)
        if weight_decay is None or weight_decay_mask is None:
            return [weight_decay is not None for _ in paths]
        mask = weight_decay_mask(params) if callable(weight_decay_mask) else weight_decay_mask
        return [bool(flag) for flag in treedef.flatten_up_to(mask)]

    def init(params: Any) -> Any:
        leaves, treedef = _trees.flatten_with_paths(params)
        chosen = select(leaves)
        for i in chosen:
            _check_table(*leaves[i])

        def idle_rows(members: set[int]) -> IdleRows | None:
            if not members:
                return None
            last_step = [
                _trees.zeros_per_row(leaf, jnp.int32) if i in members else optax.MaskedNode()
                for i, (_, leaf) in enumerate(leaves)
            ]
            return IdleRows(treedef.unflatten(last_step), _quadrature.empty_ring(rule))

        def nu() -> Any:
            return _trees.zeros_like(params, lambda p: hp.nu_dtype or _adam.least_nu_dtype(p))

        decayed = {i for i, decays in enumerate(is_decayed(params)) if decays}
        return DeferredAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=_trees.zeros_like(params, lambda p: hp.mu_dtype or p),
            nu=nu(),
            nu_max=nu() if amsgrad else None,
            idle=idle_rows(chosen - decayed),
            idle_decayed=idle_rows(chosen & decayed),
        )

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        if params is None:
            raise ValueError("deferred_adam moves parameters: update needs params, got None")
        rate = _numerics.as_scalar(_arguments.at_count(learning_rate, state.count))
        count = _numerics.increment(state.count)
        corrections = [_numerics.bias_correction(b, count) for b in (hp.b1, hp.b2)]
        coefficients = _adam.coefficients_of(hp, state.count, hp.b1, hp.b2, corrections)

        def step(
            path: str, g: jax.Array, p: jax.Array, slots: Sequence[jax.Array], *, decays: bool
        ) -> tuple[jax.Array, Sequence[jax.Array]]:
            u, *slots = _adam.update_leaf(hp, coefficients, path, g, *slots, p)
            if decays:
                u = u + p.astype(u.dtype) * _numerics.as_scalar(weight_decay, u.dtype)
            return -_numerics.as_scalar(rate, u.dtype) * u, slots

        slot_trees = _slot_trees(state)
        names = ("the updates", "the parameters", *("the state's moments" for _ in slot_trees))
        aligned, treedef = _trees.align(updates, params, *slot_trees, names=names)
        idle, last_steps, witnesses = _idle_by_path(state), {}, []
        results = []
        for (path, g, p, *slots), decays in zip(aligned, is_decayed(params), strict=True):
            if path in idle:
                last, ring = idle[path]
                table = _Table(jnp.asarray(p), tuple(slots), last)
                rule_of_table = functools.partial(step, path, decays=decays)
                u, table, witness = _step_table(path, g, table, ring, state.count, rule_of_table)
                results.append((u, *table.slots))
                last_steps[path] = table.last
                witnesses += witness
            elif g is None:
                results.append((None, *slots))
            else:
                g = _trees.as_gradient(path, g)
                u, slots = step(path, g, jnp.asarray(p), slots, decays=decays)
                results.append((u, *slots))
        updates, *slot_trees = _trees.unzip(results, treedef, 1 + len(slot_trees))

        def advance(group: IdleRows | None, decay: Any) -> IdleRows | None:
            if group is None:
                return None
            ring = _quadrature.advance(rule, group.ring, count, rate, decay, witnesses)
            return IdleRows(_with_leaves(group.last_step, last_steps), ring)

        state = _with_slots(state, slot_trees)._replace(
            count=count,
            idle=advance(state.idle, 0.0),
            idle_decayed=advance(state.idle_decayed, weight_decay),
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _step_table(
    path: str,
    g: Any,
    table: "_Table",
    ring: _quadrature.Ring,
    count: jax.Array,
    step: Callable[..., tuple[jax.Array, Sequence[jax.Array]]],
) -> tuple[Any, "_Table", tuple[jax.Array, ...]]:
    """The step after `count` others for one table.

    Args:
      step: from a gradient, parameters and slots to what is added to these, and the new slots.

    Returns:
      (update, the table with its new slots and last steps but the values as they are, witnesses
      that the ring was read).
    """
    rows = None
    if isinstance(g, SparseRows):
        rows = _with_those_in_turn(g, count, ring.weights.shape[0])
        g = rows.masked_values()
    before = table.take(rows).computed_once()
    now, witness = before.witnessed_up_to_date(ring, count)
    if g is None:  # this step does not move the table, so no row owes it
        move, slots = jnp.zeros_like(now.values), now.slots
    else:
        g = _trees.as_gradient(path, g)
        move, slots = step(g, now.values, now.slots)
    wide = _numerics.promote(now.values.dtype, move.dtype)
    made_up_for = now.values.astype(wide) - before.values.astype(wide)
    u = (made_up_for + move.astype(wide)).astype(
        _numerics.promote(*(x.dtype for x in (g, table.values) if x is not None))
    )
    # What was read for the gradient, with `rows_from`, was read before; so was `before`.
    if rows is not None:
        witness = (*witness, _numerics.witness(rows.values))
    last = _numerics.after(witness, jnp.maximum(before.last, _numerics.increment(count)))
    after = table.put(rows, _Table(table.values, tuple(slots), last))
    return (u if rows is None else rows.with_values(u)), after, witness


def catch_up(params: Any, state: Any, ids: Mapping[str, Any]) -> tuple[Any, Any]:
    """Brings some rows of tables up to date, for code that reads them from `params` itself.

    Args:
      params: the parameters that `state` belongs to.
      state: an optimizer state with a `DeferredAdamState` anywhere in it.
      ids: for the path of each table to be read, integers of any shape: its rows, repetitions
        allowed. What lies outside [0, V) means nothing.

    Returns:
      (params, state), both with these rows as dense Adam has them. Done twice, the second time
      changes no bit.

    Raises:
      ValueError: a path is of no deferred table.
    """
    known = {path for found in _deferred_states(state) for path in _idle_by_path(found)}
    for path in ids:
        if path not in known:
            raise ValueError(f"{path!r} is no table of deferred_adam; these are: {sorted(known)}")
    return _bring_up_to_date(params, state, ids)


def flush(params: Any, state: Any) -> tuple[Any, Any]:
    """Brings all rows of all deferred tables up to date, as dense Adam has them.

    For whatever reads whole tables: evaluation, export, another optimizer. O(V) time and memory.
    Done twice, the second time changes no bit; and training can go on from the result.

    Args:
      params: the parameters that `state` belongs to.
      state: an optimizer state with a `DeferredAdamState` anywhere in it.

    Returns:
      (params, state).
    """
    return _bring_up_to_date(params, state, None)


class Owed(NamedTuple):
    """What a table owes.

    Attributes:
      rows: int32 (), how many rows have missed steps that move them.
      longest_gap: int32 (), the most steps that a row has been idle.
    """

    rows: jax.Array
    longest_gap: jax.Array


def owed(params: Any, state: Any) -> dict[str, Owed]:
    """For the path of each deferred table, how far it lags behind dense Adam's.

    Reads whole tables, so now and then is often enough.
    """
    result = {}
    for found in _deferred_states(state):
        for path, (table, ring) in _tables(params, found).items():
            now = table.up_to_date(ring, found.count).values
            moves = jnp.reshape(now != table.values.astype(now.dtype), (now.shape[0], -1))
            rows = jnp.sum(jnp.any(moves, axis=1), dtype=jnp.int32)
            result[path] = Owed(rows, jnp.max(found.count - table.last, initial=0))
    return result


def dense_equivalent(params: Any, state: Any) -> tuple[Any, Any]:
    """Dense Adam's parameters and state at this point, to go on with it or to export.

    Args:
      params: the parameters that `state` belongs to.
      state: an optimizer state with one `DeferredAdamState` in it.

    Returns:
      (params, optax.ScaleByAdamState or optax.ScaleByAmsgradState), that of `scale_by_adam` or
      `scale_by_amsgrad` after the same gradients.

    Raises:
      ValueError: there is not exactly one `DeferredAdamState`.
    """
    params, state = flush(params, state)
    found = _deferred_states(state)
    if len(found) != 1:
        raise ValueError(f"expected one DeferredAdamState in the state, found {len(found)}")
    count, *slots = found[0].count, *_slot_trees(found[0])
    if len(slots) == 3:
        return params, optax.ScaleByAmsgradState(count, *slots)
    return params, optax.ScaleByAdamState(count, *slots)


def current_rows(state: Any) -> dict[str, Callable[[jax.Array, SparseRows | None], jax.Array]]:
    """For the path of each deferred table, a function that reads it as dense Adam has it now: from
    the table and the rows to read to (n, D...), or for None to all of it."""
    readers = {}
    for found in _deferred_states(state):
        slots = _slots_by_path(found)
        for path, (last, ring) in _idle_by_path(found).items():
            if path in readers:
                raise ValueError(f"two deferred states in rows_from have a table at {path!r}")
            readers[path] = jax.tree_util.Partial(_read, slots[path], last, ring, found.count)
    return readers


def _read(slots: Any, last: Any, ring: Any, count: Any, table: Any, rows: Any) -> jax.Array:
    now = _Table(table, slots, last).take(rows).up_to_date(ring, count)
    return now.values.astype(table.dtype)


def _bring_up_to_date(params: Any, state: Any, ids: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """`catch_up`, or for None `flush`."""
    _deferred_states(state)  # there is one
    new_params = {}

    def renew(found: Any) -> Any:
        if not isinstance(found, DeferredAdamState):
            return found
        new = {}
        for path, (table, ring) in _tables(params, found).items():
            if ids is None:
                rows = None
            elif path in ids:
                indices = jnp.ravel(jnp.asarray(ids[path]))
                num_rows = table.values.shape[0]
                rows = SparseRows(indices, jnp.zeros((indices.size, 0)), num_rows).sum_duplicates()
            else:
                continue
            now = table.take(rows).up_to_date(ring, found.count)
            new[path] = table.put(rows, now)
            now_values = now.values.astype(table.values.dtype)
            new_params[path] = put_rows(table.values, rows, now_values)

        def with_last_steps(group: IdleRows | None) -> IdleRows | None:
            if group is None:
                return None
            lasts = {path: table.last for path, table in new.items()}
            return group._replace(last_step=_with_leaves(group.last_step, lasts))

        trees = [
            _with_leaves(tree, {path: table.slots[i] for path, table in new.items()})
            for i, tree in enumerate(_slot_trees(found))
        ]
        return _with_slots(found, trees)._replace(
            idle=with_last_steps(found.idle), idle_decayed=with_last_steps(found.idle_decayed)
        )

    state = jax.tree.map(renew, state, is_leaf=lambda x: isinstance(x, DeferredAdamState))
    return _with_leaves(params, new_params), state


# ---- tables and their slots ---------------------------------------------------------------------


class _Table(NamedTuple):
    """A table, or some rows of one, with what belongs to it."""

    values: jax.Array  # (n, D...)
    slots: tuple[jax.Array, ...]  # mu, nu and perhaps nu_max, each (n, D...)
    last: jax.Array  # int32 (n,)

    def take(self, rows: SparseRows | None) -> "_Table":
        """These rows; all of them for None."""
        return jax.tree.map(lambda x: take_rows(x, rows), self)

    def computed_once(self) -> "_Table":
        """The same, for several uses (see `_numerics.computed_once`)."""
        values, *slots = (_numerics.computed_once(x) for x in (self.values, *self.slots))
        return self._replace(values=values, slots=tuple(slots))

    def put(self, rows: SparseRows | None, new: "_Table") -> "_Table":
        """With the slots of these rows replaced."""
        slots = tuple(
            put_rows(x, rows, y.astype(x.dtype)) for x, y in zip(self.slots, new.slots, strict=True)
        )
        return self._replace(slots=slots, last=put_rows(self.last, rows, new.last))

    def up_to_date(self, ring: _quadrature.Ring, count: jax.Array) -> "_Table":
        """As of step `count`, computed in float32 at least."""
        return self.witnessed_up_to_date(ring, count)[0]

    def witnessed_up_to_date(
        self, ring: _quadrature.Ring, count: jax.Array
    ) -> tuple["_Table", tuple[jax.Array, ...]]:
        """As of step `count`, and the witness that the ring was read."""
        mu, nu, *nu_max = self.slots
        missed = _quadrature.missed(ring, mu, nu_max[0] if nu_max else nu, self.last, count)
        slots = (missed.mu_now(mu), missed.nu_now(nu), *nu_max)
        now = _Table(missed.p_now(self.values), slots, jnp.maximum(self.last, count))
        return now, missed.witness


def _check_table(path: str, leaf: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise TypeError(
            f"{path!r} is selected by tables and must be of a real floating dtype, "
            f"got {jnp.result_type(leaf)}"
        )


def _with_those_in_turn(rows: SparseRows, count: jax.Array, max_idle: int) -> SparseRows:
    """The rows, unique, and those whose turn it is to be brought up to date, with zeros."""
    turns, length = turns_of(rows.num_rows, max_idle)
    start = (count % turns) * length
    return rows.sum_duplicates(also=start + jnp.arange(length, dtype=jnp.int32))


def turns_of(num_rows: int, max_idle: int) -> tuple[int, int]:
    """After how many steps it is a row's turn again, and how many rows have theirs at a step."""
    turns = min(max_idle, num_rows)
    return turns, -(-num_rows // turns)


def _slot_trees(state: DeferredAdamState) -> list[Any]:
    return [state.mu, state.nu] + ([] if state.nu_max is None else [state.nu_max])


def _with_slots(state: DeferredAdamState, trees: Sequence[Any]) -> DeferredAdamState:
    return state._replace(**dict(zip(("mu", "nu", "nu_max"), trees, strict=False)))


def _with_leaves(tree: Any, by_path: Mapping[str, Any]) -> Any:
    """`tree` with new leaves at these paths."""
    leaves, treedef = _trees.flatten_with_paths(tree)
    return treedef.unflatten([by_path.get(path, leaf) for path, leaf in leaves])


def _idle_by_path(state: DeferredAdamState) -> dict[str, tuple[jax.Array, _quadrature.Ring]]:
    """Each table's last steps, and the ring that belongs to it."""
    return {
        path: (last, group.ring)
        for group in (state.idle, state.idle_decayed)
        if group is not None
        for path, last in _trees.flatten_with_paths(group.last_step)[0]
    }


def _deferred_states(state: Any) -> list[DeferredAdamState]:
    found = _trees.find_states(state, DeferredAdamState)
    if not found:
        raise ValueError("the optimizer state has no DeferredAdamState in it")
    return found


def _slots_by_path(state: DeferredAdamState) -> dict[str, tuple[jax.Array, ...]]:
    columns = [_trees.flatten_with_paths(tree)[0] for tree in _slot_trees(state)]
    return {row[0][0]: tuple(x for _, x in row) for row in zip(*columns, strict=True)}


def _tables(params: Any, state: DeferredAdamState) -> dict[str, tuple[_Table, _quadrature.Ring]]:
    """Each deferred table, and the ring that belongs to it."""
    leaves, slots = dict(_trees.flatten_with_paths(params)[0]), _slots_by_path(state)
    tables = {}
    for path, (last, ring) in _idle_by_path(state).items():
        if leaves.get(path) is None:
            raise ValueError(f"params have no {path!r}, which is a table of the deferred state")
        tables[path] = (_Table(jnp.asarray(leaves[path]), slots[path], last), ring)
    return tables
