"""The gradient of a table by the rows it touches."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from adam_transforms._core import dtypes
from adam_transforms._core.key_type import KEY_TYPE
from adam_transforms._core.serialization import serializable_node
from adam_transforms._xla.duplicates import first_positions
from adam_transforms._xla.scheduling import (
    CODES,
    depend_on,
    gather_separately,
    materialize,
    token,
    zeros_after,
)
from adam_transforms._xla.unchecked import unchecked

# Bytes of values from which on summed rows are packed: an update in blocks then skips the padding.
# With Zipf ids and without it a lazy step of 32 MiB takes 1.15 times as long, on two cores. A size
# that is symbolic, under `jax.export`, is no int: there as elsewhere it counts as small.
PACKED_BYTES = 16 * 2**20


class _Described(type):
    """Shows the class with a remedy, in JAX's errors about structures: from `optax.MultiSteps`,
    `eqx.apply_updates`, and functions of masks or labels."""

    def __repr__(cls) -> str:
        return (
            f"<class 'adam_transforms.{cls.__name__}'> (a row gradient: adam_transforms.lazy makes "
            "any chain take it; apply it with apply_updates of adam_transforms or Optax, "
            "accumulate it with adam_transforms.accumulate, and pass Optax masks and labels as "
            "trees, not as functions)"
        )


@serializable_node
@jax.tree_util.register_pytree_with_keys_class
class SparseRows(metaclass=_Described):
    r"""A table-shaped gradient or update that is zero but for some rows.

    .. math:: G_{r} = \sum_{i:\, \mathrm{indices}_i = r} \mathrm{values}_i

    Args:
      indices: integers (n,), kept in int32: the rows. An index of `num_rows` is padding: it and
        its value are ignored. An index outside of [0, num_rows), negative or not, becomes padding.
      values: (n, D...), floating or complex, what each adds to its row.
      num_rows: V < 2^31, static: the table's shape is (V, D...).
      unique: static; whether no row is named twice, padding aside.
      leading_shape: static; the axes that number the rows of stacked tables, (F, V) of
        (F, V, D...): row (f, v) has the index f V + v, and `num_rows` is F V. None for a single
        table: (num_rows,).
      synchronized: static; whether the gradient was computed from rows without pending updates.
        `deferred_adam` takes no other row gradients. `value_and_grad` sets it for the tables of
        `rows_from`, and every operation keeps it; a sum of two has it if both have it.

    Raises:
      TypeError, ValueError: a wrong dtype, shape or number of rows.

    ``params + rows`` adds the rows to a table, so that `optax.apply_updates` and other code that
    adds updates to parameters works unchanged. The sum has the table's dtype, and each row is
    rounded to it once. Complex rows on a real table, and any rows on an integer table, are a
    TypeError.

    ``rows + rows``, ``rows * scalar``, `astype`, `real` and `conj` give rows, ``table - rows`` a
    table.

    As a pytree leaf, the indices are an array of PRNG keys, because JAX allows no arithmetic on
    these. A transformation that treats every leaf as a dense array therefore raises an error,
    instead of scaling or clipping the indices; see `lazy` for replacements. Keys of zeros, as from
    ``jax.tree.map(jnp.zeros_like, rows)``, are padding.

    `jax.export` serializes programs that take or return rows and the states of this package. For
    Optax's states, call `jax.export.register_namedtuple_serialization`.

    On a mesh every device holds all n rows; along D they are sharded as `values`. A table keeps its
    sharding when rows are added to it. `jax.vmap` returns a batch, with leaves (B, n) and
    (B, n, D...). The only operation on a batch is another `jax.vmap`.

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
    leading_shape: tuple[int, ...]
    synchronized: bool
    _keys: Any
    # Only in rows that have not been a pytree since: what `_keys` says, and what `keep_read` keeps.
    _indices: Any = None
    _read: Any = None

    def __init__(
        self,
        indices: Any,
        values: Any,
        num_rows: int,
        *,
        unique: bool = False,
        leading_shape: Sequence[int] | None = None,
        synchronized: bool = False,
    ) -> None:
        num_rows = operator.index(num_rows)
        if not 0 <= num_rows < 2**31:
            raise ValueError(f"num_rows must be in [0, 2^31), got {num_rows}")
        leading = (num_rows,) if leading_shape is None else _sizes(leading_shape)
        if not leading or min(leading) < 0 or math.prod(leading) != num_rows:
            raise ValueError(
                f"leading_shape must be axes of {num_rows} rows in all, got {list(leading)}"
            )
        indices, values = _as_int32(indices, num_rows), jnp.asarray(values)
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            raise TypeError(f"values must be floating or complex, got {values.dtype}")
        if indices.ndim != 1 or values.shape[:1] != indices.shape:
            raise ValueError(
                "indices and values must have shapes (n,) and (n, D...), "
                f"got {list(indices.shape)} and {list(values.shape)}"
            )
        indices, self.values = _replicate_rows(indices, values)
        self.num_rows = num_rows
        self.unique = unique
        self.leading_shape = leading
        self.synchronized = synchronized
        self._indices = indices
        self._keys = _as_keys(indices)

    @property
    def indices(self) -> jax.Array:
        """int32 (n,), `num_rows` at padding."""
        return _from_keys(self._keys, self.num_rows) if self._indices is None else self._indices

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, D...) of a table, (B, V, D...) of a batch of tables."""
        keys = self._keys
        return (*keys.shape[:-1], *self.leading_shape, *self.values.shape[len(keys.shape) :])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def is_valid(self) -> jax.Array:
        """bool (n,), False at padding."""
        refuse_batch(self)
        return self.indices < self.num_rows

    def to_dense(self) -> jax.Array:
        """The (V, D...) array, duplicates summed."""
        refuse_batch(self)
        dtype = dtypes.compute_dtype(self.dtype)
        sharding = explicit_sharding(self.values, row_axes=1, become=len(self.leading_shape))
        zeros = jax.lax.full(self.shape, 0, dtype, sharding=sharding)
        return self.add_to(zeros).astype(self.dtype)

    def sum_duplicates(self) -> "SparseRows":
        """The same gradient with unique indices: the first occurrence of a row holds the sum, and
        later occurrences become padding with value zero.

        Sums are taken in at least float32. O(n) time and memory, whatever V. If the values have at
        least 16 MiB, and the indices are not known to be unique, all padding is at the end of the
        result.
        """
        return sum_duplicates_at(self, *first_positions_of_each([self]))

    def masked_values(self) -> jax.Array:
        """`values` with zeros at padding."""
        refuse_batch(self)
        return _zeros_at_padding(self.indices, np.int32(self.num_rows), [self.values])[0]

    def with_values(self, values: jax.Array) -> "SparseRows":
        """The same rows with other values, (n, D...)."""
        (values,) = _replicate_rows(values)
        return self._with(values=values)

    def with_rows(self, indices: Any, values: Any, *, unique: bool = False) -> "SparseRows":
        """Other rows of the same table, (m,) and (m, D...)."""
        static = {"leading_shape": self.leading_shape, "synchronized": self.synchronized}
        return type(self)(indices, values, self.num_rows, unique=unique, **static)

    def as_synchronized(self) -> "SparseRows":
        """The same rows with `synchronized` set: for a gradient that was computed after `catch_up`
        or `flush` had applied the pending updates of these rows."""
        return self._with(synchronized=True)

    def _with(self, **attributes: Any) -> "SparseRows":
        rows = object.__new__(type(self))
        vars(rows).update(vars(self) | attributes)
        return rows

    def after_read(self, read: jax.Array) -> "SparseRows":
        """The same rows, which XLA computes only after `read`, an array gathered from a table. XLA
        can then add the rows to the table in place, without copying the table first."""
        return self.with_values(depend_on(self.values, [token(read)]))

    def gather(self, table: jax.Array) -> jax.Array:
        """(n, D...), these rows of a table or of a slot; zeros at padding."""
        return self.gather_each([table])[0]

    def gather_each(self, tables: Sequence[jax.Array]) -> list[jax.Array]:
        """`gather` of several arrays, each computed once for all its uses."""
        refuse_batch(self)
        indices = self.indices
        gathered = _gather_rows([*map(jnp.asarray, tables)], places(indices, self.leading_shape))
        gathered = _zeros_at_padding(indices, np.int32(self.num_rows), gathered)
        # Codes are decoded in a long kernel, which would have few rows in flight.
        return [gather_separately(x) if x.dtype in CODES else materialize(x) for x in gathered]

    def scatter(self, table: jax.Array, values: jax.Array) -> jax.Array:
        """A table or a slot with these rows, which must be unique, replaced."""
        return self.scatter_each([table], [values])[0]

    def scatter_each(
        self, tables: Sequence[jax.Array], values: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """`scatter` into several arrays, whose dtypes stay."""
        tables = [*map(jnp.asarray, tables)]
        new = [x.astype(table.dtype) for x, table in zip(values, tables, strict=True)]
        return set_rows(tables, places(self.indices, self.leading_shape), new)

    def __add__(self, other: Any) -> Any:
        refuse_batch(self)
        if isinstance(other, SparseRows):
            if (self.shape, self.leading_shape) != (other.shape, other.leading_shape):
                raise ValueError(f"row gradients {self} and {other} do not add")
            dtype = dtypes.promote(self.dtype, other.dtype)
            like = other if self.synchronized else self  # the sum is marked if both are
            return like.with_rows(
                jnp.concatenate([self.indices, other.indices]),
                jnp.concatenate([self.values.astype(dtype), other.values.astype(dtype)]),
            )
        return self.add_to(other)

    def add_to(self, table: Any, key: jax.Array | None = None) -> jax.Array:
        """``table + self``, in the table's dtype; each row is rounded once: to nearest, or
        stochastically with a PRNG `key` if the dtype is a float below float32."""
        refuse_batch(self)
        table = jnp.asarray(table)
        if table.shape != self.shape:
            raise ValueError(
                f"rows of a {list(self.shape)} table cannot be added to {list(table.shape)}"
            )
        loses_imaginary = jnp.iscomplexobj(self.values) and not jnp.iscomplexobj(table)
        if loses_imaginary or not jnp.issubdtype(table.dtype, jnp.inexact):
            raise TypeError(f"a table in {table.dtype} cannot take rows in {self.dtype}")
        wide = dtypes.compute_dtype(table.dtype, self.values.dtype)
        if wide == table.dtype:
            add = _add_unique_rows if self.unique else _add_rows
            return add(table, places(self.indices, self.leading_shape), self.values.astype(wide))
        # Not the table in a wider dtype: that would be one more array of its size.
        rows = self.with_values(self.values.astype(wide)).sum_duplicates()
        after = rows.gather(table).astype(wide) + rows.values
        return rows.scatter(table, dtypes.store("", after, table.dtype, key))

    __radd__ = add_to

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __rsub__(self, table: Any) -> jax.Array:
        return (-self).add_to(table)

    def __mul__(self, factor: Any) -> "SparseRows":
        """Every value times a scalar."""
        return self._scale(operator.mul, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "SparseRows":
        """Every value divided by a scalar."""
        return self._scale(operator.truediv, divisor)

    def _scale(self, operation: Callable[[Any, Any], Any], scalar: Any) -> "SparseRows":
        refuse_batch(self)
        if np.ndim(scalar) != 0:
            raise ValueError(f"a row gradient is scaled by a scalar, got {np.shape(scalar)}")
        return self.with_values(operation(self.values, scalar))

    def __neg__(self) -> "SparseRows":
        return self.with_values(-self.values)

    def astype(self, dtype: DTypeLike) -> "SparseRows":
        """These rows with values in a floating or complex dtype."""
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(f"values must be floating or complex, got {jnp.dtype(dtype)}")
        return self._with(values=self.values.astype(dtype))

    @property
    def real(self) -> "SparseRows":
        """These rows with the real parts of the values."""
        return self.with_values(self.values.real)

    def conj(self) -> "SparseRows":
        """These rows with conjugate values."""
        return self.with_values(self.values.conj())

    def __repr__(self) -> str:
        keys, values = self._keys, self.values
        n, num_rows = getattr(keys, "shape", ()), "x".join(map(str, self.leading_shape))
        if not n or getattr(values, "shape", ())[: len(n)] != n:
            # The leaves are anything, as in a tree of shardings or of the axes to map over.
            return f"SparseRows({keys!r}, {values!r}, num_rows={num_rows})"
        sizes = ",".join(map(str, self.shape))
        rows = "distinct rows" if self.unique else "rows"
        marks = ", batched" * (len(n) > 1) + ", synchronized" * self.synchronized
        return f"SparseRows({values.dtype}[{sizes}], {n[-1]} of {num_rows} {rows}{marks})"

    def tree_flatten_with_keys(self) -> Any:
        """The leaves with their names, and what is static, for JAX."""
        # The values first: whoever asks the first leaf for a dtype, as `optax.inject_hyperparams`
        # does, wants one of numbers.
        names = (jax.tree_util.GetAttrKey("values"), jax.tree_util.GetAttrKey("indices"))
        leaves = (self.values, self._keys)
        static = (self.num_rows, self.unique, self.leading_shape, self.synchronized)
        return tuple(zip(names, leaves, strict=True)), static

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: tuple[Any, Any]) -> "SparseRows":
        """The inverse of `tree_flatten_with_keys`, for JAX; the leaves may be anything."""
        rows = object.__new__(cls)
        rows.values, rows._keys = leaves
        rows.num_rows, rows.unique, rows.leading_shape, rows.synchronized = static
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_read": None}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        # Pickles of earlier versions are of single tables, and have no mark.
        defaults = {"leading_shape": (attributes["num_rows"],), "synchronized": False}
        vars(self).update(defaults | attributes)


@serializable_node
@jax.tree_util.register_pytree_with_keys_class
class DeferredRows(SparseRows):
    """An update of `deferred_adam`. Rows that are not in it move too, when they are next read."""

    @classmethod
    def of(cls, rows: SparseRows) -> "DeferredRows":
        deferred = object.__new__(cls)
        vars(deferred).update(vars(rows))
        return deferred


def is_rows(x: Any) -> bool:
    """Makes `jax.tree` functions treat a row gradient as a leaf."""
    return isinstance(x, SparseRows)


def keep_read(rows: SparseRows, read: Any) -> SparseRows:
    """`rows` with something that was computed beside them for the update, of the same rows in
    their order. All that changes values alone keeps it; a pytree does not."""
    return rows._with(_read=read)


def kept_read(rows: SparseRows) -> Any:
    """What `keep_read` has kept; None if there is nothing."""
    return rows._read


def refuse_batch(rows: SparseRows) -> None:
    """Refuses a batch of row gradients, and leaves that are not those of rows."""
    keys: Any = rows._keys
    dtype: Any = getattr(keys, "dtype", None)
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise _no_keys(keys)
    if keys.ndim != 1:
        raise ValueError(
            f"indices must have shape (n,), got {list(keys.shape)} in {rows}: "
            "a batch of row gradients is for jax.vmap to map over"
        )


def on_values(fn: Callable[[jax.Array], jax.Array], x: Any) -> Any:
    """`fn` of an array, or of the values of a row gradient."""
    return x.with_values(fn(x.values)) if is_rows(x) else fn(x)


def first_positions_of_each(rows: Sequence[SparseRows]) -> list[jax.Array | None]:
    """For each index of each table the position of the first that equals it, and n for padding;
    None for rows that are unique. Tables that have equally many indices are searched together."""
    alike: dict[Any, list[int]] = {}
    for i, of_table in enumerate(rows):
        refuse_batch(of_table)
        if not of_table.unique:
            alike.setdefault(jax.typeof(of_table._keys), []).append(i)
    first: dict[int, jax.Array] = {}
    for members in alike.values():
        indices = jnp.stack([rows[i].indices for i in members])
        found = first_positions(indices, [rows[i].num_rows for i in members])
        first |= dict(zip(members, found, strict=True))
    return [first.get(i) for i in range(len(rows))]


def distinct_rows(rows: SparseRows, indices: jax.Array, values: jax.Array) -> SparseRows:
    """The rows of a gradient without duplicates.

    The result keeps what `keep_read` has added. Only gradients without duplicates have that, and
    their rows must stay in the same order.

    Args:
      rows: the gradient, with duplicates or without.
      indices: int32 (n,), distinct but for padding.
      values: (n, D...).
    """
    (values,) = _replicate_rows(values)
    return rows._with(_indices=indices, _keys=_as_keys(indices), values=values, unique=True)


def sum_duplicates_at(
    rows: SparseRows,
    first: jax.Array | None,
    *,
    after: Sequence[jax.Array] = (),
    run: tuple[jax.Array, jax.Array] | None = None,
    room: int = 0,
    packed_bytes: float | None = None,
) -> SparseRows:
    """`SparseRows.sum_duplicates` of rows whose duplicates are known.

    Args:
      first: the positions from `first_positions_of_each`.
      after: tokens of `_xla.scheduling`. XLA sums these rows, and gathers rows at their indices,
        only after it has computed the arrays that the tokens stand for.
      run, room, packed_bytes: of `sum_with_run`; not for a `first` of None. `packed_bytes` is
        `PACKED_BYTES` by default.
    """
    if first is None:
        if after:
            rows = distinct_rows(rows, depend_on(rows.indices, after), rows.values)
        (values,) = _zeros_at_padding(rows.indices, np.int32(rows.num_rows), [rows.values])
        return rows._with(values=values)
    nbytes = rows.values.nbytes
    packed_bytes = PACKED_BYTES if packed_bytes is None else packed_bytes
    indices, values = _replicate_rows(
        *_sums(
            *(rows.indices, np.int32(rows.num_rows), rows.values, first, run, [*after]),
            room=room,
            is_unique=rows.unique,
            pack=isinstance(nbytes, int) and nbytes >= packed_bytes,
        )
    )
    keys = _as_keys(indices)
    return rows._with(_indices=indices, _keys=keys, values=values, unique=True, _read=None)


def sum_with_run(
    rows: SparseRows,
    start: jax.Array,
    stop: jax.Array,
    room: int,
    packed_bytes: float,
) -> SparseRows:
    """Sums duplicates, and adds the rows start, ..., stop - 1 of the table with value zero.

    Args:
      rows: n rows. The result has n + room rows.
      start, stop: int32 scalars.
      room: static, at least stop - start. What is left of it is padding.
      packed_bytes: if the values have at least this size, all padding is at the end of the result.
    """
    refuse_batch(rows)
    n = rows.indices.size
    if rows.unique:
        first = jnp.where(rows.is_valid, jnp.arange(n, dtype=jnp.int32), n)
    else:
        (first,) = first_positions(rows.indices[None], [rows.num_rows])
    return sum_duplicates_at(rows, first, run=(start, stop), room=room, packed_bytes=packed_bytes)


# The number of rows is an operand here: a program of tables of several sizes contains these once.


@functools.partial(jax.jit, static_argnames=("room", "is_unique", "pack"))
def _sums(
    indices: jax.Array,
    num_rows: jax.Array,
    values: jax.Array,
    first: jax.Array,
    run: tuple[jax.Array, jax.Array] | None,
    after: list[jax.Array],
    *,
    room: int,
    is_unique: bool,
    pack: bool,
) -> tuple[jax.Array, jax.Array]:
    """The indices and values of `sum_duplicates_at`."""
    n, dtype = indices.size, values.dtype
    first = depend_on(first, after) if after else first
    is_first = first == jnp.arange(n, dtype=jnp.int32)
    if run is not None:
        run_indices, is_new = _run_besides(indices, num_rows, *run, room)
        indices = jnp.concatenate([indices, run_indices])
        is_first = jnp.concatenate([is_first, is_new])
    size = indices.size
    distinct = jnp.where(is_first, indices, num_rows)
    if is_unique and not pack:
        (values,) = _zeros_at_padding(indices[:n], num_rows, [values])
        return distinct, jnp.pad(values, [(0, size - n)] + [(0, 0)] * (values.ndim - 1))
    if pack:
        place = jax.lax.associative_scan(jnp.add, is_first.astype(jnp.int32)) - 1
        packed = jnp.full((size,), num_rows, jnp.int32)
        (distinct,) = set_rows([packed], (jnp.where(is_first, place, size),), [indices])
        into = jnp.where(first < n, place[jnp.minimum(first, n - 1)], size)
    else:
        into = first if size == n else jnp.where(first < n, first, size)
    values = values.astype(dtypes.compute_dtype(dtype))
    shape, sharding = (size, *values.shape[1:]), explicit_sharding(values)
    if after:
        zeros = zeros_after(after, shape, values.dtype)
    else:
        zeros = jax.lax.full(shape, 0, values.dtype, sharding=sharding)
    sums = _add_rows(zeros, (into,), values)  # padding, at `size`, is dropped
    return distinct, sums.astype(dtype)


@jax.jit
def _in_table(indices: jax.Array, num_rows: jax.Array) -> jax.Array:
    """int32 indices, with `num_rows` for all that are outside of the table."""
    return jnp.where((indices >= 0) & (indices < num_rows), indices, num_rows)


@jax.jit
def _zeros_at_padding(
    indices: jax.Array, num_rows: jax.Array, arrays: Sequence[jax.Array]
) -> list[jax.Array]:
    """The arrays, (n, ...), with zeros at padding."""
    is_valid = indices < num_rows
    masks = [jnp.reshape(is_valid, (-1,) + (1,) * (x.ndim - 1)) for x in arrays]
    return [jnp.where(m, x, jnp.zeros((), x.dtype)) for m, x in zip(masks, arrays, strict=True)]


def _run_besides(
    indices: jax.Array, num_rows: jax.Array, start: jax.Array, stop: jax.Array, room: int
) -> tuple[jax.Array, jax.Array]:
    """The rows start, ..., stop - 1, int32 (room,), and which of them exist and are not among
    `indices`."""
    run = start + jnp.arange(room, dtype=jnp.int32)
    run = jnp.where((run < stop) & (run < num_rows), run, num_rows)
    offset = jnp.where(indices >= start, jnp.minimum(indices - start, room), room)
    named = jnp.zeros((room + 1,), bool).at[offset].set(True)
    return run, ~named[:room] & (run < num_rows)


# ---- gathers and scatters, where an index beyond the end is padding ----

# The indices of rows along each leading axis, each (n,), none negative.
_Places = tuple[jax.Array, ...]


@unchecked
def _gather_rows(tables: Sequence[jax.Array], places: _Places) -> list[jax.Array]:
    """The rows of each of `tables`; anything at padding."""
    axes = len(places)
    return [
        jnp.zeros((places[0].size, *table.shape[axes:]), table.dtype)  # JAX refuses to gather
        if 0 in table.shape[:axes]
        else table.at[places].get(
            mode="clip",
            wrap_negative_indices=False,
            out_sharding=explicit_sharding(table, row_axes=axes),
        )
        for table in tables
    ]


@unchecked
def set_rows(
    tables: Sequence[jax.Array], places: _Places, values: Sequence[jax.Array]
) -> list[jax.Array]:
    """`tables` with their rows at `places`, which are unique, replaced."""
    return [
        table.at[places].set(
            new,
            mode="drop",
            unique_indices=True,
            wrap_negative_indices=False,
            out_sharding=explicit_sharding(table),
        )
        for table, new in zip(tables, values, strict=True)
    ]


@unchecked
def _add_rows(table: jax.Array, places: _Places, values: jax.Array) -> jax.Array:
    return table.at[places].add(
        values,
        mode="drop",
        wrap_negative_indices=False,
        out_sharding=explicit_sharding(table),
    )


@unchecked
def _add_unique_rows(table: jax.Array, places: _Places, values: jax.Array) -> jax.Array:
    return table.at[places].add(
        values,
        mode="drop",
        unique_indices=True,
        wrap_negative_indices=False,
        out_sharding=explicit_sharding(table),
    )


def to_parts(tree: Any) -> Any:
    """`tree` with ``(indices, values)`` for each row gradient: plain arrays, as a carry needs."""
    return jax.tree.map(lambda x: (x.indices, x.values) if is_rows(x) else x, tree, is_leaf=is_rows)


def from_parts(like: Any, parts: Any) -> Any:
    """What `to_parts` took apart; all that is static is that of the rows in `like`."""
    return jax.tree.map(
        lambda x, part: x.with_rows(*part, unique=x.unique) if is_rows(x) else part,
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


def places(indices: jax.Array, leading_shape: Sequence[int]) -> tuple[jax.Array, ...]:
    """The indices along each leading axis; at padding, the first is outside of the table.

    The table itself is not reshaped: its leading axes may be sharded, or padded by a layout.
    """
    rest, found = indices, []
    for size in leading_shape[:0:-1]:
        size = jnp.int32(max(size, 1))
        found.append(jax.lax.rem(rest, size))
        rest = jax.lax.div(rest, size)
    return (rest, *reversed(found))


def explicit_sharding(x: jax.Array, *, row_axes: int = 0, become: int = 1) -> NamedSharding | None:
    """The sharding of `x`; None if the mesh is not explicit, for there it is XLA that shards.

    With `row_axes`, the sharding of an array that has `become` axes in place of so many, and all
    their rows on every device.
    """
    sharding: Any = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = sharding.spec
    if row_axes:
        spec = (*[None] * become, *spec[row_axes:])
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _replicate_rows(*arrays: jax.Array) -> list[jax.Array]:
    """Each array with all its rows on every device of its mesh, inside `shard_map` on this one: XLA
    would otherwise give each device some rows to add to a table of zeros, and sum these tables."""
    replicated = []
    for x in arrays:
        mesh: Any = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            x = jax.sharding.reshard(x, explicit_sharding(x, row_axes=1))
        elif set(mesh.axis_types) == {AxisType.Auto} and isinstance(x, Tracer):
            spec = PartitionSpec(None, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        replicated.append(x)
    return replicated


def _as_keys(indices: jax.Array) -> jax.Array:
    """An array of PRNG keys, on which no arithmetic is defined: each is an index and its
    complement."""
    words = indices.astype(jnp.uint32)
    return jax.random.wrap_key_data(jnp.stack([words, ~words], axis=-1), impl=KEY_TYPE)


def _from_keys(keys: jax.Array, num_rows: int) -> jax.Array:
    """The indices, int32; `num_rows` for keys that `_as_keys` has not made, as those of zeros."""
    dtype: Any = getattr(keys, "dtype", None)
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise _no_keys(keys)
    words = jax.random.key_data(keys)
    index, complement = words[..., 0], words[..., 1]
    return jnp.where(index == ~complement, index, num_rows).astype(jnp.int32)


def _no_keys(leaf: Any) -> TypeError:
    dtype = getattr(leaf, "dtype", None)
    return TypeError(
        f"the indices of a SparseRows were replaced by {type(leaf).__name__} of dtype {dtype}, "
        "by code that maps over leaves: adam_transforms.lazy says what to use in its place"
    )


def _sizes(leading_shape: Any) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, leading_shape))
    except TypeError:
        raise TypeError(f"leading_shape must be integers, got {leading_shape!r:.200}") from None


def _as_int32(indices: Any, num_rows: int) -> jax.Array:
    """Indices in int32, with `num_rows` for all that are outside of the table."""
    if isinstance(indices, np.ndarray) and indices.dtype.kind in "iu":
        # Before JAX makes 32 bits of them.
        indices = np.clip(indices.astype(np.int64), -1, num_rows)
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if jnp.iinfo(indices.dtype).bits == 64:
        indices = jnp.clip(indices.astype(jnp.int64), -1, num_rows)
    return _in_table(indices.astype(jnp.int32), np.int32(num_rows))
