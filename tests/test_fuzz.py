"""Random training programs against the formulas in float64.

Each program of `programs.draw` is trained by this package and by `reference`, and compared after
every step: updates, parameters, moments, averages, masters, counts, loss scales; and to the bit
what may not move: untouched and frozen rows, and everything in a step that is held or skipped. What
float32 may lose is bounded by `bounds`, so that no tolerance is chosen here.

A failure names the number of its program, and a simpler program that fails too, where one is found.
To repeat it: ``python tests/test_fuzz.py NUMBER``, or ``check(programs.draw(NUMBER))``.
"""

import collections
import dataclasses
import functools
import pickle
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
import reference
from bounds import Bounded, rounded
from helpers import OPTIMIZED, as_numpy, in_tiers
from program_model import SLOTS, Model, Outcome
from programs import Leaf, Number, Program

import adam_transforms as at

ADAM_STATES = (optax.ScaleByAdamState, optax.ScaleByAmsgradState, at.DeferredAdamState)


class Difference(AssertionError):
    """What differs, and after which step."""

    def __init__(self, step: int, what: str):
        super().__init__(f"step {step}: {what}")
        self.step = step


# The package


class Compiled:
    """The functions of one structure of programs, and how often the step was traced."""

    def __init__(self, program: Program):
        self.traces = 0
        treedef = jax.tree.structure(program.tree)

        def gradient_of(i: int, g: Any) -> Any:
            if not isinstance(g, tuple):
                return g
            leaf = program.leaves[i]
            return at.SparseRows(*g, leaf.shape[0], unique=leaf.unique, synchronized=True)

        def update(numbers: Any, grads: Any, state: Any, leaves: Any, extra: Any) -> Any:
            grads = treedef.unflatten([gradient_of(i, g) for i, g in enumerate(grads)])
            params = treedef.unflatten(leaves)
            norm = at.global_norm(grads) if program.measured else None
            updates, state = program.optimizer(numbers).update(grads, state, params, **extra)
            params = at.apply_updates(params, updates)
            seen = treedef.flatten_up_to(at.to_dense(updates))
            return jax.tree.leaves(params), state, (seen, norm)

        def step(*arguments: Any) -> Any:
            self.traces += 1
            return update(*arguments)

        def scan(numbers: Any, grads: Any, state: Any, leaves: Any) -> Any:
            def body(carry: Any, inputs: Any) -> Any:
                grads, extra = inputs
                leaves, state, _ = update(numbers, grads, *carry[::-1], extra)
                return (leaves, state), None

            return jax.lax.scan(body, (leaves, state), grads)[0]

        def flush(state: Any, leaves: Any) -> Any:
            params, state = at.flush(treedef.unflatten(leaves), state)
            return jax.tree.leaves(params), state

        def catch_up(state: Any, leaves: Any, ids: Any) -> Any:
            params, state = at.catch_up(treedef.unflatten(leaves), state, ids)
            return jax.tree.leaves(params), state

        def flush_accumulated(numbers: Any, state: Any, leaves: Any) -> Any:
            params, tx = treedef.unflatten(leaves), program.optimizer(numbers)
            updates, state = at.flush_accumulated(tx, state, params)
            return jax.tree.leaves(at.apply_updates(params, updates)), state

        def finalize(state: Any, leaves: Any) -> Any:
            return jax.tree.leaves(at.finalize(treedef.unflatten(leaves), state))

        self.eager = update
        jit = functools.partial(
            jax.jit, compiler_options=OPTIMIZED if program.optimized else quick_compilation()
        )
        self.step = jit(step, donate_argnums=(2, 3) if program.donated else ())
        self.scan, self.flush, self.catch_up = map(jit, (scan, flush, catch_up))
        self.flush_accumulated, self.finalize = jit(flush_accumulated), jit(finalize)


@functools.cache
def quick_compilation() -> dict[str, Any] | None:
    """Options with which a step of a few small arrays compiles four times as fast."""
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # another version, or platform
        return None
    return options


class Alike:
    """A program, equal to every other of its structure."""

    def __init__(self, program: Program):
        self.program, self.structure = program, program.structure()

    def __hash__(self) -> int:
        return hash(self.structure)

    def __eq__(self, other: Any) -> bool:
        return self.structure == other.structure


@functools.lru_cache(maxsize=2)
def compiled(alike: Alike) -> Compiled:
    return Compiled(alike.program)


class Run:
    """A program as this package runs it."""

    def __init__(self, program: Program):
        self.program = program
        self.compiled = compiled(Alike(program))
        self.numbers = program.arguments()
        self.leaves = [jnp.asarray(x) for x in program.start()]
        params = jax.tree.structure(program.tree).unflatten(self.leaves)
        self.state = program.optimizer(self.numbers).init(params)
        if program.resumed:
            self.state = jax.tree.map(self._resumed, self.state, is_leaf=is_adam)

    def _resumed(self, state: Any) -> Any:
        """With moments other than zero."""
        if not is_adam(state):
            return state
        slots = {}
        for name in SLOTS:
            leaves, treedef = jax.tree.flatten(getattr(state, name, None))
            start = [self.program.moment(i, name) for i in range(len(leaves))]
            slots[name] = treedef.unflatten(
                [jnp.asarray(x, y.dtype) for x, y in zip(start, leaves, strict=True)]
            )
        return state._replace(**{k: x for k, x in slots.items() if jax.tree.leaves(x)})

    def step(self, gradients: list[Any], extra: Any, eager: bool = False) -> tuple[Any, Any]:
        """The updates, and the norm of the gradients if that is compared."""
        step = self.compiled.eager if eager else self.compiled.step
        self.leaves, self.state, seen = step(
            self.numbers, gradients, self.state, self.leaves, extra
        )
        return seen

    def scan(self, inputs: list[Any]) -> None:
        stacked = jax.tree.map(lambda *x: np.stack(x), *inputs)
        self.leaves, self.state = self.compiled.scan(self.numbers, stacked, self.state, self.leaves)

    def transport(self, how: str, step: int) -> None:
        if how == "pickle":
            self.leaves, self.state = pickle.loads(pickle.dumps((self.leaves, self.state)))
        elif how == "numpy":
            self.leaves, self.state = jax.device_get((self.leaves, self.state))
        elif how == "tree":
            leaves, treedef = jax.tree.flatten(self.state)
            self.state = treedef.unflatten(leaves)
        elif how == "transfer":
            params = jax.tree.structure(self.program.tree).unflatten(self.leaves)
            tx = self.program.optimizer(self.numbers)
            self.state, _ = at.transfer_state(self.state, tx, tx, params)
        elif how == "flush":
            self.leaves, self.state = self.compiled.flush(self.state, self.leaves)
        elif how == "flush accumulated":
            self.leaves, self.state = self.compiled.flush_accumulated(
                self.numbers, self.state, self.leaves
            )
        elif how == "catch up":
            rng = np.random.default_rng([self.program.seed, 3, step])
            ids = {
                self.program.paths[i]: rng.integers(-2, leaf.shape[0] + 2, 5).astype(np.int32)
                for i, leaf in enumerate(self.program.leaves)
                if leaf.ids is not None
            }
            self.leaves, self.state = self.compiled.catch_up(self.state, self.leaves, ids)


def inner_states(program: Program, state: Any) -> Iterator[Any]:
    """The state of each wrapper, then the one inside all of them."""
    for _ in program.wrappers:
        yield state
        state = state.inner_state
    yield state


def is_adam(x: Any) -> bool:
    return isinstance(x, ADAM_STATES)


def find(state: Any, *kinds: type) -> Any:
    """The one state of these classes; None if there is none."""
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    found = [x for x in found if isinstance(x, kinds)]
    assert len(found) <= 1
    return found[0] if found else None


# The comparison


def check(program: Program) -> None:
    """Runs a program both ways; raises an AssertionError at the first difference."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        Comparison(program).run()


class Comparison:
    """A program in step with its model."""

    def __init__(self, program: Program):
        self.program = program
        self.model, self.ours = Model(program), Run(program)
        self.time = -1

    def run(self) -> None:
        self.compare_state()
        transport = collections.defaultdict(list)
        for step, how in self.program.transport:
            transport[step].append(how)
        traces, kinds = self.ours.compiled.traces, set()
        for step in range(self.program.steps):
            self.time = step
            for how in transport[step]:
                if how == "scan":
                    return self.scan()
                if how == "transfer":
                    self.end_what_is_pending()
                if how != "eager":
                    self.ours.transport(how, step)
                if how == "flush accumulated":
                    self.model.flush_accumulated()
                if how.startswith("flush"):
                    self.compare_state(flushed=how == "flush")
            kinds.add(self.step("eager" in transport[step]))
        if self.ours.compiled.traces - traces > len(kinds):
            self.differ("the step was traced again for gradients of the same structure")
        self.finish()

    def end_what_is_pending(self) -> None:
        """What must be done before a state is transferred."""
        if self.model.accumulation is not None:
            self.ours.transport("flush accumulated", self.time)
            self.model.flush_accumulated()
        if self.program.family == "deferred":
            self.ours.transport("flush", self.time)

    def inputs(self) -> tuple[list[Any], dict[str, Any]]:
        """The gradients, and the other arguments of `update`."""
        scale, n = self.model.loss_scale(), len(self.program.leaves)
        gradients = [self.program.gradient(self.time, i, scale) for i in range(n)]
        return gradients, self.program.extra_arguments(self.time)

    def step(self, eager: bool) -> str:
        """One step of both; returns of which kinds the gradients were."""
        gradients, extra = self.inputs()
        before = jax.tree.map(snapshot, (self.ours.leaves, self.ours.state))
        outcome = self.model.step(gradients, extra)
        updates, norm = self.ours.step(gradients, extra, eager)
        if norm is not None:
            self.near("global_norm", norm, Bounded(0.0) + outcome.norm)
        if self.program.family != "deferred":
            self.compare_updates(outcome, updates)
        self.compare_state()
        self.compare_unmoved(outcome, before, gradients)
        return str([type(g) for g in gradients])

    def scan(self) -> None:
        """All other steps in one loop, compared at its end."""
        inputs = []
        for step in range(self.time, self.program.steps):
            self.time = step
            inputs.append(self.inputs())
            self.model.step(*inputs[-1])
        self.ours.scan(inputs)
        self.compare_state()
        self.finish()

    def finish(self) -> None:
        if self.program.family == "deferred":
            self.ours.transport("flush", self.time)
            self.compare_state(flushed=True)
        if self.model.ema is not None and self.model.adam.count:
            final = self.ours.compiled.finalize(self.ours.state, self.ours.leaves)
            for i, average in self.model.ema.values().items():
                if self.model.is_mastered(i):
                    average = rounded(average, self.program.leaves[i].dtype)
                self.near(f"finalize of leaf {i}", final[i], rounded(average, final[i].dtype))

    def compare_updates(self, outcome: Outcome, updates: list[Any]) -> None:
        for i, (p, u) in enumerate(zip(self.ours.leaves, updates, strict=True)):
            if outcome.held_at is not None:
                expected = None if u is None else Bounded(np.zeros(np.shape(p)))
            else:
                expected = outcome.updates.get(i)
            if (u is None) != (expected is None):
                self.differ(f"the update of leaf {i} is {u}, expected {expected}")
            if u is not None and not self.model.is_mastered(i):
                self.near(f"update of leaf {i}", u, expected)

    def compare_state(self, flushed: bool = False) -> None:
        """Parameters and state; those of deferred tables only if they have been flushed."""
        program, model, state = self.program, self.model, self.ours.state
        stale = set()
        if program.family == "deferred" and not flushed:
            stale = {i for i, leaf in enumerate(program.leaves) if leaf.ids is not None}
        for i, p in enumerate(self.ours.leaves):
            if p.dtype != program.leaves[i].dtype or p.shape != program.leaves[i].shape:
                self.differ(f"leaf {i} has become {p.dtype}{p.shape}")
            if i not in stale:
                self.near(f"parameter {i}", p, rounded(model.params[i], p.dtype))

        adam = find(state, *ADAM_STATES)
        self.same("count", adam.count, model.adam.count)
        for name in SLOTS:
            slots = jax.tree.leaves(getattr(adam, name, None))
            for i, x in enumerate(slots):
                if i not in stale:
                    expected = getattr(model.adam, name).get(i, Bounded(np.zeros(x.shape)))
                    self.near(f"{name} of leaf {i}", x, expected)

        self.compare_copies(find(state, at.ParamsEmaState), find(state, at.MasterWeightsState))
        for level, inner in enumerate(inner_states(program, state)):
            self.compare_wrapper(level, inner)

    def compare_copies(self, average: Any, masters: Any) -> None:
        model = self.model
        if average is not None:
            self.same("steps averaged", average.count, model.ema.count)
            current = jax.tree.map(lambda x: ..., average.ema)
            if average.last_step is not None:  # the average of idle rows is out of date
                current = jax.tree.map(lambda x: np.asarray(x) == average.count, average.last_step)
            for i, (x, rows) in enumerate(
                zip(*map(jax.tree.leaves, (average.ema, current)), strict=True)
            ):
                self.near(f"average of leaf {i}", as_numpy(x)[rows], model.average(i, rows))
        if masters is not None:
            found = iter(jax.tree.leaves(masters.master))
            for i in filter(model.is_mastered, range(len(self.ours.leaves))):
                self.near(f"master of leaf {i}", next(found), model.params[i])

    def compare_wrapper(self, level: int, state: Any) -> None:
        model = self.model
        if isinstance(state, at.DynamicLossScaleState):
            self.near("loss scale", state.scale, Bounded(0.0) + model.scale.scale)
            self.same("finite steps", state.finite_steps, model.scale.finite_steps)
        if hasattr(state, "skipped"):
            self.same("skipped", state.skipped, model.skipped[level])
        if hasattr(state, "consecutive"):
            self.same("consecutive", state.consecutive, model.consecutive[level])
        if hasattr(state, "mini_step"):
            self.compare_accumulators(state)

    def compare_accumulators(self, state: Any) -> None:
        self.same("mini_step", state.mini_step, self.model.accumulation.mini_step)
        if getattr(state, "cycles", None) is not None:
            self.same("cycles", state.cycles, self.model.accumulation.cycles)
        if getattr(state, "weight", None) is not None:
            self.near("weight", state.weight, Bounded(self.model.accumulation.weight) * 1.0)
        if self.model.accumulation.mini_step == 0:
            return
        leaves = jax.tree.leaves(state.acc, is_leaf=lambda x: isinstance(x, at.SparseRows))
        for i, x in enumerate(leaves):
            if not isinstance(x, at.SparseRows):
                total = self.model.accumulation.total.get(i, Bounded(np.zeros(x.shape)))
                self.near(f"sum of leaf {i}", x, total)

    def compare_unmoved(self, outcome: Outcome, before: Any, gradients: list[Any]) -> None:
        """What this step may not move has the bits it had."""
        program, (old_leaves, old_state) = self.program, before
        if outcome.held_at is not None:
            self.same_bits("parameters of a held step", self.ours.leaves, old_leaves)
            old, new = (
                list(inner_states(program, state))[outcome.held_at + 1]
                for state in (old_state, self.ours.state)
            )
            self.same_bits("state inside a held step", new, old)
            return
        still = {i: ~rows for i, rows in outcome.touched.items() if program.family == "lazy"}
        for i, rows in program.frozen.items():
            still[i] = still.get(i, np.zeros(program.leaves[i].shape[0], bool))
            still[i][list(rows)] = True
        if program.family != "deferred":
            for i, g in enumerate(gradients):
                if g is None:
                    still[i] = ...
        for i, rows in still.items():
            self.same_bits(f"parameter {i} in idle rows", self.ours.leaves[i], old_leaves[i], rows)
            old, new = (find(state, *ADAM_STATES) for state in (old_state, self.ours.state))
            for name in SLOTS:
                if getattr(new, name, None) is not None:
                    x, y = (jax.tree.leaves(getattr(z, name))[i] for z in (new, old))
                    self.same_bits(f"{name} of leaf {i} in idle rows", x, y, rows)

    def near(self, what: str, actual: Any, expected: Bounded) -> None:
        actual = as_numpy(actual)
        if actual.shape != expected.value.shape:
            self.differ(f"{what} has shape {actual.shape}, expected {expected.value.shape}")
        with np.errstate(invalid="ignore"):
            is_near = np.abs(actual - expected.value) <= expected.error
        same = (actual == expected.value) | (np.isnan(actual) & np.isnan(expected.value))
        bad = ~np.where(np.isfinite(expected.value), is_near, same)
        if bad.any():
            place = tuple(int(x[0]) for x in np.nonzero(bad)) if bad.ndim else ()
            self.differ(
                f"{what}{list(place)} is {actual[place]}, expected {expected.value[place]} +- "
                f"{expected.error[place]:.1e}"
            )

    def same(self, what: str, actual: Any, expected: int) -> None:
        if int(actual) != expected:
            self.differ(f"{what} is {actual}, expected {expected}")

    def same_bits(self, what: str, actual: Any, expected: Any, rows: Any = ...) -> None:
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            x, y = snapshot(x), snapshot(y)
            if x[rows].tobytes() != y[rows].tobytes():
                self.differ(f"{what}: {x[rows]}, before {y[rows]}")

    def differ(self, what: str) -> None:
        raise Difference(self.time, what)


def snapshot(x: Any) -> np.ndarray:
    """A copy on the host, which no donation overwrites."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(x) if is_key else x)


# Failures


def simpler(program: Program, error: Exception) -> Iterator[Program]:
    """Programs with one thing less than one that fails."""
    change = functools.partial(dataclasses.replace, program)
    if isinstance(error, Difference) and 0 <= error.step < program.steps - 1:
        yield change(steps=error.step + 1)
    for name in ("events", "transport", "alternatives", "rates"):
        values = getattr(program, name)
        yield from (change(**{name: values[:i] + values[i + 1 :]}) for i in range(len(values)))
    for wrapper in program.wrappers:
        others = tuple(w for w in program.wrappers if w is not wrapper)
        yield change(wrappers=others, frozen={} if wrapper.name == "freeze" else program.frozen)
    for name, value in program.options.items():
        if value != programs.MAX_IDLE:
            yield change(options={k: v for k, v in program.options.items() if k != name})
    for name, without in {
        "clip": {"clip": None},
        "weight_decay": {"decayed": None},
        "ema": {"ema": {}, "averages_outside": False},
        "row_norm": {},
        "eps_root": {},
        "rate_by_path": {"rates": ()},
    }.items():
        yield change(numbers={k: n for k, n in program.numbers.items() if k != name}, **without)
    for name, number in program.numbers.items():
        plain = Number("number", (number.at(0),))
        yield change(numbers=dict(program.numbers) | {name: plain})
    for name in ("resumed", "measured", "preset", "donated", "emits", "optimized"):
        yield change(**{name: False})
    for i, leaf in enumerate(program.leaves):
        plain = Leaf(leaf.shape, ids=leaf.ids)
        for new in (plain, plain if leaf.ids is not None else Leaf(())):
            leaves = [*program.leaves[:i], new, *program.leaves[i + 1 :]]
            yield change(tree=jax.tree.structure(program.tree).unflatten(leaves))


def error_of(program: Program) -> Exception | None:
    try:
        check(program)
    except Exception as error:
        return error
    return None


def shrunk(program: Program, error: Exception, seconds: float) -> tuple[Program, Exception]:
    """The simplest program found in this time that fails in the same way."""
    end, tried = time.monotonic() + seconds, {repr(program)}
    candidates = simpler(program, error)
    while time.monotonic() < end and (candidate := next(candidates, None)) is not None:
        if candidate.skips_its_faults and repr(candidate) not in tried:
            tried.add(repr(candidate))
            found = error_of(candidate)
            if found is not None and type(found) is type(error):
                program, error = candidate, found
                candidates = simpler(program, error)
    return program, error


def try_programs(numbers: range, seconds_to_shrink: float = 60.0) -> None:
    """Checks these programs; describes the first that fails."""
    for number in numbers:
        program = programs.draw(number)
        error = error_of(program)
        if error is not None:
            simple, its_error = shrunk(program, error, seconds_to_shrink)
            raise AssertionError(
                f"program {number} fails: {describe(error)}\n"
                f"repeat it with: python tests/test_fuzz.py {number}\n"
                f"a simpler one: check({simple})\nfails: {describe(its_error)}"
            ) from error


def describe(error: Exception) -> str:
    return str(error) if isinstance(error, Difference) else f"{type(error).__name__}: {error}"


# The tests

BOTH_TIERS, ALL, TOGETHER = 200, 5000, 20
FIRST_TIER = (0, 20, 40, 140)  # with these starts, the programs are of every kind


@pytest.mark.parametrize(
    "start", in_tiers(range(0, BOTH_TIERS, TOGETHER), lambda start: start in FIRST_TIER)
)
@pytest.mark.every_case
def test_random_programs_follow_the_formulas(start: int) -> None:
    try_programs(range(start, start + TOGETHER))


@pytest.mark.fuzz
@pytest.mark.parametrize("start", range(BOTH_TIERS, ALL, 40))
def test_many_random_programs_follow_the_formulas(start: int) -> None:
    try_programs(range(start, start + 40))


def test_the_first_tier_has_every_kind_of_program() -> None:
    seen = collections.Counter()
    for number in (start + i for start in FIRST_TIER for i in range(TOGETHER)):
        program = programs.draw(number)
        seen.update(program.numbers.keys())
        seen.update(number.kind for number in program.numbers.values())
        seen.update([program.family, program.clip, *program.options, *program.ema])
        seen.update(w.name for w in program.wrappers)
        seen.update(name for w in program.wrappers for name, value in w.options.items() if value)
        seen.update(
            [event.kind for event in program.events] + [how for _, how in program.transport]
        )
        seen.update((program.alternative or ())[1:] if program.alternatives else ())
        seen.update(leaf.dtype for leaf in program.leaves)
        seen.update(name for name, value in vars(program).items() if value is True)
    kinds = {
        *programs.CHOICES,
        *programs.WRAPPERS,
        *("number", "numpy", "array", "schedule", "dense", "lazy", "deferred"),
        *("clip_value", "clip_norm", "clip_global_norm"),
        *("max_of", "eps_hat", "nesterov", "mu_dtype", "nu_dtype", "bias_correction_mu"),
        *("overwrite_every", "debias", "initial", "max_consecutive", "weighted", "average"),
        *("zero", "tiny", "large", "huge", "inf", "nan", "empty", "same row", "none"),
        *("pickle", "numpy", "tree", "transfer", "scan", "eager", "flush", "catch up"),
        *("flush accumulated", "float16", "bfloat16", "complex64"),
        *("resumed", "measured", "donated", "optimized", "preset", "emits", "averages_outside"),
    }
    assert kinds <= seen.keys()


def test_a_bound_holds_for_float32_and_is_of_its_size() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 10_000)).astype(np.float32)

    def formula(a: Any, b: Any) -> Any:
        return (a * 0.9 + b * 0.1) / (np.sqrt(np.square(a)) + 1e-3)

    exact = formula(Bounded(a), Bounded(b))
    error = np.abs(formula(a, b) - exact.value)
    assert (error <= exact.error).all()
    assert (exact.error < 1e-5 * (np.abs(exact.value) + 1)).all()
    assert (rounded(exact, jnp.bfloat16).error > 1e-3 * np.abs(exact.value)).all()


def test_a_failure_is_described_by_a_simpler_program(monkeypatch: pytest.MonkeyPatch) -> None:
    direction = reference.Adam.direction
    monkeypatch.setattr(
        reference.Adam,
        "direction",
        lambda self, grads: {i: u * 1.01 for i, u in direction(self, grads).items()},
    )
    with pytest.raises(AssertionError, match="program 3 fails: step [0-9]+: ") as error:
        try_programs(range(3, 4), seconds_to_shrink=5.0)
    simple = str(error.value).split("check(")[1].split(")\nfails")[0]
    found = eval(simple, vars(programs))
    assert isinstance(error_of(found), Difference)
    assert len(simple) < len(repr(programs.draw(3)))


if __name__ == "__main__":
    first, *last = map(int, sys.argv[1:])
    for number in range(first, (last or [first + 1])[0]):
        print(number, programs.draw(number) if not last else "", flush=True)
        try_programs(range(number, number + 1))
