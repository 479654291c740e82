"""Forms of the identity that decide in which kernel, and in which order, XLA computes an array."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from adam_transforms._xla.jaxprs import change_outputs
from adam_transforms._xla.platform import on_cpu

# LLVM unrolls the loop over a row's elements if it has fewer instructions than this. An unrolled
# loop is scalar code with several times the instructions, so that fewer rows are in flight.
_UNROLL_LIMIT = 300
# Instructions for an element of gathered rows, and of one select that does nothing.
_KERNEL_INSTRUCTIONS, _SELECT_INSTRUCTIONS = 4, 3
_MOST_SELECTS = 2
# Dtypes of the codes of moments.
CODES = {jnp.dtype(name) for name in ("int8", "uint8", "int16", "uint16")}


def _identity(x: jax.Array) -> jax.Array:
    return x


@on_cpu(_identity)
def materialize(x: jax.Array) -> jax.Array:
    """The identity: XLA on CPU computes `x`, (n, D...), once for all its uses.

    XLA repeats cheap arithmetic in every kernel that needs its result. A gather that two kernels
    need becomes a kernel of its own instead, without any arithmetic: a scalar copy that takes four
    times as long. XLA does not repeat a division. So this divides `x` by a one that XLA cannot see
    through: all bits of `x` shifted out, then those of 1.0 put in. LLVM, which compiles the kernel
    afterwards, does see through it and removes the division. Codes are divided as integers. Where
    LLVM would unroll the loop over a short row, selects between `x` and `x` make the loop long
    enough that it does not.

    Buys: a lazy Adam step of (10^6, 64) with 8,192 rows takes 1.6 times as long without it; at 16
    columns nothing is gained or lost (`benchmarks/bench_sparse.py`).
    Noticed by: `test_scheduling.test_materialized_rows_are_computed_once`.
    """
    is_code = x.dtype in CODES
    # A complex division by 1 is not exact, and that of wide integers makes no array.
    if not is_code and not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    columns = x.shape[-1] if x.ndim else 1
    missing = _UNROLL_LIMIT / max(columns, 1) - _KERNEL_INSTRUCTIONS
    selects = math.ceil(missing / _SELECT_INSTRUCTIONS)
    for limit in range(1, 1 + selects) if selects <= _MOST_SELECTS and not is_code else ():
        x = jnp.where(x > limit, jnp.maximum(x, float(limit)), x)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = one = jax.lax.bitcast_convert_type(x, unsigned)
    for distance in (1, 8 * x.dtype.itemsize - 1):  # all bits out
        one = jax.lax.shift_right_logical(one, jnp.array(distance, unsigned))
    one = one | np.ones((), x.dtype).view(unsigned)
    if is_code:
        return jax.lax.bitcast_convert_type(jax.lax.div(bits, one), x.dtype)
    return x / jax.lax.bitcast_convert_type(one, x.dtype)


def materialize_outputs(
    fn: Callable[..., list[Any]], inputs: Sequence[Any], chosen: Sequence[bool]
) -> list[Any]:
    """``fn(*inputs)``, with the chosen outputs materialized where they are computed.

    No output before a chosen one is None.

    What `fn` computes from such an output then uses the materialized array: new moments that are
    scattered are not computed once more, nor their rows gathered once more, for the update.

    Buys: a lazy Adam step of (10^4, 32) with 8,192 rows takes 1.2 times as long without it and has
    half again the temporary memory (`benchmarks/bench_sparse.py`).
    Noticed by: `test_budgets`' temporary bytes, and
    `test_scheduling.test_materialized_outputs_are_what_the_other_outputs_use`.
    """
    groups = [[i] for i, flag in enumerate(chosen) if flag]
    return change_outputs(lambda _, values: [*map(materialize, values)], fn, inputs, groups)


@on_cpu(_identity)
def gather_separately(x: jax.Array) -> jax.Array:
    """The identity: XLA on CPU computes `x`, gathered rows (n, D...), before its only use.

    A short kernel has more rows in flight than a long one that gathers and computes.

    Codes become float32 in it: without arithmetic the loop would be scalar.

    Buys: a deferred table is read in 0.9 of the time (`benchmarks/bench_deferred.py`), and a lazy
    step with moments of 16 bits takes 0.6 of it (`benchmarks/bench_lowmem.py`).
    Noticed by: `test_scheduling.test_rows_gathered_separately_have_a_kernel_of_their_own`.
    """
    if x.dtype in CODES:
        return gather_separately(materialize(x.astype(jnp.float32))).astype(x.dtype)
    return depend_on(x, [token(x[:1])])


def token(x: jax.Array) -> jax.Array:
    """A scalar that depends on `x`; pass it to `depend_on` to order a write after the read of `x`.

    The first row of an array that is materialized stands for all of it; over an explicit mesh all
    rows do, for the first is on one device only.
    """
    is_explicit = AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
    x = x if is_explicit else x[:1]
    return jnp.min(jnp.abs(x).astype(jnp.float32), initial=1.0)


def depend_on(x: jax.Array, tokens: Sequence[jax.Array]) -> jax.Array:
    """Returns `x` with an artificial data dependency on `tokens`.

    XLA then sees that the reads behind the tokens are complete before anything computed from `x` is
    written, and updates a donated array in place where it would copy it.

    Buys: without it the (V,) steps of a deferred table and its update history are copied at every
    step, 15 ms for 10^7 rows (`benchmarks/bench_deferred.py`).
    Noticed by: `test_deferred`'s tests that the compiled step copies no table.
    """
    if not tokens:
        return x
    return jnp.where(_never(tokens), jnp.zeros((), x.dtype), x)


def _never(tokens: Sequence[jax.Array]) -> jax.Array:
    """False, computed from `tokens`: a token is at most 1."""
    return functools.reduce(jnp.minimum, tokens) == 2.0


def zeros_after(tokens: Sequence[jax.Array], shape: Any, dtype: Any) -> jax.Array:
    """Zeros that depend on `tokens`, one at least.

    XLA allocates them after it has computed the arrays that the tokens stand for. `depend_on` of
    zeros would choose between zeros and zeros, which XLA simplifies to zeros.

    Buys: a lazy step of 26 tables with 26 MiB of rows has 7 MiB of temporaries in place of 28
    (`benchmarks/bench_sparse.py`).
    Noticed by: `test_row_blocks.test_temporaries_do_not_grow_with_the_number_of_tables`.
    """
    return jnp.broadcast_to(_never(tokens).astype(dtype), shape)


def token_of_all(tree: Any) -> jax.Array:
    """One token that depends on all arrays of a tree."""
    return functools.reduce(jnp.minimum, map(token, jax.tree.leaves(tree)))
