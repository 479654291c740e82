"""Settings that every test runs under."""

import itertools
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

# Before JAX starts. On a CPU whatever else there is, for the sharding tests lay meshes over eight
# devices, and CPUs can be divided into so many; `JAX_PLATFORMS=cuda` runs the others on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM does not optimise: what XLA makes of a program stays, and compiling it takes a fifth less.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),  # the last of equal flags counts
    ]
)

import jax
import pytest

# Compiling is most of the work, and much of it is of programs that an earlier test compiled for a
# function of its own: they are kept. Each worker has its own folder, so that none reads what
# another is still writing. Processes that tests start know nothing of it: they compile as a user's
# would.
COMPILED = tempfile.mkdtemp(prefix="compiled-for-tests-")
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """The first tier compiles without XLA's fusion emitters, which takes a third less. Any other
    selection compiles with them. XLA ends the process at a flag that it does not know."""
    if config.option.markexpr == "not slow" and jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ['XLA_FLAGS']}"


# Linux allows a process 65,530 memory maps. Each compiled program has some six, and XLA crashes
# where it gets no more.
MAPS, MOST_MAPS, BETWEEN_COUNTS = Path("/proc/self/maps"), 40_000, 50
_tests = itertools.count(1)


def pytest_runtest_logfinish() -> None:
    """Forgets the compiled programs when they are too many."""
    if next(_tests) % BETWEEN_COUNTS == 0 and MAPS.exists():
        if MAPS.read_bytes().count(b"\n") > MOST_MAPS:
            jax.clear_caches()


def pytest_unconfigure() -> None:
    shutil.rmtree(COMPILED, ignore_errors=True)


# The first tier runs one case of a test; all others are slow. Which one depends on the test's name,
# so that tests over the same cases take others.


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "fuzz" not in config.option.markexpr:
        by_hand = [item for item in items if item.get_closest_marker("fuzz") is not None]
        config.hook.pytest_deselected(items=by_hand)
        items[:] = [item for item in items if item not in by_hand]
    cases_of: dict[Any, list[pytest.Item]] = {}
    for item in items:
        marked = any(item.get_closest_marker(name) for name in ("slow", "every_case"))
        if hasattr(item, "callspec") and not marked:
            cases_of.setdefault((item.path, item.originalname), []).append(item)  # pyright: ignore
    for (_, name), cases in cases_of.items():
        first_tier = zlib.crc32(name.encode()) % len(cases)
        for item in cases[:first_tier] + cases[first_tier + 1 :]:
            item.add_marker(pytest.mark.slow)
    # Long tests first, so that at the end no process is left alone with one of them.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def strict_promotion():
    """Nothing of ours relies on an implicit promotion of dtype or rank."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def relaxed_promotion(strict_promotion):
    """For the pieces of Optax and Flax that promote implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
