"""The floors of the package: what may import what, and what only some modules may know.

The table below is the whole rule. A module imports only from its own floor and from those above it
in the table.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adam_transforms
from adam_transforms._core.state_layout import TABLE

PACKAGE = Path(adam_transforms.__file__).parent
NAME = "adam_transforms"

# From the ground up; the floors of one line do not know each other.
FLOORS: list[tuple[str, ...]] = [
    ("_xla",),
    ("_core",),
    ("_transforms",),
    ("_embeddings",),
    ("_optimizers",),
    ("_tools", "equinox", "flax", "interop"),
    ("compat",),
    ("__init__",),
    ("_demo",),
    ("__main__",),
]

MATHEMATICS = (
    "_core/dtypes.py",
    *(
        f"_transforms/{name}.py"
        for name in ("adam", "clipping", "ema", "learning_rates", "moment_codes")
    ),
    *(f"_transforms/{name}.py" for name in ("loss_scaling", "master_weights", "numerics")),
    "_transforms/row_norms.py",
    *(f"_embeddings/deferred/{name}.py" for name in ("chebyshev", "missed_updates")),
)

# The modules of `_embeddings/reads` that walk through a program.
READ_PROGRAMS = tuple(
    f"_embeddings/reads/{name}.py"
    for name in (
        *("choosing", "control_flow", "custom_rules", "direct", "following", "indexing", "layouts"),
        *("origins", "program", "row_functions", "rows", "running", "shards"),
    )
)

# What only these modules may mention.
KNOWN_TO = {
    "the platform": ("_xla/platform.py",),
    "JAX's program representation": (
        "_core/key_type.py",
        *(f"_xla/{name}.py" for name in ("dependence", "jaxprs", "row_independence")),
        "_embeddings/tracing.py",
        "_embeddings/value_and_grad.py",
        *READ_PROGRAMS,
    ),
}
PLATFORM_WORDS = {
    *("default_backend", "platform_dependent", "device_count", "local_devices"),
    *("local_device_count", "jax.devices"),
}
PROGRAM_WORDS = {"eqns", "primitive", "invars", "outvars", "Jaxpr", "ClosedJaxpr"}
PRIVATE_JAX = ("jax.extend", "jax._src", "jax.interpreters")
# The modules that apply workarounds for XLA, where rows are gathered, scattered or held back, and
# values rounded, coded or reduced; and those that read programs.
USE_XLA = (
    "_core/dtypes.py",
    "_core/sparse_rows.py",
    "_transforms/compress_moments.py",
    "_transforms/numerics.py",
    "_transforms/conditional_update.py",
    "_embeddings/lazy.py",
    "_embeddings/tracing.py",
    "_embeddings/explain.py",
    *READ_PROGRAMS,
    "_embeddings/deferred/adam.py",
    "_embeddings/deferred/missed_updates.py",
    "_embeddings/deferred/state.py",
    "_embeddings/deferred/table_step.py",
    "compat/_optimizer.py",
)

PUBLIC_NAMES = """
    AccumulateState CompressMomentsState DeferredAdamState DynamicLossScaleState FreezeRowsState
    LazyState LimitedSkipNonfiniteState MasterWeightsState Owed ParamsEmaState
    ScaleByLearningRateState ScaleByPathLearningRateState ScheduledDecayState SkipNonfiniteState
    SparseRows StaticLossScaleState TransferReport VariableAccumulateState accumulate adam adamw
    all_reduce_rows apply_updates by_path catch_up check_state clip_by_global_norm clip_by_norm
    clip_by_value compat compress_moments deferred_adam dense_equivalent dynamic_loss_scale
    ema_params equinox explain finalize flax flush flush_accumulated freeze_rows global_norm grad
    has_updated interop lazy lazy_adam master_weights max_row_norm metrics owed params_ema path_mask
    path_str resize scale_by_adam scale_by_amsgrad scale_by_learning_rate
    scale_by_path_learning_rate scale_loss shard_slots skip_nonfinite static_loss_scale summary
    to_dense transfer_state update_and_apply value_and_grad
""".split()


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def floor_of(parts: tuple[str, ...]) -> str:
    """The floor of a module, given its path below the package without the suffix."""
    return parts[0] if parts else "__init__"


def imports(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, module path below the package) of each import of this package in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" if module == NAME else module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            top, *parts = name.split(".")
            if top == NAME:
                yield node.lineno, tuple(parts)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_the_floors_below(path: Path) -> None:
    level = {name: i for i, names in enumerate(FLOORS) for name in names}
    own = floor_of(path.relative_to(PACKAGE).with_suffix("").parts)
    assert own in level, f"{own} is on no floor"
    for line, parts in imports(path):
        used = floor_of(parts)
        used = used if used in level else "__init__"  # a public name
        assert used == own or level[used] < level[own], f"{path}:{line} imports {used}"


def mentioned(path: Path) -> set[str]:
    """Every attribute, name and imported module that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found |= {node.attr, f"{getattr(node.value, 'id', '')}.{node.attr}"}
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.name for alias in node.names}
            found.add(getattr(node, "module", None) or "")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_modules_of_the_table_know_platforms_and_programs(path: Path) -> None:
    name, words = path.relative_to(PACKAGE).as_posix(), mentioned(path)
    if name.startswith("_demo/"):
        return  # a program, which may ask what it runs on
    if name not in KNOWN_TO["the platform"]:
        assert not words & PLATFORM_WORDS
    if name not in KNOWN_TO["JAX's program representation"]:
        assert not words & PROGRAM_WORDS
        assert not any(word.startswith(PRIVATE_JAX) for word in words)
    if not name.startswith("_xla/") and name not in USE_XLA:
        assert not any(parts[:1] == ("_xla",) for _, parts in imports(path))


def test_mathematics_does_not_speak_of_the_compiler() -> None:
    words = re.compile(r"\bXLA\b|\bLLVM\b|\bHLO\b|optimization_barrier|\bCPUs?\b|\bGPUs?\b")
    for name in MATHEMATICS:
        found = words.search((PACKAGE / name).read_text())
        assert not found, f"{name}: {found}"


def test_the_tables_name_modules_that_exist() -> None:
    for names in (*KNOWN_TO.values(), USE_XLA, MATHEMATICS):
        for name in names:
            assert (PACKAGE / name).exists(), name
    for names in FLOORS:
        for name in names:
            assert (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists(), name


def test_no_import_is_dodged_by_probing_attributes() -> None:
    """`hasattr(x, "sum_duplicates")` in place of an `isinstance` hides a dependency."""
    methods = {name for name in vars(adam_transforms.SparseRows) if not name.startswith("_")}
    # What arrays have too tells nothing of a class.
    methods -= {"dtype", "shape", "values", "indices"}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "hasattr",
                "getattr",
            ):
                name = node.args[1]
                assert not (isinstance(name, ast.Constant) and name.value in methods), path


def test_the_public_names_are_these() -> None:
    assert sorted({*adam_transforms.__all__, "equinox", "flax"}) == PUBLIC_NAMES


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    assert dir(adam_transforms) == sorted({*PUBLIC_NAMES, "__version__"})
    compat, interop = adam_transforms.compat, adam_transforms.interop
    for module in (
        *(compat, compat.capreolus, compat.keras, compat.keras.schedules, compat.tf1),
        *(interop, interop.keras, interop.tf1, interop.tf2, interop.torch),
        *(importlib.import_module(f"{NAME}.{name}") for name in ("equinox", "flax")),
    ):
        assert dir(module) == sorted(module.__all__), module.__name__
        for name in module.__all__:
            assert getattr(module, name).__doc__, f"{module.__name__}.{name}"


def test_every_public_function_has_an_example() -> None:
    for name in adam_transforms.__all__:
        function = getattr(adam_transforms, name)
        assert not inspect.isfunction(function) or ">>> " in str(function.__doc__), name


def test_every_public_state_class_is_exported() -> None:
    """Those that `state_layout` knows, but for the parts of one."""
    ours = {cls.__name__ for cls in TABLE if cls.__module__.startswith(NAME)}
    assert ours - {"IdleRows"} == {name for name in adam_transforms.__all__ if name[-5:] == "State"}


def test_the_documents_name_modules_that_exist() -> None:
    root = PACKAGE.parent
    where = (root / ".github" / "CONTRIBUTING.md").read_text()
    where = where[where.index("## Where is") : where.index("## Rules")]
    paths = re.findall(r"`((?:_\w+|interop|compat)/[\w/]+\.py)`", where)
    assert len(paths) > 10
    for path in paths:
        assert (PACKAGE / path).exists(), path
    readme = (root / "README.md").read_text()
    picture = re.findall("(?:^    .*\n)+", readme[readme.index("## Architecture") :], re.MULTILINE)[
        0
    ]
    for folder in [path for path in PACKAGE.iterdir() if path.is_dir() and path.name[1:2] != "_"]:
        assert f"{folder.name}/" in picture, folder.name


def test_optional_packages_are_imported_when_first_used() -> None:
    assert {"compat", "equinox", "flax", "interop", "__version__"} < set(dir(adam_transforms))
    code = (
        "import sys, adam_transforms\n"
        "print(*(x for x in dir(adam_transforms) if f'adam_transforms.{x}' in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
