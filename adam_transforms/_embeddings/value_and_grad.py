"""Row gradients of unmodified functions.

The function is traced to a jaxpr (1). `lookups` follows each table in it to the reads of its rows,
and the tables are chosen (2). `taps` runs the jaxpr again with a zero array added to every read
(3). The taps are differentiated in place of the tables. Their gradients and the indices of the
reads make the row gradients (4). No (V, D) gradient ever exists.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adam_transforms._core import dtypes, patterns, trees
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._core.types import Path
from adam_transforms._embeddings.deferred.sync import current_rows
from adam_transforms._embeddings.lookups import Read, all_reads, follow, replicated
from adam_transforms._embeddings.taps import TracedTable, run_with_taps


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    tables: Any = "auto",
    rows_from: Any = None,
) -> Callable[..., Any]:
    r"""As `jax.value_and_grad`, but the gradient of a table is a `SparseRows`.

    .. math:: G_{r} = \sum_{i:\, \mathrm{id}_i = r} \partial L / \partial\,\mathrm{read}_i

    over all reads of the table in the loss L, each row summed in at least float32. Time and memory
    are O(rows read), whatever V. Reads are ``table[ids]``, ``table[3]``,
    ``jnp.take(table, ids, axis=0)`` and the `Embed` of Flax linen and NNX; also inside `jax.jit`,
    `jax.vmap` and `jax.checkpoint` (which keeps its effect), and of a table that is cast to another
    dtype first.

    Args:
      fun: as for `jax.value_and_grad`: it returns a scalar, or (scalar, anything) with `has_aux`.
        It is traced: its Python code cannot branch on the values that are differentiated.
      argnums: which positional arguments to differentiate: one index, or several for a tuple of
        gradients.
      has_aux: whether `fun` returns a pair.
      tables: the leaves, all (V, D...), that get a row gradient. ``"auto"``: the leaves that are
        read by row and are not used in any other way (an unused leaf stays dense; for an empty
        array of ids jnp reads nothing). Or one or several regular expressions, searched for in the
        leaf's path within its argument; or a predicate ``(path, leaf) -> bool``.
      rows_from: an optimizer state with a `DeferredAdamState` in it, however deep. Its tables are
        found among the leaves by path and get row gradients; with ``tables="auto"`` no other leaf
        does. Their rows are read with all pending updates applied. A table that is also used in
        another way is synchronized as a whole, in O(V), and its gradient is dense.

    Returns:
      A function from `fun`'s arguments to (value, gradient): `fun`'s result, and a gradient in the
      structure of the argument. The gradient of a table is a `SparseRows` in the table's dtype with
      unique indices; n is the number of rows read, 0 for a selected table that is never read. The
      gradient of any other leaf is JAX's.

    Raises:
      ValueError: a pattern matches nothing, or a selected leaf is used in a way other than reading
        rows; the error names its path and the operation. The bodies of `scan`, `while_loop`,
        `cond`, `shard_map` and custom derivatives count as one operation each. `rows_from` has no
        deferred state, two for one table, or one for a table that is no leaf here.
      TypeError: a leaf is not floating or complex, as from JAX. Of an Equinox module, differentiate
        the arrays: ``eqx.partition(module, eqx.is_inexact_array)[0]``.

    Negative ids count from the end where jnp reads them so. For indices outside of the table the
    mode of the read decides: with ``"clip"`` the nearest row gets the gradient, with every other
    mode no row does. A use behind `jax.lax.stop_gradient` is no use. Inside `shard_map` a row
    gradient contains the rows that this device read; `all_reduce_rows` sums over devices.

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
    auto = isinstance(tables, str) and tables == "auto"
    select = None if auto else patterns.selector("tables", tables)
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(fun)
    def value_and_grad_of(*args: Any, **kwargs: Any) -> Any:
        if not _are_differentiable(args, positions):
            # JAX's own error.
            return jax.value_and_grad(fun, argnums, has_aux)(*args, **kwargs)
        leaves, treedef = _leaves(args, positions)
        traced = _trace(fun, has_aux, args, kwargs, positions)
        deferred = _deferred_leaves(rows_from, leaves)
        actions, chosen = _choose(traced.jaxpr, leaves, select, set(deferred))
        reads = all_reads(actions)

        def tapped(dense: list[Any], taps: list[Any]) -> Any:
            # Tables are not arguments here: no gradient of one is ever computed.
            rest = iter(dense)
            inputs = [
                deferred.get(i, leaf.value) if i in chosen else next(rest)
                for i, leaf in enumerate(leaves)
            ]
            outputs, indices = run_with_taps(traced.jaxpr, traced.consts, actions, inputs, taps)
            result = traced.rebuild(outputs)
            value, aux = result if has_aux else (result, None)
            return value, (aux, indices)

        dense = [
            deferred[i].whole() if i in deferred else leaf.value
            for i, leaf in enumerate(leaves)
            if i not in chosen
        ]
        taps = [read.tap() for read in reads]
        differentiated = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=True)
        (value, (aux, indices)), (dense, taps) = differentiated(dense, taps)
        rest = iter(dense)
        grads = treedef.unflatten(
            [
                _assemble(i, leaf.value, reads, indices, taps) if i in chosen else next(rest)
                for i, leaf in enumerate(leaves)
            ]
        )
        grads = grads[0] if isinstance(argnums, int) else grads
        return ((value, aux) if has_aux else value), grads

    return value_and_grad_of


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    tables: Any = "auto",
    rows_from: Any = None,
) -> Callable[..., Any]:
    """As `jax.grad`, but the gradient of a table is a `SparseRows`: see `value_and_grad`.

    Returns:
      A function from `fun`'s arguments to its gradient, or to (gradient, aux) with `has_aux`.

    >>> import jax.numpy as jnp
    >>> rows = grad(lambda table: jnp.sum(table[1] ** 2))(jnp.ones((3, 2)))
    >>> rows.indices.tolist(), rows.values.tolist()
    ([1], [[2.0, 2.0]])
    """
    both = value_and_grad(fun, argnums, has_aux, tables=tables, rows_from=rows_from)

    @functools.wraps(fun)
    def grad_of(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_of


# ---- (1) the arguments, and the trace -----------------------------------------------------------


class _Leaf(NamedTuple):
    """A leaf of the argument at `position`."""

    position: int
    keys: tuple[Any, ...]
    value: Any

    @property
    def path(self) -> Path:
        return trees.path_str(self.keys)


class _Traced(NamedTuple):
    """`fun` as a jaxpr of the differentiated leaves; `rebuild` makes its result from the jaxpr's
    outputs."""

    jaxpr: Any
    consts: Sequence[Any]
    rebuild: Callable[[Sequence[Any]], Any]


def _are_differentiable(args: Sequence[Any], positions: Sequence[int]) -> bool:
    """Whether the arguments exist and hold nothing but floating and complex arrays."""
    if not all(-len(args) <= i < len(args) for i in positions):
        return False
    leaves = jax.tree.leaves([args[i] for i in positions])
    return all(
        isinstance(x, jax.Array | np.ndarray | np.generic | float | complex)
        and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        for x in leaves
    )


def _leaves(args: Sequence[Any], positions: Sequence[int]) -> tuple[list[_Leaf], Any]:
    """The leaves of the arguments at `positions`, and the structure of the tuple of these."""
    leaves = []
    for i in positions:
        found, _ = jax.tree_util.tree_flatten_with_path(args[i])
        leaves += [_Leaf(i, keys, x) for keys, x in found]
    return leaves, jax.tree.structure(tuple(args[i] for i in positions))


def _by_argument(leaves: Sequence[_Leaf]) -> list[list[tuple[Path, Any]]]:
    """The paths and values of the leaves of each argument: a path is that within its argument."""
    groups = itertools.groupby(leaves, lambda leaf: leaf.position)
    return [[(leaf.path, leaf.value) for leaf in group] for _, group in groups]


def _trace(fun: Any, has_aux: bool, args: Any, kwargs: Any, positions: Sequence[int]) -> _Traced:
    """Traces `fun` as a function of the arguments at `positions`; it closes over the others."""
    inputs, treedef = jax.tree.flatten([args[i] for i in positions])
    static: list[Any] = []

    def flat(*inputs: Any) -> list[Any]:
        all_args = list(args)
        for i, x in zip(positions, treedef.unflatten(inputs), strict=True):
            all_args[i] = x
        result = fun(*all_args, **kwargs)
        if has_aux and not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(
                "expected function with aux output to return a two-element tuple, "
                f"but got type {type(result)} with value {result!r}"
            )
        outputs, out_tree = jax.tree.flatten(result)
        traced = [isinstance(x, jax.Array) for x in outputs]
        # Outputs that are no arrays, such as a string in the auxiliary output, bypass the jaxpr.
        others = [None if is_array else x for x, is_array in zip(outputs, traced, strict=True)]
        static[:] = [out_tree, traced, others]
        return [x for x, is_array in zip(outputs, traced, strict=True) if is_array]

    closed = jax.make_jaxpr(flat)(*inputs)
    out_tree, traced, others = static

    def rebuild(outputs: Sequence[Any]) -> Any:
        rest = iter(outputs)
        return out_tree.unflatten(
            [next(rest) if t else x for t, x in zip(traced, others, strict=True)]
        )

    return _Traced(closed.jaxpr, closed.consts, rebuild)


def _deferred_leaves(state: Any, leaves: Sequence[_Leaf]) -> dict[int, TracedTable]:
    """The leaves that are deferred tables, by position."""
    if state is None:
        return {}
    deferred = {}
    for path, read_now in current_rows(state).items():
        found = [i for i, leaf in enumerate(leaves) if leaf.path == path]
        if len(found) != 1:
            paths = ", ".join(repr(leaf.path) for leaf in leaves)
            raise ValueError(
                f"rows_from has a table at {path!r}, which must be the path of one differentiated "
                f"leaf; these are {paths}"
            )
        deferred[found[0]] = TracedTable(leaves[found[0]].value, read_now)
    return deferred


# ---- (2) the choice of tables -------------------------------------------------------------------


def _choose(
    jaxpr: Any, leaves: Sequence[_Leaf], select: Any, deferred: set[int]
) -> tuple[list[Any], set[int]]:
    """The actions of `jaxpr` (`follow`), and the positions of the leaves that are tables.

    Args:
      select: of `patterns.selector`; the selected leaves must be tables. None for "auto".
      deferred: positions of deferred tables, which are tables if they are only read by row; "auto"
        then means these alone.

    Raises:
      ValueError: a selected leaf is no table.
    """
    selected = set() if select is None else select(*_by_argument(leaves))
    any_table = select is None and not deferred
    candidates = set(range(len(leaves))) if any_table else selected | deferred
    actions, other_uses = _plan(jaxpr, candidates)
    for i in sorted(selected & set(other_uses)):
        raise ValueError(
            f"{leaves[i].path!r} is selected by tables, but is not only read by row: the operation "
            f"{other_uses[i]!r} uses it too. Leave it out of tables for a dense gradient"
        )
    tables = candidates - set(other_uses)
    if any_table:
        tables &= {read.table for read in all_reads(actions)}
    if tables != candidates:
        # Calls that use only dense leaves are left unchanged.
        actions, _ = _plan(jaxpr, tables)
    return actions, tables


def _plan(jaxpr: Any, candidates: set[int]) -> tuple[list[Any], dict[int, str]]:
    """The actions, and {candidate: the first operation that uses it other than by rows}."""
    other_uses: dict[int, str] = {}
    inputs = [i if i in candidates else None for i in range(len(jaxpr.invars))]
    actions, _ = follow(jaxpr, inputs, other_uses)
    return actions, other_uses


# ---- (4) row gradients --------------------------------------------------------------------------


def _assemble(
    i: int, table: Any, reads: Sequence[Read], indices: Sequence[Any], taps: Sequence[Any]
) -> SparseRows:
    """The row gradient of leaf `i` from the indices of all reads and the gradients of the taps."""
    dtype = jnp.result_type(table)
    wide = dtypes.compute_dtype(dtype)
    num_rows, *width = jnp.shape(table)
    _, *columns = jax.typeof(table).sharding.spec
    of_table = [k for k, read in enumerate(reads) if read.table == i]
    values = [reads[k].values(taps[k], columns, wide) for k in of_table]
    rows = SparseRows(
        jnp.concatenate([replicated(indices[k]) for k in of_table] or [jnp.zeros((0,), jnp.int32)]),
        jnp.concatenate(values or [jnp.zeros((0, *width), wide)]),
        num_rows=num_rows,
    ).sum_duplicates()
    return rows.with_values(rows.values.astype(dtype))
