"""Lazy Adam as one kernel over the rows, in Pallas: what the machine allows a step to cost on a
GPU. On other platforms the kernel is interpreted."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import native_lazy
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

import adam_transforms as at

ROWS = 8  # a program of the kernel; 16 take as long, 32 take 1.5 times, at 128 columns


def update(
    tables: Sequence[jax.Array],
    count: jax.Array,
    ids: jax.Array,
    values: jax.Array,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Sequence[jax.Array]:
    """The step of `lazy_adam` after `count` steps, in place if the tables are donated.

    Args:
      tables: parameters, mu and nu, float32 (V, D), where D is a power of two.
      ids, values: int32 (n,), float32 (n, D), where n is a multiple of 8; duplicates are summed, by
        XLA.
    """
    numbers = native_lazy.of_step(count, learning_rate, b1, b2, eps)
    num_rows, columns = tables[0].shape
    rows = at.SparseRows(ids, values, num_rows).sum_duplicates()

    def kernel(ids_ref, values_ref, numbers_ref, _p, _m, _v, p_ref, m_ref, v_ref) -> None:
        ids = ids_ref[...]
        shape = (ROWS, columns)
        row = jnp.broadcast_to(ids[:, None], shape)
        column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        mask = row < num_rows
        refs = [ref.at[row, column] for ref in (p_ref, m_ref, v_ref)]
        p, m, v = (triton.load(ref, mask=mask, other=0.0) for ref in refs)
        g = values_ref[...]
        m = m + (1 - b1) * (g - m)
        v = v + (1 - b2) * (g * g - v)
        p = p - numbers_ref[0] * m / (jnp.sqrt(v) + numbers_ref[1])
        for ref, new in zip(refs, (p, m, v), strict=True):
            triton.store(ref, new, mask=mask)

    def by_program(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda i: (i, *[0] * (len(shape) - 1)))

    whole = pl.BlockSpec()
    on_gpu = jax.default_backend() == "gpu"
    return pl.pallas_call(
        kernel,
        grid=(ids.size // ROWS,),
        in_specs=[by_program(ROWS), by_program(ROWS, columns), *[whole] * 4],
        out_specs=[whole] * 3,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tables],
        input_output_aliases={3: 0, 4: 1, 5: 2},
        interpret=not on_gpu,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1) if on_gpu else None,
    )(rows.indices, rows.values, numbers, *tables)
