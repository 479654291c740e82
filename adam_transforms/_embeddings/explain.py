"""Says which leaves get row gradients, and why the others do not."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adam_transforms._core import patterns
from adam_transforms._core.types import Path
from adam_transforms._embeddings.reads.choosing import Choice
from adam_transforms._embeddings.reads.direct import is_static, reads_all
from adam_transforms._embeddings.reads.following import Use
from adam_transforms._embeddings.tracing import (
    Leaf,
    deferred_leaves,
    find_tables,
    leaves_of,
    trace,
)
from adam_transforms._embeddings.value_and_grad import check_loss, positions_of
from adam_transforms._xla.jaxprs import location
from adam_transforms._xla.row_independence import REDUCTIONS


class LeafReads(NamedTuple):
    """How a function reads a leaf of its arguments.

    Attributes:
      shape: of the leaf.
      is_rows: whether the gradient is a `SparseRows`.
      n: the number of rows read, before duplicates are summed.
      reads: where rows are read, as file:line.
      why: why the gradient is dense; empty if it is not.
      operation: the name of the operation that uses the leaf as a whole; empty if none does.
      where: of that operation, as file:line.
      is_inherent: whether that operation uses all rows, so that the gradient is dense by its
        nature. False if the operation is not followed.
    """

    shape: tuple[Any, ...]
    is_rows: bool
    n: Any
    reads: list[str]
    why: str = ""
    operation: str = ""
    where: str = ""
    is_inherent: bool = False


class Explanation(dict[Path, LeafReads]):
    """{path: how the leaf is read}; printed, a line for each leaf."""

    def __str__(self) -> str:
        lines = []
        width = max([len(_name(path)) for path in self], default=0)
        for path, leaf in self.items():
            shape = ",".join(map(str, leaf.shape))
            if leaf.is_rows:
                reads = "read" if len(leaf.reads) == 1 else "reads"
                text = f"rows   {len(leaf.reads)} {reads}, {leaf.n} rows: " + ", ".join(
                    dict.fromkeys(leaf.reads)
                )
            else:
                text = f"dense  {leaf.why}"
            lines.append(f"{_name(path):{width}}  [{shape}]  {text}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    fun: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    tables: patterns.Selection = "auto",
    rows_from: Any = None,
    **kwargs: Any,
) -> Explanation:
    """Says which leaves get row gradients from `value_and_grad`, and why the others do not.

    The function is traced, not run: arrays may be `jax.ShapeDtypeStruct`.

    Args:
      fun, argnums, has_aux, tables, rows_from: as for `value_and_grad`.
      args, kwargs: the arguments of `fun`.

    Returns:
      A dict from the path of each differentiated leaf to its `LeafReads`, which prints a line for
      each. Where several arguments are differentiated, the paths start with the position of the
      argument.

    Raises:
      ValueError: a pattern of `tables` matches nothing, or `rows_from` does not fit.

    >>> import jax.numpy as jnp
    >>> params = {"table": jnp.ones((50, 2)), "tied": jnp.ones((50, 2))}
    >>> def loss(params, ids):
    ...     return jnp.sum(params["table"][ids] @ params["tied"].T)
    >>> report = explain(loss, params, jnp.array([3, 0, 3]))
    >>> report["table"].is_rows, report["table"].n
    (True, 3)
    >>> report["tied"].operation, report["tied"].is_inherent
    ('dot_general', True)
    """
    check_loss(fun)
    positions = positions_of(argnums)
    if max(positions, default=0) >= len(args):
        # JAX's own error.
        jax.eval_shape(jax.value_and_grad(fun, argnums, has_aux), *args, **kwargs)
    leaves, _ = leaves_of(args, positions)
    traced = trace(fun, has_aux, args, kwargs, positions)
    deferred = set(deferred_leaves(rows_from, leaves))
    auto = isinstance(tables, str) and tables == "auto"
    select = None if auto else patterns.selector("tables", tables)
    choice, selected = find_tables(traced, leaves, select, deferred)
    report = Explanation()
    for i, leaf in enumerate(leaves):
        path = leaf.path if not isinstance(argnums, Iterable) else f"{leaf.position}/{leaf.path}"
        report[path] = _explain(i, leaf, choice, i in selected)
    return report


def _explain(i: int, leaf: Leaf, choice: Choice, is_candidate: bool) -> LeafReads:
    shape, reads = jnp.shape(leaf.value), choice.reads.get(i, [])
    n = sum(read.num_rows_read for read in reads)
    where = [location(read.site) or "?" for read in reads]
    if i in choice.tables:
        return LeafReads(shape, True, n, where)
    use = choice.uses.get(i)
    if use is not None:
        return _used_whole(shape, n, where, use)
    if not is_candidate:
        why = "it is not selected by tables or rows_from"
    elif not shape:
        why = "a scalar has no rows"
    elif not reads:
        why = "the loss does not use it"
    elif is_static(reads):
        why = "rows are read only at positions fixed in the program: name it in tables"
    else:
        assert reads_all(reads, shape[:1])
        why = f"{n} rows are read of {shape[0]}: rows would be no smaller"
    return LeafReads(shape, False, n, where, why)


def _used_whole(shape: Any, n: Any, reads: list[str], use: Use) -> LeafReads:
    where = location(use.site) or "?"
    text = f"{use.name} at {where}: {use.why}"
    if reads and use.is_inherent and use.name == "dot_general":
        text += " (a softmax over all rows? A sampled softmax reads rows)"
    elif reads and use.is_inherent and use.name in {*REDUCTIONS, "mul", "square", "integer_pow"}:
        text += " (an L2 term over all rows? Weight decay inside lazy is by row)"
    return LeafReads(shape, False, n, reads, text, use.name, where, use.is_inherent)


def _name(path: Path) -> str:
    return path or "(the argument)"
