"""The gradient of a table by the rows it touches."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adam_transforms._core import dtypes
from adam_transforms._xla import scheduling
from adam_transforms._xla.duplicates import first_positions

# Bytes of the (n, D...) values from how many on rows are better treated some at a time. As measured
# with lazy Adam on two cores: below, all at once is as fast.
_MANY_BYTES = 2 * 2**20


@jax.tree_util.register_pytree_with_keys_class
class SparseRows:
    r"""A table-shaped gradient or update that is zero but for some rows.

    .. math:: G_{r} = \sum_{i:\, \mathrm{indices}_i = r} \mathrm{values}_i

    Args:
      indices: integers (n,), kept in int32: the rows. One that equals `num_rows` is padding: it
        means nothing, nor does its value. Whatever else lies outside [0, num_rows), negative or
        not, is treated as padding too.
      values: (n, D...), floating or complex, what each adds to its row.
      num_rows: V < 2^31, static: the table's shape is (V, D...).
      unique: static; whether no row is named twice, padding aside.

    Raises:
      TypeError, ValueError: a wrong dtype, shape or number of rows.

    ``params + rows`` adds the rows to a table, so that `optax.apply_updates` and whatever else adds
    updates to parameters takes them as they are. The sum has the table's dtype, and each row is
    rounded to it once; rows that it cannot hold (of an integer table, any) are a TypeError.

    As a pytree it keeps its indices in an array that admits no arithmetic: a transformation that
    maps over leaves without knowing of rows fails when it is traced, where it would have scaled or
    clipped the indices otherwise.

    Over a mesh every device gets all n rows, sharded along D as `values` are, and a table that they
    are added to stays sharded as it was. What comes out of `jax.vmap` is a batch, with leaves
    (B, n) and (B, n, D...): it can be mapped over again, and nothing else.

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
        num_rows = operator.index(num_rows)
        if not 0 <= num_rows < 2**31:
            raise ValueError(f"num_rows must be in [0, 2^31), got {num_rows}")
        indices, values = _as_int32(indices, num_rows), jnp.asarray(values)
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            raise TypeError(f"values must be floating or complex, got {values.dtype}")
        if indices.ndim != 1 or values.shape[:1] != indices.shape:
            raise ValueError(
                "indices and values must have shapes (n,) and (n, D...), "
                f"got {list(indices.shape)} and {list(values.shape)}"
            )
        self.values = _all_rows(values)
        self.num_rows = num_rows
        self.unique = unique
        self._keys = _as_keys(_all_rows(indices))

    @property
    def indices(self) -> jax.Array:
        """int32 (n,)."""
        return jax.random.key_data(self._keys)[..., 0].astype(jnp.int32)

    @property
    def padded_indices(self) -> jax.Array:
        """int32 (n,): `indices`, with `num_rows` for all that is padding."""
        self._refuse_batch()
        return _padded(self.indices, self.num_rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """The table's, or the batch of tables': (V, D...), or (B, V, D...)."""
        keys = self._keys
        return (*keys.shape[:-1], self.num_rows, *self.values.shape[keys.ndim :])

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def is_row(self) -> jax.Array:
        """bool (n,): False at padding."""
        return self.padded_indices < self.num_rows

    def to_dense(self) -> jax.Array:
        """The (V, D...) array, duplicates summed."""
        dtype = dtypes.compute_dtype(self.dtype)
        zeros, values = jnp.zeros(self.shape, dtype), self.values.astype(dtype)
        return self._scatter_add(zeros, values, explicit_sharding(values)).astype(self.dtype)

    @property
    def are_many(self) -> bool:
        """Whether a CPU had better treat them some at a time (`_blocks`)."""
        size = self.values.shape[0] * math.prod(self.shape[1:]) * self.dtype.itemsize
        return jax.default_backend() == "cpu" and size >= _MANY_BYTES

    def sum_duplicates(self, and_run: tuple[jax.Array, int] | None = None) -> "SparseRows":
        """The same gradient with each row named once, and the rest padding with zeros.

        In at least float32 on the way. O(n) in time and memory, whatever V. The rows are where they
        are first named; or, if `are_many`, one after the other, with all the padding at the end.

        Args:
          and_run: (start, length), consecutive rows to be named besides, with zeros: n grows by
            `length`. `start` is an int32 scalar.
        """
        self._refuse_batch()
        if self.unique and and_run is None:
            return self.with_values(self.masked_values())
        indices, n = self.padded_indices, self.indices.size
        positions = jnp.arange(n, dtype=jnp.int32)
        first = positions if self.unique else first_positions(indices, self.num_rows)
        is_row = indices < self.num_rows
        is_first = is_row & (first == positions)
        if and_run is not None:
            run, is_new = self._others_of_run(indices, *and_run)
            indices, is_first = (
                jnp.concatenate(pair) for pair in ((indices, run), (is_first, is_new))
            )
        size = indices.size
        distinct = jnp.where(is_first, indices, self.num_rows)
        if self.are_many:
            place = jax.lax.associative_scan(jnp.add, is_first.astype(jnp.int32)) - 1
            at = jnp.full((size,), self.num_rows, jnp.int32).at[jnp.where(is_first, place, size)]
            distinct = at.set(indices, mode="drop", unique_indices=True)
            first = place[first]
        if self.unique and not self.are_many:  # nothing is to be added or moved
            more = [(0, size - n)] + [(0, 0)] * (self.values.ndim - 1)
            sums = jnp.pad(self.masked_values(), more)
        else:
            dtype = dtypes.compute_dtype(self.dtype)
            values = self.values.astype(dtype)
            into = jnp.where(is_row, first, size)  # padding goes nowhere
            sums = jnp.zeros((size, *values.shape[1:]), dtype).at[into]
            sums = sums.add(values, mode="drop", out_sharding=explicit_sharding(values))
        return SparseRows(distinct, sums.astype(self.dtype), self.num_rows, unique=True)

    def _others_of_run(
        self, indices: jax.Array, start: jax.Array, length: int
    ) -> tuple[jax.Array, jax.Array]:
        """The rows start, start+1, ..., int32 (length,), and which of them are rows that none of
        `indices` names."""
        run = _padded(start + jnp.arange(length, dtype=jnp.int32), self.num_rows)
        offset = jnp.where(indices >= start, indices - start, length)
        named = jnp.zeros((length,), bool).at[offset].set(True, mode="drop")
        return run, ~named & (run < self.num_rows)

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

    def gather(self, table: jax.Array) -> jax.Array:
        """(n, D...), these rows of a table or of what mirrors it; zeros at padding."""
        sharding = explicit_sharding(table, all_rows=True)
        return self.masked(table.at[self.indices].get(mode="clip", out_sharding=sharding))

    def scatter(self, table: jax.Array, values: jax.Array) -> jax.Array:
        """`table`, or what mirrors it, with these rows, which must be unique, replaced."""
        return self._at(table).set(
            values, mode="drop", unique_indices=True, out_sharding=explicit_sharding(table)
        )

    def _scatter_add(self, table: jax.Array, values: jax.Array, sharding: Any) -> jax.Array:
        return self._at(table).add(
            values, mode="drop", unique_indices=self.unique, out_sharding=sharding
        )

    def _at(self, table: jax.Array) -> Any:
        # "drop" leaves out what is outside, but wraps what is negative.
        return jnp.asarray(table).at[self.padded_indices]

    def _refuse_batch(self) -> None:
        if self._keys.ndim != 1:
            raise ValueError(
                f"indices must have shape (n,), got {list(self._keys.shape)} in {self}: "
                "a batch of row gradients is for jax.vmap to map over"
            )

    def __add__(self, other: Any) -> Any:
        self._refuse_batch()
        if isinstance(other, SparseRows):
            if self.shape != other.shape:
                raise ValueError(f"row gradients of {self.shape} and {other.shape} do not add")
            dtype = dtypes.promote(self.dtype, other.dtype)
            return SparseRows(
                jnp.concatenate([self.indices, other.indices]),
                jnp.concatenate([self.values.astype(dtype), other.values.astype(dtype)]),
                self.num_rows,
            )
        return self.__radd__(other)

    def __radd__(self, table: Any) -> jax.Array:
        """``table + self``, in the table's dtype; each row is rounded once."""
        table = jnp.asarray(table)
        if table.shape != self.shape:
            raise ValueError(
                f"rows of a {list(self.shape)} table cannot be added to {list(table.shape)}"
            )
        loses_imaginary = jnp.iscomplexobj(self.values) and not jnp.iscomplexobj(table)
        if loses_imaginary or not jnp.issubdtype(table.dtype, jnp.inexact):
            raise TypeError(f"a table in {table.dtype} cannot take rows in {self.dtype}")
        wide = dtypes.compute_dtype(table.dtype, self.dtype)
        if wide == table.dtype:
            return self._scatter_add(table, self.values.astype(wide), explicit_sharding(table))
        # Not the table in a wider dtype: that would be one more array of its size.
        rows = self.sum_duplicates()
        after = rows.gather(table).astype(wide) + rows.values.astype(wide)
        return rows.scatter(table, after.astype(table.dtype))

    def __mul__(self, factor: Any) -> "SparseRows":
        """Every value times a scalar."""
        if jnp.ndim(factor) != 0:
            raise ValueError(f"a row gradient is scaled by a scalar, got {jnp.shape(factor)}")
        return self.with_values(self.values * factor)

    __rmul__ = __mul__

    def __neg__(self) -> "SparseRows":
        return self.with_values(-self.values)

    def __repr__(self) -> str:
        keys, values = self._keys, self.values
        n = getattr(keys, "shape", ())
        if not n or getattr(values, "shape", ())[: len(n)] != n:
            # The leaves are anything, as in a tree of shardings or of the axes to map over.
            return f"SparseRows({keys!r}, {values!r}, num_rows={self.num_rows})"
        sizes = ",".join(map(str, self.shape))
        rows = "distinct rows" if self.unique else "rows"
        batched = ", batched" if len(n) > 1 else ""
        return f"SparseRows({values.dtype}[{sizes}], {n[-1]} of {self.num_rows} {rows}{batched})"

    def tree_flatten_with_keys(self) -> Any:
        # The values first: whoever asks the first leaf for a dtype, as `optax.inject_hyperparams`
        # does, wants one of numbers.
        names = (jax.tree_util.GetAttrKey("values"), jax.tree_util.GetAttrKey("indices"))
        leaves = (self.values, self._keys)
        return tuple(zip(names, leaves, strict=True)), (self.num_rows, self.unique)

    @classmethod
    def tree_unflatten(cls, static: tuple[int, bool], leaves: tuple[Any, Any]) -> "SparseRows":
        rows = object.__new__(cls)
        rows.values, rows._keys = leaves
        rows.num_rows, rows.unique = static
        return rows


def is_rows(x: Any) -> bool:
    """Makes `jax.tree` functions treat a row gradient as a leaf."""
    return isinstance(x, SparseRows)


def on_values(fn: Callable[[jax.Array], jax.Array], x: Any) -> Any:
    """`fn` of an array, or of the values of a row gradient."""
    return x.with_values(fn(x.values)) if is_rows(x) else fn(x)


def take_rows(x: Any, rows: SparseRows | None) -> Any:
    """The touched rows of a table or a slot, zeros at padding; all of it for None."""
    if rows is None or x is None:
        return x
    return scheduling.computed_once(rows.gather(jnp.asarray(x)), instructions=4)


def put_rows(x: Any, rows: SparseRows | None, new: Any) -> Any:
    """A table or a slot with its touched rows, which must be unique, replaced; all of it for
    None."""
    return new if rows is None else rows.scatter(x, new.astype(x.dtype))


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


def explicit_sharding(x: jax.Array, *, all_rows: bool = False) -> NamedSharding | None:
    """The sharding of `x`, of which every device has all rows if `all_rows`; None if the mesh is
    not explicit, for there it is XLA that shards."""
    sharding: Any = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = (None, *sharding.spec[1:]) if all_rows else sharding.spec
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _all_rows(x: jax.Array) -> jax.Array:
    """`x` with all its rows on every device of its mesh, inside `shard_map` on this one: XLA would
    otherwise give each device some rows to add to a table of zeros, and sum these tables."""
    mesh: Any = jax.typeof(x).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, explicit_sharding(x, all_rows=True))
    if set(mesh.axis_types) == {AxisType.Auto} and isinstance(x, Tracer):
        spec = PartitionSpec(None, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    return x


def _as_int32(indices: Any, num_rows: int) -> jax.Array:
    """Indices in int32; those of 64 bits that it cannot hold become others outside the table."""
    if isinstance(indices, np.ndarray) and indices.dtype.kind in "iu":
        # Before JAX makes 32 bits of them.
        indices = np.clip(indices.astype(np.int64), -1, num_rows)
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if jnp.iinfo(indices.dtype).bits == 64:
        indices = jnp.clip(indices.astype(jnp.int64), -1, num_rows)
    return indices.astype(jnp.int32)


def _padded(indices: jax.Array, num_rows: int) -> jax.Array:
    """`num_rows` for every index outside of [0, num_rows)."""
    return jnp.where((indices >= 0) & (indices < num_rows), indices, num_rows)


def _as_keys(indices: jax.Array) -> jax.Array:
    """The indices as an array of PRNG keys, which no arithmetic is defined on."""
    words = jnp.stack([indices.astype(jnp.uint32), jnp.zeros_like(indices, jnp.uint32)], axis=-1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")
