"""What does a step cost that touches a few rows of a large table?

    python benchmarks/bench_sparse.py [--only SECTION ...] [--sizes V,D,N ...] [--rounds N]

Sections: `step` is the optimizer's step alone, from raw duplicated ids and the cotangents of the
rows read to new parameters; `growth` is the same for tables of 10^3 to 10^7 rows, from which
figure.py draws the README's figure; `tables` is the step of 26 tables, and what it takes to compile
it; `tower` is the whole training step of a two-tower model, forward and backward passes included;
`tracing` is how long JAX traces the gradient of a transformer.
Contenders that are not installed are left out by name; the native one needs a C++ compiler.
"""

import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import native_lazy
import numpy as np
import optax

import adam_transforms as at

BATCHES = 8  # different batches of ids, in turn: the rows of the last one are not in the caches
DISTRIBUTIONS = ("uniform", "zipf")
LARGEST_FOR_ALL = 2_000_000  # rows; of larger tables not all contenders' fit into 24 GB
COLUMNS, ITEMS, HIDDEN, BATCH = 64, 8, 64, 1024  # of the two-tower model


class Size(NamedTuple):
    """A table of so many rows and columns, and so many ids a step."""

    rows: int
    columns: int
    touched: int


SIZES = [
    Size(10**4, 32, 8192),
    Size(10**6, 64, 8192),
    Size(10**7, 32, 8192),
    Size(10**6, 128, 65536),
]
GROWTH_ROWS, GROWTH_COLUMNS, GROWTH_TOUCHED = [10**n for n in range(3, 8)], 32, 8192
# The tables of a recommender: as many as Criteo's clicks have, of 10^4 to 10^6 rows.
TABLE_ROWS = [round(rows) for rows in np.geomspace(10**4, 10**6, 26)]
TABLE_COLUMNS, TABLE_TOUCHED, COMPILATIONS = (16, 64), 4096, 3
DENSE = "dense optax.adam"
# The contenders that are not of this project.
ANCHORS = (
    *("native C++", "torch SparseAdam", "bare gather, scatter", DENSE),
    *("TF1 AdamOptimizer", "Keras 3 Adam", "torch Embedding, SparseAdam", "jax.grad, optax.adam"),
    "jax.value_and_grad",
)


def draw_ids(distribution: str, rows: int, shape: Sequence[int], seed: int) -> np.ndarray:
    """int32 ids, uniform or by Zipf's law, over all rows in random order."""
    generator = np.random.default_rng(seed)
    if distribution == "uniform":
        return generator.integers(0, rows, shape, np.int32)
    ranks = np.exp(generator.random(shape) * np.log(rows)).astype(np.int64) - 1
    # A multiplication by a number coprime to `rows` spreads the frequent ones over the table.
    return ((ranks * 2_654_435_761) % rows).astype(np.int32)


def in_turn(step: Callable[..., Any], batches: Sequence[Any]) -> Callable[[Any], Any]:
    """`step` with one batch after the other."""
    source = itertools.cycle(batches)
    return lambda carry: step(carry, *next(source))


def step_batches(size: Size, distribution: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids, int32 (touched,), and cotangents, (touched, columns)."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((size.touched, size.columns), np.float32)
    return [
        (draw_ids(distribution, size.rows, (size.touched,), seed), values)
        for seed in range(BATCHES)
    ]


def distinct_batches(size: Size) -> list[tuple[np.ndarray, np.ndarray]]:
    """`step_batches` whose ids are all different."""
    generator = np.random.default_rng(0)
    return [
        (generator.permutation(size.rows)[: size.touched].astype(np.int32), values)
        for _, values in step_batches(size, "uniform")
    ]


def jax_table(size: Size) -> jax.Array:
    return 0.1 * jax.random.normal(jax.random.key(0), (size.rows, size.columns))


def on_device(batches: Sequence[Any]) -> list[Any]:
    return jax.tree.map(jnp.asarray, list(batches))


# ---- the step alone -----------------------------------------------------------------------------


def jitted_step(
    tx: Any, sizes: dict[str, Size], *, dense: bool = False, distinct: bool = False
) -> Any:
    """A jitted ``((params, state), {table: (ids, values)}) -> (params, state)`` that donates what
    it replaces; `distinct` says that the ids are so."""

    def gradient(size: Size, ids: jax.Array, values: jax.Array) -> Any:
        if dense:
            return jnp.zeros((size.rows, size.columns)).at[ids].add(values)
        return at.SparseRows(ids, values, size.rows, unique=distinct, synchronized=True)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        gradients = {name: gradient(size, *batch[name]) for name, size in sizes.items()}
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=0)


def jax_case(
    name: str, tx: Any, sizes: dict[str, Size], batches: Any, **kind: bool
) -> harness.Case:
    """A transformation on some tables; `batches` are of {table: (ids, values)}."""
    params = {name: jax_table(size) for name, size in sizes.items()}
    step = in_turn(jitted_step(tx, sizes, **kind), [(x,) for x in on_device(batches)])
    return harness.Case(name, step, (params, tx.init(params)))


def jax_step(name: str, tx: Any, size: Size, batches: Any, **kind: bool) -> harness.Case:
    """A transformation on one table; `batches` are of (ids, values)."""
    return jax_case(name, tx, {"table": size}, [{"table": x} for x in batches], **kind)


def native_step(size: Size, batches: Any) -> harness.Case:
    """`lazy_adam` as one loop in C++, in place."""
    native_lazy.compile_and_register()
    return one_kernel("native C++", native_lazy.update, size, batches)


def one_kernel(name: str, update: Any, size: Size, batches: Any) -> harness.Case:
    """`lazy_adam` as the `update` of `native_lazy` or `pallas_lazy`."""

    def step(carry: Any, ids: jax.Array, values: jax.Array) -> Any:
        *tables, count = carry
        return *update(tables, count, ids, values, learning_rate=1e-3), count + 1

    table = jax_table(size)
    carry = (table, jnp.zeros_like(table), jnp.zeros_like(table), jnp.zeros((), jnp.int32))
    jitted = jax.jit(step, donate_argnums=0)
    return harness.Case(name, in_turn(jitted, on_device(batches)), carry)


def bare_rows(size: Size, batches: Any) -> harness.Case:
    """Gathers rows, combines them with as many others, scatters them: 3 streams of rows, where
    Adam has 7 (reads parameters, both moments and gradients, writes the first three)."""

    def step(table: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
        rows = 0.5 * table.at[ids].get(mode="clip") + values
        return table.at[ids].set(rows, mode="drop", unique_indices=True)

    jitted = jax.jit(step, donate_argnums=0)
    return harness.Case(
        "bare gather, scatter", in_turn(jitted, on_device(batches)), jax_table(size)
    )


def torch_on_device() -> tuple[Any, str, Callable[[Any], Any]]:
    """PyTorch, the name of the device that JAX computes on, and what waits for it."""
    torch: Any = importlib.import_module("torch")
    if jax.default_backend() == "gpu":
        return torch, "cuda", lambda _: torch.cuda.synchronize()
    return torch, "cpu", lambda _: None


def torch_step(size: Size, batches: Any) -> harness.Case:
    torch, device, wait = torch_on_device()
    table = torch.nn.Parameter(0.1 * torch.randn(size.rows, size.columns, device=device))
    optimizer = torch.optim.SparseAdam([table], lr=1e-3)

    def step(_: Any, ids: Any, values: Any) -> None:
        table.grad = torch.sparse_coo_tensor(ids, values, table.shape, check_invariants=False)
        optimizer.step()

    batches = [
        tuple(torch.tensor(x, device=device) for x in (ids[None].astype(np.int64), values))
        for ids, values in batches
    ]
    return harness.Case("torch SparseAdam", in_turn(step, batches), None, wait)


def tensorflow_step(name: str, size: Size, batches: Any) -> harness.Case:
    tf: Any = importlib.import_module("tensorflow")
    table = tf.Variable(0.1 * tf.random.normal((size.rows, size.columns)))
    if name == "TF1 AdamOptimizer":
        optimizer = tf.compat.v1.train.AdamOptimizer(1e-3)
    else:
        keras: Any = importlib.import_module("keras")
        table = keras.Variable(table)
        optimizer = keras.optimizers.Adam(1e-3)
        optimizer.build([table])

    @tf.function
    def step(ids: Any, values: Any) -> None:
        gradient = tf.IndexedSlices(values, ids, (size.rows, size.columns))
        optimizer.apply_gradients([(gradient, table)])

    batches = [(tf.constant(ids), tf.constant(values)) for ids, values in batches]
    return harness.Case(name, in_turn(lambda _, *batch: step(*batch), batches), None)


def installed(cases: Iterator[Callable[[], harness.Case]]) -> list[harness.Case]:
    """The contenders that can be had here; the others are named."""
    found = []
    for case in cases:
        try:
            found.append(case())
        except ImportError as error:
            print(f"left out: {error.name} is not installed")
    return found


def bench_step(size: Size, distribution: str, rounds: int) -> list[dict[str, Any]]:
    batches = step_batches(size, distribution)

    def contenders() -> Iterator[Callable[[], harness.Case]]:
        yield lambda: jax_step("lazy_adam", at.lazy_adam(1e-3), size, batches)
        if distribution == "uniform":
            apart = distinct_batches(size)
            yield lambda: jax_step(
                "lazy_adam, distinct ids", at.lazy_adam(1e-3), size, apart, distinct=True
            )
        if jax.default_backend() == "cpu":
            yield lambda: native_step(size, batches)
        yield lambda: torch_step(size, batches)
        yield lambda: bare_rows(size, batches)
        yield lambda: jax_step(DENSE, optax.adam(1e-3), size, batches, dense=True)
        if size.rows <= LARGEST_FOR_ALL:
            inner = at.lazy(optax.adam(1e-3))
            yield lambda: jax_step("lazy(optax.adam)", inner, size, batches)
            clipped = at.lazy_adam(1e-3, clip_global_norm=1.0, weight_decay=1e-2)
            yield lambda: jax_step("lazy_adam, clipped, decayed", clipped, size, batches)
            yield lambda: tensorflow_step("TF1 AdamOptimizer", size, batches)
            yield lambda: tensorflow_step("Keras 3 Adam", size, batches)

    cases = installed(contenders())
    harness.interleave(cases, rounds=rounds, cycle=BATCHES, warm_up=1, alike=True)
    base = cases[0].median_ms()
    return [
        {
            "rows": size.rows,
            "columns": size.columns,
            "ids": f"{size.touched} {distribution}",
            "name": case.name,
            "ms": case.median_ms(),
            "ratio": case.median_ms() / base,
        }
        for case in cases
    ]


def bench_growth(size: Size, rounds: int) -> list[dict[str, Any]]:
    """One of the tables that grow while the ids of a step stay as many."""
    batches = step_batches(size, "uniform")
    deferred = at.deferred_adam(1e-3, tables="table")

    def contenders() -> Iterator[Callable[[], harness.Case]]:
        yield lambda: jax_step("lazy_adam", at.lazy_adam(1e-3), size, batches)
        yield lambda: jax_step("deferred_adam", deferred, size, batches)
        yield lambda: torch_step(size, batches)
        yield lambda: bare_rows(size, batches)
        yield lambda: jax_step(DENSE, optax.adam(1e-3), size, batches, dense=True)

    cases = installed(contenders())
    harness.interleave(cases, rounds=rounds, cycle=BATCHES, warm_up=1, alike=True)
    return [
        {
            "rows": size.rows,
            "name": case.name,
            "ms": case.median_ms(),
            "ratio": case.median_ms() / cases[0].median_ms(),
        }
        for case in cases
    ]


# ---- many tables --------------------------------------------------------------------------------


def table_by_table(tx: Any) -> optax.GradientTransformation:
    """`tx` of each parameter of a dictionary, with a state of its own."""

    def init(params: Any) -> Any:
        return {name: tx.init({name: p}) for name, p in params.items()}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        steps = {
            name: tx.update({name: g}, state[name], {name: params[name]})
            for name, g in updates.items()
        }
        updates = {name: of_table[name] for name, (of_table, _) in steps.items()}
        return updates, {name: state for name, (_, state) in steps.items()}

    return optax.GradientTransformation(init, update)


def compile_costs(
    contenders: dict[str, Any], sizes: dict[str, Size], batch: Any
) -> dict[str, tuple[float, int]]:
    """{contender: (median seconds to trace and compile a step, its lines of StableHLO)}."""
    params = {
        name: jax.ShapeDtypeStruct((size.rows, size.columns), jnp.float32)
        for name, size in sizes.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    lines = {}
    for _ in range(COMPILATIONS):
        for name, tx in contenders.items():
            jax.clear_caches()
            carry = params, jax.eval_shape(tx.init, params)
            start = time.perf_counter()
            lowered = jitted_step(tx, sizes, dense=name == DENSE).lower(carry, batch)
            lowered.compile()
            seconds[name].append(time.perf_counter() - start)
            lines[name] = len(lowered.as_text().splitlines())
    return {name: (float(np.median(seconds[name])), lines[name]) for name in contenders}


def bench_tables(rows: Sequence[int], columns: int, rounds: int) -> list[dict[str, Any]]:
    """A step for tables of so many rows: what it takes to compile, and to run."""
    sizes = {f"table{i:02}": Size(n, columns, TABLE_TOUCHED) for i, n in enumerate(rows)}
    of_tables = {name: step_batches(size, "uniform") for name, size in sizes.items()}
    batches = [{name: of_tables[name][i] for name in sizes} for i in range(BATCHES)]
    contenders: dict[str, Any] = {
        "lazy_adam": at.lazy_adam(1e-3),
        "deferred_adam": at.deferred_adam(1e-3, tables="table"),
        DENSE: optax.adam(1e-3),
    }
    if sum(rows) * columns <= LARGEST_FOR_ALL * COLUMNS:
        contenders["lazy_adam, table by table"] = table_by_table(at.lazy_adam(1e-3))
    costs = compile_costs(contenders, sizes, batches[0])
    cases = [
        jax_case(name, tx, sizes, batches, dense=name == DENSE) for name, tx in contenders.items()
    ]
    harness.interleave(cases, rounds=rounds, cycle=BATCHES, warm_up=1, alike=True)
    base = cases[0].median_ms()
    return [
        {
            "tables": len(rows),
            "rows": sum(rows),
            "columns": columns,
            "name": case.name,
            "ms": case.median_ms(),
            "ratio": case.median_ms() / base,
            "compile seconds": costs[case.name][0],
            "ratio to dense": costs[case.name][0] / costs[DENSE][0],
            "StableHLO lines": costs[case.name][1],
        }
        for case in cases
    ]


# ---- the two-tower model ------------------------------------------------------------------------


def tower_batches(rows: int, distribution: str) -> list[tuple[np.ndarray, ...]]:
    """Users, int32 (BATCH,), items, int32 (BATCH, ITEMS), and whether each was chosen."""
    generator = np.random.default_rng(0)
    chosen = (generator.random((BATCH, ITEMS)) < 0.2).astype(np.float32)
    return [
        (
            draw_ids(distribution, rows, (BATCH,), seed),
            draw_ids(distribution, rows, (BATCH, ITEMS), BATCHES + seed),
            chosen,
        )
        for seed in range(BATCHES)
    ]


def jax_tower(
    name: str, value_and_grad: Any, tx: Any, rows: int, columns: int, batches: Any
) -> harness.Case:
    from flax import nnx

    class Tower(nnx.Module):
        """Scores items for a user."""

        def __init__(self, rngs: nnx.Rngs) -> None:
            self.users = nnx.Embed(rows, columns, rngs=rngs)
            self.items = nnx.Embed(rows, columns, rngs=rngs)
            self.hidden = nnx.Linear(columns, HIDDEN, rngs=rngs)
            self.out = nnx.Linear(HIDDEN, columns, rngs=rngs)

        def __call__(self, users: jax.Array, items: jax.Array) -> jax.Array:
            user = self.out(nnx.relu(self.hidden(self.users(users))))
            return jnp.einsum("bd,bkd->bk", user, self.items(items))

    model, params = nnx.split(Tower(nnx.Rngs(0)))

    def step(carry: Any, users: jax.Array, items: jax.Array, chosen: jax.Array) -> Any:
        params, state = carry

        def loss(params: Any) -> jax.Array:
            scores = nnx.merge(model, params)(users, items)
            return jnp.mean(optax.sigmoid_binary_cross_entropy(scores, chosen))

        _, grads = value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=0)
    return harness.Case(name, in_turn(jitted, on_device(batches)), (params, tx.init(params)))


def torch_tower(rows: int, columns: int, batches: Any) -> harness.Case:
    torch, device, wait = torch_on_device()
    users = torch.nn.Embedding(rows, columns, sparse=True, device=device)
    items = torch.nn.Embedding(rows, columns, sparse=True, device=device)
    mlp = torch.nn.Sequential(
        torch.nn.Linear(columns, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, columns)
    ).to(device)
    tables = torch.optim.SparseAdam([*users.parameters(), *items.parameters()], lr=1e-3)
    dense = torch.optim.Adam(mlp.parameters(), lr=1e-3)
    loss_of = torch.nn.BCEWithLogitsLoss()

    def step(_: Any, user: Any, item: Any, chosen: Any) -> None:
        tables.zero_grad()
        dense.zero_grad()
        scores = torch.einsum("bd,bkd->bk", mlp(users(user)), items(item))
        loss_of(scores, chosen).backward()
        tables.step()
        dense.step()

    batches = [tuple(torch.tensor(x, device=device) for x in batch) for batch in batches]
    return harness.Case("torch Embedding, SparseAdam", in_turn(step, batches), None, wait)


def bench_tower(rows: int, distribution: str, rounds: int) -> list[dict[str, Any]]:
    model = (rows, COLUMNS, tower_batches(rows, distribution))

    def contenders() -> Iterator[Callable[[], harness.Case]]:
        lazy, dense = at.lazy_adam(1e-3), optax.adam(1e-3)
        yield lambda: jax_tower("row gradients, lazy_adam", at.value_and_grad, lazy, *model)
        yield lambda: torch_tower(*model)
        yield lambda: jax_tower("jax.grad, optax.adam", jax.value_and_grad, dense, *model)

    cases = installed(contenders())
    harness.interleave(cases, rounds=rounds, cycle=BATCHES, warm_up=1, alike=True)
    base = cases[0].median_ms()
    return [
        {
            "rows": rows,
            "ids": distribution,
            "name": case.name,
            "ms": case.median_ms(),
            "ratio": case.median_ms() / base,
        }
        for case in cases
    ]


# ---- tracing ------------------------------------------------------------------------------------


def bench_tracing(rounds: int) -> list[dict[str, Any]]:
    """Tracing the gradient of a transformer with 12 layers and an embedding of its tokens."""
    nn: Any = importlib.import_module("flax.linen")

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, ids: jax.Array) -> jax.Array:
            x = nn.Embed(50_000, 256, name="tokens")(ids)
            for _ in range(12):
                h = nn.LayerNorm()(x)
                x = x + nn.MultiHeadDotProductAttention(8)(h, h)
                x = x + nn.Dense(256)(nn.gelu(nn.Dense(1024)(nn.LayerNorm()(x))))
            return nn.Dense(100)(x)

    model, ids = Transformer(), jnp.zeros((2, 64), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)

    def loss(params: Any) -> jax.Array:
        return jnp.mean(model.apply(params, ids) ** 2)

    contenders = {
        "jax.value_and_grad": jax.value_and_grad(loss),
        "at.value_and_grad": at.value_and_grad(loss, tables="tokens"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):  # the first also loads what it needs
        for name, function in contenders.items():
            jax.clear_caches()
            start = time.perf_counter()
            jax.make_jaxpr(function)(params)
            seconds[name].append(time.perf_counter() - start)
    times = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    base = times["jax.value_and_grad"]
    return [{"name": name, "seconds": t, "ratio": t / base} for name, t in times.items()]


# ---- the command --------------------------------------------------------------------------------


def size_of(text: str) -> Size:
    rows, columns, touched = map(int, text.split(","))
    return Size(rows, columns, touched)


def main() -> None:
    sections = ("step", "growth", "tables", "tower", "tracing")
    parser = harness.parser(str(__doc__), "sparse", sections, rounds=5)
    parser.add_argument(
        "--sizes", type=size_of, nargs="+", default=SIZES, metavar="V,D,N", help="of `step`"
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=GROWTH_ROWS,
        help="of `growth` (default 10^3 to 10^7)",
    )
    parser.add_argument(
        "--table-rows", type=int, nargs="+", default=TABLE_ROWS, help="of each of `tables`"
    )
    parser.add_argument(
        "--tower-rows", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="of each table"
    )
    arguments = parser.parse_args()

    results = {}
    if "step" in arguments.only:
        results["step"] = [
            row
            for size in arguments.sizes
            for distribution in DISTRIBUTIONS
            for row in bench_step(size, distribution, arguments.rounds)
        ]
        harness.print_table("step: the optimizer alone", results["step"])
    if "growth" in arguments.only:
        results["growth"] = [
            row
            for rows in arguments.rows
            for row in bench_growth(Size(rows, GROWTH_COLUMNS, GROWTH_TOUCHED), arguments.rounds)
        ]
        title = f"growth: {GROWTH_TOUCHED:,} uniform ids, tables {GROWTH_COLUMNS} wide"
        harness.print_table(title, results["growth"])
    if "tables" in arguments.only:
        results["tables"] = [
            row
            for columns in TABLE_COLUMNS
            for row in bench_tables(arguments.table_rows, columns, arguments.rounds)
        ]
        title = f"tables: {len(arguments.table_rows)} of them, {TABLE_TOUCHED:,} uniform ids each"
        harness.print_table(title, results["tables"])
    if "tower" in arguments.only:
        results["tower"] = [
            row
            for rows in arguments.tower_rows
            for distribution in DISTRIBUTIONS
            for row in bench_tower(rows, distribution, arguments.rounds)
        ]
        harness.print_table("tower: a whole training step", results["tower"])
    if "tracing" in arguments.only:
        results["tracing"] = bench_tracing(arguments.rounds)
        harness.print_table("tracing: the gradient of 12 layers", results["tracing"])
    harness.finish(arguments, results, ANCHORS)


if __name__ == "__main__":
    main()
