"""Row gradients of unmodified functions.

The function is traced to a jaxpr, and its tables are chosen (`tracing`). `reads.following` follows
each table to the reads of its rows. `reads.running` runs the program again with a zero array, a
tap, added to every read. The taps are differentiated in place of the tables. Their gradients and
the indices of the reads make the row gradients. No (V, D) gradient ever exists.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from adam_transforms._core import patterns
from adam_transforms._core.types import A
from adam_transforms._embeddings.reads.kept import kept_reads
from adam_transforms._embeddings.reads.program import Value
from adam_transforms._embeddings.reads.running import Runner, Table, row_gradients
from adam_transforms._embeddings.tracing import (
    are_differentiable,
    choose_tables,
    deferred_leaves,
    leaves_of,
    trace,
)


def value_and_grad(
    fun: Callable[A, Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    tables: patterns.Selection = "auto",
    rows_from: Any = None,
) -> Callable[A, tuple[Any, Any]]:
    r"""As `jax.value_and_grad`, but the gradient of a table is a `SparseRows`.

    .. math:: G_{r} = \sum_{i:\, \mathrm{id}_i = r} \partial L / \partial\,\mathrm{read}_i

    over all reads of the table in the loss L, each row summed in at least float32. Time and memory
    are O(rows read), whatever V. A read uses some rows of the table. These are reads:

    - ``table[ids]``, ``table[3]``, `jnp.take`, the `Embed` of Flax; a product with
      ``jax.nn.one_hot(ids, V)``;
    - any of these inside `jax.jit`, `jax.vmap`, `jax.checkpoint`, `jax.lax.scan`, `map`, `cond`,
      `switch`, a `fori_loop` of static length and `jax.shard_map`;
    - reads of a function of the table that treats rows apart: ``(table * s)[ids]``, normalised
      rows, ``table.at[0].set(0)[ids]``, ``jnp.where(mask, table, 0)[ids]``, concatenated
      tables;
    - parts of rows, ``table[ids, :8]``, and a table in another layout, ``table.T[:, ids]``;
    - stacked tables (F, V, D): ``tables[f, ids]``, or `jax.vmap` over the first axis.

    Leading axes number the rows: of a (D, V) array, ``array[:, ids]`` reads all rows.

    `explain` tells for each leaf where its rows are read, or why its gradient is dense.

    Args:
      fun: as for `jax.value_and_grad`: it returns a scalar, or (scalar, anything) with `has_aux`.
        It is traced: its Python code cannot branch on the values that are differentiated.
      argnums: which positional arguments to differentiate: one index, or several for a tuple of
        gradients.
      has_aux: whether `fun` returns a pair.
      tables: the leaves, all (V, D...), that get a row gradient: one or several regular
        expressions, searched for in the leaf's path within its argument; or a predicate
        ``(path, leaf) -> bool``. ``"auto"`` selects a leaf that is only read by row, if fewer rows
        are read than it has. A leaf that is read only at positions fixed in the program, such as
        ``layers[3]``, is not selected.
      rows_from: an optimizer state with a `DeferredAdamState` at any depth. The deferred tables are
        found among the leaves by path, and their rows are read with all pending updates applied.
        These tables get row gradients, marked as `synchronized`; with ``tables="auto"`` no other
        leaf does. A deferred table that is also used in another way is synchronized as a whole, in
        O(V), and its gradient is dense.

    Returns:
      A function from `fun`'s arguments to (value, gradient): `fun`'s result, and a gradient in the
      structure of the argument. The gradient of a table is a `SparseRows` in the table's dtype with
      unique indices; n is the number of rows read, 0 for a selected table that is never read. The
      gradient of any other leaf is JAX's.

    Raises:
      ValueError: a pattern matches nothing, or a selected leaf is used in a way other than reading
        rows; the error names its path, the operation and its line. A `while_loop` and a custom VJP
        count as one operation each. `rows_from` has no deferred state, two for one table, or one
        for a table that is no leaf here.
      TypeError: `fun` is not callable; a leaf is not floating or complex, as from JAX. Modules with
        such leaves are for `adam_transforms.flax` (NNX) and `adam_transforms.equinox`.

    Negative ids count from the end where jnp reads them so. The gradient of a read outside of the
    table depends on the mode of the read: with ``"clip"`` it goes to the nearest row, with
    ``"wrap"`` to row ``id % V``, otherwise to no row. Uses that carry no gradient are ignored:
    behind `jax.lax.stop_gradient`, in the auxiliary output, in a comparison. Inside `shard_map`, a
    row gradient contains the rows that this device read; `all_reduce_rows` sums over devices.

    >>> import jax.numpy as jnp
    >>> params = {"table": jnp.ones((5, 2)), "scale": jnp.asarray(2.0)}
    >>> def loss(params, ids):
    ...     return params["scale"] * jnp.sum(params["table"][ids])
    >>> value, grads = value_and_grad(loss)(params, jnp.array([3, 0, 3]))
    >>> float(value), float(grads["scale"])
    (12.0, 6.0)
    >>> grads["table"].indices.tolist()  # 5 is padding
    [3, 0, 5]
    >>> grads["table"].values.tolist()
    [[4.0, 4.0], [2.0, 2.0], [0.0, 0.0]]
    """
    check_loss(fun)
    positions = positions_of(argnums)
    is_single = not isinstance(argnums, Iterable)
    auto = isinstance(tables, str) and tables == "auto"
    select = None if auto else patterns.selector("tables", tables)

    @functools.wraps(fun)
    def value_and_grad_of(*args: Any, **kwargs: Any) -> Any:
        if not are_differentiable(args, positions):
            # JAX's own error.
            return jax.value_and_grad(fun, argnums, has_aux)(*args, **kwargs)
        leaves, treedef = leaves_of(args, positions)
        traced = trace(fun, has_aux, args, kwargs, positions)
        deferred = deferred_leaves(rows_from, leaves)
        choice = choose_tables(traced, leaves, select, set(deferred))
        chosen, reads, scope = choice.tables, choice.program.reads, choice.program.scope
        tables = {i: deferred.get(i, Table(leaves[i].value)) for i in chosen}

        kept = kept_reads(choice.program, tables) if deferred else {}
        is_last = {k: k == x.positions[-1] for x in kept.values() for k in x.positions}

        def tapped(dense: list[Any], taps: list[Any]) -> Any:
            # Tables are not arguments here: no gradient of one is ever computed.
            others = [x for i, x in enumerate(traced.jaxpr.invars) if i not in chosen]
            values = {Value(scope, x): value for x, value in zip(others, dense, strict=True)}
            runner = Runner(choice.plan, tables, values, is_last)
            outputs, indices = runner.run(choice.program, taps)
            rest = iter(outputs)
            result = traced.out_tree.unflatten(
                [next(rest) if x is None else x for x in traced.others]
            )
            value, aux = result if has_aux else (result, None)
            return value, (aux, indices, runner.stale)

        dense = [
            deferred[i].whole() if i in deferred else leaf.value
            for i, leaf in enumerate(leaves)
            if i not in chosen
        ]
        taps = [read.tap() for read in reads]
        differentiated = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=True)
        (value, (aux, indices, stale)), (dense, taps) = differentiated(dense, taps)
        rest, rows = iter(dense), row_gradients(tables, choice, indices, taps, kept)
        for i, reads_of_table in kept.items():
            rows[i] = reads_of_table.gradient(rows[i], stale)
        grads = treedef.unflatten(
            [rows[i] if i in rows else next(rest) for i in range(len(leaves))]
        )
        grads = grads[0] if is_single else grads
        return ((value, aux) if has_aux else value), grads

    return value_and_grad_of


def grad(
    fun: Callable[A, Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    tables: patterns.Selection = "auto",
    rows_from: Any = None,
) -> Callable[A, Any]:
    """As `jax.grad`, but the gradient of a table is a `SparseRows`: see `value_and_grad`.

    Returns:
      A function from `fun`'s arguments to its gradient, or to (gradient, aux) with `has_aux`.

    >>> import jax.numpy as jnp
    >>> rows = grad(lambda table, ids: jnp.sum(table[ids] ** 2))(jnp.ones((3, 2)), jnp.array([1]))
    >>> rows.indices.tolist(), rows.values.tolist()
    ([1], [[2.0, 2.0]])
    """
    both = value_and_grad(fun, argnums, has_aux, tables=tables, rows_from=rows_from)

    @functools.wraps(fun)
    def grad_of(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_of


def check_loss(fun: Any) -> None:
    """Refuses what is not callable, such as the parameters."""
    if not callable(fun):
        raise TypeError(
            f"the loss must be a function, got {type(fun).__name__}: "
            "write value_and_grad(loss)(params)"
        )


def positions_of(argnums: Any) -> tuple[int, ...]:
    """`argnums`, one or several, as a tuple."""
    try:
        return tuple(map(operator.index, argnums if isinstance(argnums, Iterable) else [argnums]))
    except TypeError:
        raise TypeError(
            f"argnums must be an integer or a sequence of integers, got {argnums!r:.200}: "
            "write value_and_grad(loss)(params)"
        ) from None
