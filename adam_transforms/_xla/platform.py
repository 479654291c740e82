"""The one place that asks for a platform: a CPU gets one form, a GPU or TPU the other.

Its callers have all forms: `duplicates`, `scheduling`, `conditional`, `lazy`, `deferred.table_step`
and `reads.control_flow`.

The platform that a program is lowered for decides, not the default backend of the process that
traces it: a step exported on a CPU host for a GPU gets the GPU's form, and a step placed on the CPU
of a GPU host gets the CPU's.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

_GPUS = ("cuda", "rocm")


def by_platform(cpu: Callable[..., Any], other: Callable[..., Any], *args: Any) -> Any:
    """``cpu(*args)`` in a program lowered for a CPU, ``other(*args)`` in any other.

    Both are traced and must return the same shapes and dtypes. The lowered program contains one of
    them.
    """
    return jax.lax.platform_dependent(*args, cpu=cpu, default=other)


def by_platform_names(
    platforms: Sequence[Sequence[str] | None], branches: Sequence[Callable[..., Any]], *args: Any
) -> Any:
    """The branch for the platform that the program is lowered for; None names all others."""
    of_name = {
        name: branch
        for names, branch in zip(platforms, branches, strict=True)
        for name in names or ["default"]
    }
    return jax.lax.platform_dependent(*args, **of_name)


def on_cpu(
    other: Callable[..., Any], *, gpu: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the function is the form for CPUs, `other` the form for every other platform, or
    for all but GPUs where these have a form of their own.

    All take arrays. The result is jitted, so that a program that calls it for many arrays of one
    shape contains it once, and that a call outside of `jax.jit` does not trace it anew.
    """
    forms = {} if gpu is None else dict.fromkeys(_GPUS, gpu)
    return lambda cpu: jax.jit(
        functools.partial(jax.lax.platform_dependent, cpu=cpu, **forms, default=other)
    )


def on_gpu(gpu: Callable[..., Any], other: Callable[..., Any], *args: Any) -> Any:
    """``gpu(*args)`` in a program lowered for a GPU, ``other(*args)`` in any other."""
    return jax.lax.platform_dependent(*args, **dict.fromkeys(_GPUS, gpu), default=other)
