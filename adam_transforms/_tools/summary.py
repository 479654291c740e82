"""A table of the parameters and their slots."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from adam_transforms._core import arguments, state_layout, trees
from adam_transforms._core.slots import Parameter, match
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._core.types import Params, Path, State
from adam_transforms._embeddings.deferred import sync
from adam_transforms._embeddings.deferred.missed_updates import UpdateHistory
from adam_transforms._embeddings.deferred.state import DeferredAdamState
from adam_transforms._embeddings.lazy import LazyState
from adam_transforms._tools.metrics import scalars_of


class Summary(str):
    """A string with itself as its repr, so that a notebook displays it as it prints."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def summary(params: Params, state: State, *, rows: bool = True) -> Summary:
    """A table of the parameters and their slots.

    Each parameter has one line:

    - its path, dtype and shape;
    - its kind: *deferred*, a table of `deferred_adam`; *lazy*, inside `lazy`; *dense*, with any
      other slots; *masked*, excluded by a mask or a group from states that have slots for other
      parameters (e.g. frozen); *no slots*;
    - the label of its group, if there are groups (`by_path` numbers them, the default last);
    - its slots, the arrays of the state that mirror it, their dtypes, and their shapes if they
      differ from the parameter's;
    - the bytes of the parameter and of its slots, over all devices;
    - if anything is sharded, the spec of the parameter, and of slots with another spec;
    - its rows: for a deferred table, the number of rows with pending updates and the longest idle
      gap; for a lazy parameter, the number of untouched rows, in which nu is zero.

    Below are the totals, the scalars of the state by their names in `metrics`, and under *other*
    the rest of the state.

    Args:
      params: the parameters: a tree of arrays, a Flax NNX module or state.
      state: the optimizer state, with any wrappers; slots are found by the paths of the parameters.
        Arrays may be abstract (`jax.ShapeDtypeStruct`, tracers); their values are then omitted.
      rows: whether to count rows. This reads tables and slots on their devices in O(V D) time; only
        counts are copied to the host. With several processes, all of them must then call it.

    Returns:
      A string that displays as it prints.

    >>> import jax.numpy as jnp, optax
    >>> params = {"bias": jnp.zeros(256), "kernel": jnp.zeros((1024, 256))}
    >>> summary(params, optax.adam(1e-3).init(params))
    parameter  type               kind   slots              bytes  slot bytes
    ---------  -----------------  -----  ---------------  -------  ----------
    bias       float32[256]       dense  mu, nu: float32  1.0 KiB     2.0 KiB
    kernel     float32[1024,256]  dense  mu, nu: float32  1.0 MiB     2.0 MiB
    <BLANKLINE>
    total  2 parameters, 262,400 elements, 1.0 MiB
    state  2.0 MiB: mu 1.0 MiB, nu 1.0 MiB, other 4 B
    count  0
    """
    rows = arguments.flag("rows", rows)
    params, state = trees.unwrap_variables(params), trees.unwrap_variables(state)
    parameters, rest = match(params, state)
    row_stats = _row_stats(parameters, state) if rows else {}
    scalars = scalars_of(state)
    named = {scalar.place.keys for scalar in scalars}
    other = [(place, node) for place, node in rest if place.keys not in named]
    items = [*_totals(parameters, rest), *((s.name, _value(s.value)) for s in scalars)]
    blocks = [_table(parameters, row_stats), _two_columns(items)]
    if other:
        blocks.append(["other", *_two_columns([(f"  {place}", _other(x)) for place, x in other])])
    return Summary("\n\n".join("\n".join(lines) for lines in blocks if lines))


def _kind(parameter: Parameter) -> str:
    slots = parameter.slots
    if any(slot.place.role is state_layout.Role.LAST_STEP for slot in slots):
        return "deferred"
    if any(LazyState in slot.place.states for slot in slots):
        return "lazy"
    return "dense" if slots else "masked" if parameter.is_masked else "no slots"


# ---- statistics of rows -------------------------------------------------------------------------


def _row_stats(parameters: Sequence[Parameter], state: State) -> dict[Path, str]:
    """{path: text about the rows} of the tables that are not abstract."""
    row_stats = {}
    states = trees.find_states(state, DeferredAdamState)
    tables = {p.path: p.leaf for p in parameters if _kind(p) == "deferred"}
    if tables and _is_concrete((tables, states)):
        for path, owed in jax.device_get(_owed(tables, states)).items():
            row_stats[path] = f"{int(owed.rows):,} owe, gap up to {int(owed.longest_gap):,}"
    nus = {
        p.path: slot.leaf
        for p in parameters
        for slot in p.slots
        if _kind(p) == "lazy" and slot.place.field == "nu" and len(trees.shape_of(slot.leaf)) > 1
    }
    if nus and _is_concrete(nus):
        for path, untouched in jax.device_get(_untouched(nus)).items():
            if untouched:
                row_stats[path] = f"{int(untouched):,} untouched"
    return row_stats


_owed = jax.jit(sync.owed)  # fused, with fewer temporaries of the size of a table


@jax.jit
def _untouched(nus: dict[Path, jax.Array]) -> dict[Path, jax.Array]:
    """The number of rows of each nu that are zero."""

    def count(nu: jax.Array) -> jax.Array:
        return jnp.sum(jnp.all(nu == 0, axis=tuple(range(1, nu.ndim))), dtype=jnp.int32)

    return jax.tree.map(count, nus)


# ---- text ---------------------------------------------------------------------------------------


def _table(parameters: Sequence[Parameter], row_stats: dict[Path, str]) -> list[str]:
    """The lines of the parameters; empty columns are omitted."""
    columns = {
        "parameter": [p.path or "(the parameter)" for p in parameters],
        "type": [_type(p.leaf) for p in parameters],
        "kind": [_kind(p) for p in parameters],
        "group": [_groups(p) for p in parameters],
        "slots": [_slots(p) for p in parameters],
        "bytes": [_bytes(_size(p.leaf)) for p in parameters],
        "slot bytes": [
            _bytes(_size([s.leaf for s in p.slots])) * bool(p.slots) for p in parameters
        ],
        "sharding": [_shardings(p) for p in parameters],
        "rows": [row_stats.get(p.path, "") for p in parameters],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    if not columns:
        return []
    lines = []
    widths = {name: max(map(len, (name, *cells))) for name, cells in columns.items()}
    rule = ["-" * width for width in widths.values()]
    for cells in (list(columns), rule, *zip(*columns.values(), strict=True)):
        padded = [
            cell.rjust(width) if name.endswith("bytes") else cell.ljust(width)
            for cell, (name, width) in zip(cells, widths.items(), strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _two_columns(items: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in items)
    return [f"{name.ljust(width)}  {value}" for name, value in items]


def _totals(
    parameters: Sequence[Parameter], rest: Sequence[tuple[state_layout.Place, Any]]
) -> list[tuple[str, str]]:
    leaves = [p.leaf for p in parameters]
    by_slot: dict[str, list[Any]] = {}
    for slot in (slot for p in parameters for slot in p.slots):
        by_slot.setdefault(slot.place.field or slot.name, []).append(slot.leaf)
    other = [node for _, node in rest]
    if other:
        by_slot["other"] = other
    state = list(by_slot.values())
    elements = sum(math.prod(trees.shape_of(leaf)) for leaf in leaves)
    parts = ", ".join(f"{name} {_bytes(_size(x))}" for name, x in by_slot.items())
    counts = f"{_count(len(leaves), 'parameter')}, {_count(elements, 'element')}"
    totals = [
        ("total", f"{counts}, {_bytes(_size(leaves))}"),
        ("state", _bytes(_size(state)) + (f": {parts}" if parts else "")),
    ]
    per_device = [_size(x, on_one_device=True) for x in (leaves, state)]
    if per_device != [_size(leaves), _size(state)]:
        of_parameters, of_state = map(_bytes, per_device)
        totals.append(("per device", f"{of_parameters} of parameters, {of_state} of state"))
    return totals


def _groups(parameter: Parameter) -> str:
    groups = ("/".join(slot.place.groups) for slot in parameter.slots)
    return ", ".join(dict.fromkeys(group for group in groups if group))


def _slots(parameter: Parameter) -> str:
    """Names grouped by type: "mu, nu: float32; ema: bfloat16"."""
    names: dict[str, list[str]] = {}
    for slot in parameter.slots:
        slot_type = str(trees.dtype_of(slot.leaf))
        if isinstance(slot.leaf, SparseRows):
            slot_type += f", {slot.leaf.values.shape[0]:,} rows"
        elif trees.shape_of(slot.leaf) != trees.shape_of(parameter.leaf):
            slot_type = _type(slot.leaf)
        names.setdefault(slot_type, []).append(slot.name)
    return "; ".join(f"{', '.join(slots)}: {slot_type}" for slot_type, slots in names.items())


def _shardings(parameter: Parameter) -> str:
    """The spec of the parameter, and different specs of slots of the same rank."""
    own, rank = _spec(parameter.leaf), len(trees.shape_of(parameter.leaf))
    others: dict[str, list[str]] = {}
    for slot in parameter.slots:
        if len(trees.shape_of(slot.leaf)) == rank and _spec(slot.leaf) != own:
            others.setdefault(_spec(slot.leaf) or "replicated", []).append(slot.name)
    parts = [own] * bool(own)
    return "; ".join(parts + [f"{', '.join(names)}: {spec}" for spec, names in others.items()])


def _spec(x: Any) -> str:
    """The sharding of an array as text; empty if it is replicated or not known."""
    x = x.values if isinstance(x, SparseRows) else x
    sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if sharding is None or sharding.is_fully_replicated:
        return ""
    return str(tuple(sharding.spec)) if isinstance(sharding, NamedSharding) else str(sharding)


def _other(node: Any) -> str:
    if isinstance(node, UpdateHistory):
        return f"{_bytes(_size(node))}, what steps have done to idle rows"
    return _value(node) if trees.shape_of(node) == () else f"{_type(node)}, {_bytes(_size(node))}"


def _value(x: Any) -> str:
    """A scalar as text: its value, or its type if it is abstract or a PRNG key."""
    if not _is_concrete(x) or jnp.issubdtype(trees.dtype_of(x), jax.dtypes.extended):
        return _type(x)
    value = np.asarray(x)[()]
    if jnp.issubdtype(value.dtype, jnp.integer):
        return f"{int(value):,}"
    return f"{float(value):.6g}" if jnp.issubdtype(value.dtype, jnp.floating) else str(value)


def _type(x: Any) -> str:
    return f"{trees.dtype_of(x)}[{','.join(map(str, trees.shape_of(x)))}]"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


# ---- concrete and abstract arrays ---------------------------------------------------------------


def _is_concrete(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    return not any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in leaves)


def _size(tree: Any, *, on_one_device: bool = False) -> int:
    """Bytes over all devices (replicated arrays are counted once), or on one device."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = trees.shape_of(x)
        sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
        if on_one_device and sharding is not None:
            shape = sharding.shard_shape(shape)
        total += math.prod(shape) * trees.dtype_of(x).itemsize
    return total
