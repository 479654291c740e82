"""Indices beyond the end of an array that are no error."""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax

A = ParamSpec("A")
R = TypeVar("R")


def unchecked(fn: Callable[A, R]) -> Callable[A, R]:
    """A decorator: `checkify.index_checks` does not look into `fn`, a function of arrays.

    It reports every index beyond the end, also where the mode of a gather or a scatter says what
    happens to it, and padding has such an index. It does not look into a `custom_vmap`. Reverse
    mode does not either, which is why a `custom_jvp` is around it. The compiled program is that of
    `fn`.

    Buys: no false alarm from `checkify.index_checks`.
    Noticed by: `test_value_and_grad.test_index_checks_report_wrong_ids_alone`.
    """
    hidden = jax.custom_batching.custom_vmap(fn)

    @hidden.def_vmap
    def batched(axis_size: int, is_batched: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda batched: 0 if batched else None, is_batched)
        mapped: Any = jax.vmap(fn, axes, axis_size=axis_size)
        results = mapped(*args)
        return results, jax.tree.map(lambda _: True, results)

    differentiable = jax.custom_jvp(hidden)
    differentiable.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return jax.jit(differentiable)
