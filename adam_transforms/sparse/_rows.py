"""The gradient of a table by the rows it touches."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adam_transforms import _numerics

# Slots to an index in the hash table of `_first_positions`: few collisions, and little memory.
_SLOTS_PER_INDEX = 8
# 2^32 over the golden ratio: multiplying by it spreads consecutive indices (Knuth, TAOCP 3, 6.4).
_MULTIPLIER = 2654435769


@jax.tree_util.register_pytree_with_keys_class
class SparseRows:
    r"""A table-shaped gradient or update that is zero but for some rows.

    .. math:: G_{r} = \sum_{i:\, \mathrm{indices}_i = r} \mathrm{values}_i

    Args:
      indices: int32 (n,), the rows. One that equals `num_rows` is padding: it means nothing, nor
        does its value. Whatever else lies outside [0, num_rows) is treated as padding too.
      values: (n, D...), what each adds to its row.
      num_rows: V, static: the table's shape is (V, D...).
      unique: static; whether no row is named twice, padding aside.

    ``params + rows`` adds the rows to a table, so that `optax.apply_updates` and whatever else adds
    updates to parameters takes them as they are. As a pytree it keeps its indices in an array that
    admits no arithmetic: a transformation that maps over leaves without knowing of rows fails when
    it is traced, where it would have scaled or clipped the indices otherwise.

    >>> import jax.numpy as jnp
    >>> rows = SparseRows(jnp.array([2, 0, 2]), jnp.array([[1.0], [2.0], [3.0]]), num_rows=4)
    >>> rows
    SparseRows(float32[4,1], 3 of 4 rows)
    >>> (jnp.ones((4, 1)) + rows).tolist()
    [[3.0], [1.0], [5.0], [1.0]]
    """

    __array_ufunc__ = None  # NumPy parameters leave the addition to `__radd__`

    values: Any
    num_rows: int
    unique: bool
    _keys: Any

    def __init__(self, indices: Any, values: Any, num_rows: int, *, unique: bool = False) -> None:
        indices, values = jnp.asarray(indices), jnp.asarray(values)
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        if indices.ndim != 1 or values.shape[:1] != indices.shape:
            raise ValueError(
                "indices and values must have shapes (n,) and (n, D...), "
                f"got {list(indices.shape)} and {list(values.shape)}"
            )
        self.values = values
        self.num_rows = operator.index(num_rows)
        self.unique = unique
        self._keys = _as_keys(indices.astype(jnp.int32))

    @property
    def indices(self) -> jax.Array:
        """int32 (n,)."""
        return jax.random.key_data(self._keys)[..., 0].astype(jnp.int32)

    @property
    def shape(self) -> tuple[int, ...]:
        """The table's."""
        return (self.num_rows, *self.values.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def is_row(self) -> jax.Array:
        """bool (n,): False at padding."""
        indices = self.indices
        return (indices >= 0) & (indices < self.num_rows)

    def to_dense(self) -> jax.Array:
        """The (V, D...) array, duplicates summed."""
        dtype = _numerics.compute_dtype(self.dtype)
        dense = jnp.zeros(self.shape, dtype)
        return self._scatter_add(dense, self.values.astype(dtype)).astype(self.dtype)

    def sum_duplicates(self) -> "SparseRows":
        """The same gradient with each row named once.

        The first of equal indices gets the sum, in at least float32 on the way; the others become
        padding. The order and n stay. O(n) in time and memory, whatever V.
        """
        if self.unique:
            return self
        indices = jnp.where(self.is_row, self.indices, self.num_rows)
        first = _first_positions(indices)
        kept = first == jnp.arange(indices.size, dtype=jnp.int32)
        dtype = _numerics.compute_dtype(self.dtype)
        sums = jnp.zeros(self.values.shape, dtype).at[first].add(self.masked_values().astype(dtype))
        return SparseRows(
            jnp.where(kept, indices, self.num_rows),
            sums.astype(self.dtype),
            self.num_rows,
            unique=True,
        )

    def masked(self, x: jax.Array) -> jax.Array:
        """`x`, (n, ...), with zeros at padding."""
        mask = jnp.reshape(self.is_row, (-1,) + (1,) * (x.ndim - 1))
        return jnp.where(mask, x, jnp.zeros((), x.dtype))

    def masked_values(self) -> jax.Array:
        """`values` with zeros at padding."""
        return self.masked(self.values)

    def with_values(self, values: jax.Array) -> "SparseRows":
        """The same rows with other values."""
        return SparseRows(self.indices, values, self.num_rows, unique=self.unique)

    def _scatter_add(self, table: jax.Array, values: jax.Array) -> jax.Array:
        # "drop" leaves out what is outside, but wraps what is negative.
        indices = jnp.where(self.is_row, self.indices, self.num_rows)
        return table.at[indices].add(values, mode="drop", unique_indices=self.unique)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, SparseRows):
            if self.shape != other.shape:
                raise ValueError(f"row gradients of {self.shape} and {other.shape} do not add")
            dtype = _numerics.promote(self.dtype, other.dtype)
            return SparseRows(
                jnp.concatenate([self.indices, other.indices]),
                jnp.concatenate([self.values.astype(dtype), other.values.astype(dtype)]),
                self.num_rows,
            )
        return self.__radd__(other)

    def __radd__(self, table: Any) -> jax.Array:
        """``table + self``, in the promotion of both dtypes; each row is rounded once."""
        table = jnp.asarray(table)
        if table.shape != self.shape:
            raise ValueError(
                f"rows of a {list(self.shape)} table cannot be added to {list(table.shape)}"
            )
        dtype = _numerics.promote(table.dtype, self.dtype)
        if jnp.finfo(dtype).bits >= 32:
            return self._scatter_add(table.astype(dtype), self.values.astype(dtype))
        rows = self.sum_duplicates()
        wide = _numerics.compute_dtype(dtype)
        before = table.at[rows.indices].get(mode="clip").astype(wide)
        after = (before + rows.values.astype(wide)).astype(dtype)
        return table.astype(dtype).at[rows.indices].set(after, mode="drop", unique_indices=True)

    def __mul__(self, factor: Any) -> "SparseRows":
        """Every value times a scalar."""
        if jnp.ndim(factor) != 0:
            raise ValueError(f"a row gradient is scaled by a scalar, got {jnp.shape(factor)}")
        return self.with_values(self.values * factor)

    __rmul__ = __mul__

    def __neg__(self) -> "SparseRows":
        return self.with_values(-self.values)

    def __repr__(self) -> str:
        values = self.values
        if not hasattr(values, "shape"):
            return f"SparseRows({values!r}, num_rows={self.num_rows})"
        sizes = ",".join(map(str, self.shape))
        rows = "distinct rows" if self.unique else "rows"
        return f"SparseRows({values.dtype}[{sizes}], {values.shape[0]} of {self.num_rows} {rows})"

    def tree_flatten_with_keys(self) -> Any:
        names = (jax.tree_util.GetAttrKey("indices"), jax.tree_util.GetAttrKey("values"))
        leaves = (self._keys, self.values)
        return tuple(zip(names, leaves, strict=True)), (self.num_rows, self.unique)

    @classmethod
    def tree_unflatten(cls, static: tuple[int, bool], leaves: tuple[Any, Any]) -> "SparseRows":
        rows = object.__new__(cls)
        rows._keys, rows.values = leaves
        rows.num_rows, rows.unique = static
        return rows


def is_rows(x: Any) -> bool:
    """Makes `jax.tree` functions treat a row gradient as a leaf."""
    return isinstance(x, SparseRows)


def on_values(fn: Callable[[jax.Array], jax.Array], x: Any) -> Any:
    """`fn` of an array, or of the values of a row gradient."""
    return x.with_values(fn(x.values)) if is_rows(x) else fn(x)


def to_parts(tree: Any) -> Any:
    """`tree` with ``(indices, values)`` for each row gradient: plain arrays, as a carry needs."""
    return jax.tree.map(lambda x: (x.indices, x.values) if is_rows(x) else x, tree, is_leaf=is_rows)


def from_parts(like: Any, parts: Any) -> Any:
    """What `to_parts` took apart; tables' sizes and uniqueness are those of the rows in `like`."""
    return jax.tree.map(
        lambda x, part: (
            SparseRows(part[0], part[1], x.num_rows, unique=x.unique) if is_rows(x) else part
        ),
        like,
        parts,
        is_leaf=is_rows,
    )


def to_dense(tree: Any) -> Any:
    """A tree of gradients with every `SparseRows` made a dense array.

    >>> import jax.numpy as jnp
    >>> rows = SparseRows(jnp.array([1]), jnp.array([[5.0]]), num_rows=2)
    >>> to_dense({"table": rows})["table"].tolist()
    [[0.0], [5.0]]
    """
    return jax.tree.map(lambda x: x.to_dense() if is_rows(x) else x, tree, is_leaf=is_rows)


def _as_keys(indices: jax.Array) -> jax.Array:
    """The indices as an array of PRNG keys, which no arithmetic is defined on."""
    words = jnp.stack([indices.astype(jnp.uint32), jnp.zeros_like(indices, jnp.uint32)], axis=-1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _first_positions(indices: jax.Array) -> jax.Array:
    """For each of (n,) int32 indices the position of the first that equals it; int32 (n,).

    Hashing, where sorting would take ten times as long: each index writes its position into its
    slot of a small table, the first one wins, and all that find their own index there are done.
    The others, whose slot went to another index, try again with another hash.
    """
    n = indices.size
    positions = jnp.arange(n, dtype=jnp.int32)
    bits = max(1, math.ceil(math.log2(max(n, 1) * _SLOTS_PER_INDEX)))
    slots = 1 << bits

    def settle(state: tuple[Any, ...]) -> tuple[Any, ...]:
        attempt, open_, first = state
        salted = indices.astype(jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
        hashed = salted * (jnp.uint32(_MULTIPLIER) + attempt * jnp.uint32(0x9E3779B2))
        slot = (hashed ^ (hashed >> 15)) * jnp.uint32(0x85EBCA6B) >> jnp.uint32(32 - bits)
        owner = jnp.full((slots,), n, jnp.int32)
        owner = owner.at[jnp.where(open_, slot.astype(jnp.int32), slots)].min(
            positions, mode="drop"
        )
        winner = owner[slot.astype(jnp.int32)]
        settled = open_ & (indices[jnp.minimum(winner, n - 1)] == indices) & (winner < n)
        first = jnp.where(settled, winner, first)
        return attempt + jnp.uint32(1), open_ & ~settled, first

    if n == 0:
        return positions
    # Made from `indices`, to vary over the mesh axes that they vary over inside `shard_map`.
    zeros = jnp.zeros_like(indices)
    start = (jnp.uint32(0), zeros == 0, positions + zeros)
    return jax.lax.while_loop(lambda state: jnp.any(state[1]), settle, start)[2]
