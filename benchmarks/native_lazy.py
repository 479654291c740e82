"""Lazy Adam as one pass over memory, in C++: what the machine allows a step to cost on a CPU."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

SOURCE = Path(__file__).with_suffix(".cc")
TARGET = "native_lazy_adam"
FLAGS = ("-O3", "-march=native", "-ffast-math", "-std=c++17", "-shared", "-fPIC", "-pthread")


@functools.cache
def compile_and_register() -> None:
    """Makes the kernel available to XLA.

    Raises:
      ImportError: this machine has no compiler that takes the source.
    """
    missing = ImportError(f"{SOURCE.name} needs a C++17 compiler", name="a C++17 compiler")
    compiler = shutil.which("c++")
    if compiler is None:
        raise missing
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "native_lazy.so"
        command = [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), SOURCE, "-o", library]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise missing from error
        handler = ctypes.cdll.LoadLibrary(str(library)).NativeLazyAdam
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="cpu")


def of_step(count: jax.Array, learning_rate: float, b1: float, b2: float, eps: float) -> jax.Array:
    """Step size and epsilon, float32 (2,), with both bias corrections in them."""
    t = (count + 1).astype(jnp.float32)
    correction1, correction2 = (-jnp.expm1(t * np.float32(np.log(b))) for b in (b1, b2))
    root = jnp.sqrt(correction2)
    return jnp.stack([learning_rate * root / correction1, eps * root])


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
      tables: parameters, mu and nu, float32 (V, D).
      ids, values: int32 (n,), float32 (n, D); duplicates are summed.
    """
    numbers = of_step(count, learning_rate, b1, b2, eps)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tables]
    aliases = {3 + i: i for i in range(len(tables))}
    call = jax.ffi.ffi_call(TARGET, results, input_output_aliases=aliases)
    rates = {"mu_rate": np.float32(1 - b1), "nu_rate": np.float32(1 - b2)}
    return call(ids, values, numbers, *tables, **rates)
