"""The training programs of `programs` in float64, with bounds of what float32 may lose."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import reference
from bounds import UNIT, Bounded, rounded
from programs import Program

Tree = dict[Any, Any]
"""{position of a leaf: its values}"""

SLOTS = ("mu", "nu", "nu_max")


class Model:
    """A program in float64, by the documentation: pieces of `reference`, wrapper by wrapper.

    Attributes:
      params: the parameters, and for those that have a master, the master.
      adam, ema, scale, accumulation: the pieces; None for those that the program does not have.
      skipped, consecutive: of each wrapper that skips steps.
    """

    def __init__(self, program: Program):
        self.program = program
        self.params: Tree = {i: Bounded(x) for i, x in enumerate(program.start())}
        self.adam = self._adam()
        self.ema: Any = self._ema() if "ema" in program.numbers else None
        self.scale: Any = None
        self.accumulation: Any = None
        if (wrapper := program.wrapper("dynamic")) is not None:
            scale, *others = map(program.number, ("loss_scale", "factor", "min_scale", "max_scale"))
            interval = wrapper.options["growth_interval"]
            self.scale = reference.LossScale(Bounded(scale), interval, *others)
        if (wrapper := program.wrapper("accumulate")) is not None:
            every = functools.partial(program.number, "every")
            self.accumulation = reference.Accumulation(every, average=wrapper.options["average"])
        self.skipped = [0] * len(program.wrappers)
        self.consecutive = [0] * len(program.wrappers)
        self._extra: dict[str, Any] = {}
        self._touched_in_cycle: Tree = {}
        self._thaws = {
            i: ~np.isin(np.arange(program.leaves[i].shape[0]), rows)
            for i, rows in program.frozen.items()
        }

    def _adam(self) -> reference.Adam:
        program = self.program
        numbers = {
            name: functools.partial(program.number, name)
            for name in ("b1", "b2", "eps", "eps_root")
            if name in program.numbers
        }
        storage = ("mu_dtype", "nu_dtype", "max_idle")
        options = {k: v for k, v in program.options.items() if k not in storage}
        adam = reference.Adam(**numbers, **options)
        if program.resumed:
            for name in SLOTS[: 2 if adam.max_of is None else 3]:
                start = {i: program.moment(i, name) for i in self.params}
                start = {i: x.astype(self.slot_dtype(i, name)) for i, x in start.items()}
                setattr(adam, name, {i: Bounded(x) for i, x in start.items()})
        return adam

    def _ema(self) -> reference.Ema:
        options = self.program.ema
        every = options.get("overwrite_every")
        return reference.Ema(
            functools.partial(self.program.number, "ema"),
            reference.never if every is None else reference.on_every(every),
            debias=options.get("debias", False),
            start=self._start_of_average() if options.get("initial") == "params" else None,
        )

    def loss_scale(self) -> float:
        """By which the gradients of the next step are to be multiplied."""
        if self.scale is not None:
            return float(self.scale.scale.value)
        return self.program.number("loss_scale") if self.program.wrapper("static") else 1.0

    def average(self, i: int, rows: Any) -> Bounded:
        """These rows of the average of a leaf, as the state holds it."""
        x = (self.ema.average or self._start_of_average())[i]
        return Bounded(x.value[rows], x.error[rows])

    def _start_of_average(self) -> Tree:
        weight = 0.0 if self.program.ema.get("debias") else 1.0
        dtype = self.program.ema.get("ema_dtype", jnp.float32)
        return {i: rounded(Bounded(p.value * weight), dtype) for i, p in self.params.items()}

    # Dtypes

    def has(self, *names: str) -> bool:
        return any(self.program.wrapper(name) is not None for name in names)

    def is_mastered(self, i: int) -> bool:
        return self.has("master_weights") and is_low(self.program.leaves[i].dtype)

    def param_dtype(self, i: int) -> Any:
        return jnp.float32 if self.is_mastered(i) else self.program.leaves[i].dtype

    def slot_dtype(self, i: int, name: str) -> Any:
        default = self.param_dtype(i) if name == "mu" else jnp.float32
        return self.program.options.get("mu_dtype" if name == "mu" else "nu_dtype", default)

    def gradient_dtype(self, i: int) -> Any:
        """Of the gradients that reach the chain."""
        if (wrapper := self.program.wrapper("accumulate")) is not None:
            return wrapper.options.get("accumulator_dtype", jnp.float32)
        if self.is_mastered(i) or self.has("static", "dynamic"):
            return jnp.float32
        return self.program.leaves[i].gradient_dtype

    def update_dtype(self, i: int) -> Any:
        return wider(self.gradient_dtype(i), self.param_dtype(i))

    # A step

    def step(self, gradients: list[Any], extra: dict[str, Any]) -> "Outcome":
        """Takes what `Program.gradient` and `Program.extra_arguments` give."""
        self._extra = extra
        grads: Tree = {}
        touched: Tree = {}
        for i, g in enumerate(gradients):
            if isinstance(g, tuple):
                grads[i], touched[i] = self._sum_of_rows(i, *g)
            elif g is not None:
                grads[i] = Bounded(g)
        summed = {i: rounded(grads[i], self.program.leaves[i].gradient_dtype) for i in touched}
        norm = reference.global_norm(grads | summed)
        return self._applied(grads, touched)._replace(norm=norm)

    def flush_accumulated(self) -> None:
        if self.accumulation is not None and self.accumulation.mini_step > 0:
            self._extra = {"flush": True}
            self._applied({}, {})

    def _applied(self, grads: Tree, touched: Tree) -> "Outcome":
        updates, held_at = self._wrapped(0, grads, touched)
        if held_at is not None:
            return Outcome({}, touched, held_at)
        for i, u in updates.items():
            if not self.is_mastered(i):
                leaf = self.program.leaves[i]
                updates[i] = u = rounded(u, wider(leaf.gradient_dtype, leaf.dtype))
            p = self.params[i]
            new = rounded(p + u, self.param_dtype(i))
            self.params[i] = np.where(u.value == 0, p, new)
        if self.accumulation is not None:
            touched = self._touched_in_cycle
        return Outcome(updates, touched, None)

    def _sum_of_rows(self, i: int, ids: np.ndarray, values: np.ndarray) -> tuple[Bounded, Any]:
        """The dense gradient, and which rows it touches."""
        leaf = self.program.leaves[i]
        inside = (ids >= 0) & (ids < leaf.shape[0])
        ids, exact = ids[inside], Bounded(values[inside]).value
        total, size = np.zeros(leaf.shape, exact.dtype), np.zeros(leaf.shape)
        np.add.at(total, ids, exact)
        np.add.at(size, ids, np.abs(exact))
        touched = np.zeros(leaf.shape[0], bool)
        touched[ids] = True
        # Each row is rounded where it is accumulated, before the sum.
        stored = rounded(Bounded(size), self.gradient_dtype(i)).error
        rows = Bounded(total, size * len(ids) * UNIT + np.where(size > 0, stored, 0.0))
        return rounded(rows, self.gradient_dtype(i)), touched

    def _wrapped(self, level: int, grads: Tree, touched: Tree) -> tuple[Tree, int | None]:
        """The updates from this wrapper inwards; the level that held or skipped the step."""
        if level == len(self.program.wrappers):
            return self._chain(grads, touched), None
        name = self.program.wrappers[level].name
        if name in ("skip", "skip inside"):
            finite = all(np.isfinite(g).all() for g in grads.values())
            self.consecutive[level] = 0 if finite else self.consecutive[level] + 1
            limit = self.program.wrappers[level].options.get("max_consecutive", np.inf)
            if 0 < self.consecutive[level] <= limit:
                self.skipped[level] += 1
                return {}, level
        elif name == "static":
            grads = {i: g / self.program.number("loss_scale") for i, g in grads.items()}
        elif name == "dynamic":
            unscaled = self.scale.unscale(grads)
            if unscaled is None:
                self.skipped[level] += 1
                return {}, level
            grads = unscaled
        elif name == "accumulate":
            total = self._accumulated(level, grads, touched)
            if total is None:
                return {}, level
            grads, touched = total
        elif name == "freeze":
            grads = {i: self._thawed(i, g) for i, g in grads.items()}
            touched = {i: rows & self._thaws.get(i, True) for i, rows in touched.items()}
            before = self._slots()
            updates, held_at = self._wrapped(level + 1, grads, touched)
            self._keep_other_rows(self._thaws, before)
            return {i: self._thawed(i, u) for i, u in updates.items()}, held_at
        return self._wrapped(level + 1, grads, touched)

    def _accumulated(self, level: int, grads: Tree, touched: Tree) -> tuple[Tree, Tree] | None:
        sums = self.accumulation
        dtype = self.program.wrappers[level].options.get("accumulator_dtype", jnp.float32)
        if "flush" in self._extra:
            # Whether a leaf without a sum had only gradients of None is not known any more.
            sums.total = {i: p * 0.0 for i, p in self.params.items()} | sums.total
            total = sums.end(sums.total)
            leaves = enumerate(self.program.leaves)
            nothing = {i: np.zeros(x.shape[0], bool) for i, x in leaves if x.ids is not None}
            touched = nothing | self._touched_in_cycle
        else:
            if sums.mini_step == 0:
                self._touched_in_cycle = {}
            for i, rows in touched.items():
                self._touched_in_cycle[i] = self._touched_in_cycle.get(i, False) | rows
            total = sums.add(grads, self._extra.get("weight", 1.0), self._extra.get("emit", False))
            touched = {i: self._touched_in_cycle[i] for i in touched}
            for i, x in sums.total.items():
                sums.total[i] = rounded(rounded(x, dtype), dtype)  # the product, and the sum
        if total is None:
            return None
        return {i: rounded(rounded(x, dtype), dtype) for i, x in total.items()}, touched

    def _thawed(self, i: int, x: Bounded) -> Bounded:
        """Zero in frozen rows."""
        return by_row(self._thaws[i], x, 0.0) if i in self._thaws else x

    def _slots(self) -> list[Tree]:
        return [dict(getattr(self.adam, name)) for name in SLOTS]

    def _keep_other_rows(self, rows: Tree, before: list[Tree]) -> None:
        """Gives the slots of these leaves, but for these rows, the values that they had."""
        for name, old in zip(SLOTS, before, strict=True):
            slot = getattr(self.adam, name)
            for i in slot.keys() & rows.keys():
                slot[i] = by_row(rows[i], slot[i], old.get(i, 0.0))

    def _chain(self, grads: Tree, touched: Tree) -> Tree:
        program, count = self.program, self.adam.count
        if program.clip is not None:
            clip = getattr(reference, program.clip.replace("clip_", "clip_by_"))
            grads = clip(grads, program.number("clip"))
            grads = {i: rounded(g, self.gradient_dtype(i)) for i, g in grads.items()}
        before = self._slots()
        updates = self.adam.direction(grads)
        for name in SLOTS:
            slot = getattr(self.adam, name)
            for i in slot.keys() & grads.keys():
                slot[i] = rounded(slot[i], self.slot_dtype(i, name))
        lazily = touched if program.family == "lazy" else {}
        self._keep_other_rows(lazily, before)
        for i, u in updates.items():
            u = rounded(u, self.update_dtype(i))
            if "weight_decay" in program.numbers and (program.decayed or {i: True})[i]:
                decay = program.number("weight_decay", count)
                # Optax multiplies in the parameter's dtype.
                decayed = rounded(decay * self.params[i], self.param_dtype(i))
                u = self._rounded_twice(i, u + decayed)
            name = "rate_by_path" if i in program.rates else "learning_rate"
            u = self._rounded_twice(i, u * -program.number(name, count))
            if "row_norm" in program.numbers and i in program.limited_tables:
                u = self._row_limited(i, u)
            updates[i] = by_row(lazily[i], u, 0.0) if i in lazily else u
        return updates if self.ema is None else self._averaged(updates)

    def _rounded_twice(self, i: int, u: Bounded) -> Bounded:
        """A hyperparameter, or its product, and the update, each in the dtype of updates."""
        return rounded(rounded(u, self.update_dtype(i)), self.update_dtype(i))

    def _row_limited(self, i: int, u: Bounded) -> Bounded:
        """The update that leaves no row with a larger norm."""
        p, limit = self.params[i], self.program.number("row_norm")
        new = rounded(p + u, self.param_dtype(i))
        value, error = u.value.copy(), u.error.copy()
        for r in range(len(value)):
            row = Bounded(new.value[r], new.error[r])
            norm = reference.global_norm({0: row})
            if norm.value + norm.error > limit:
                limited = reference.clip_by_norm({0: row}, limit)[0]
                change = limited - Bounded(p.value[r], p.error[r])
                value[r], error[r] = change.value, change.error
        return rounded(Bounded(value, error), self.update_dtype(i))

    def _averaged(self, updates: Tree) -> Tree:
        """The updates, those that set the parameters to their average in its steps."""
        params = dict(self.params)
        for i, u in updates.items():
            params[i] = rounded(params[i] + self._thawed(i, u), self.param_dtype(i))
        after = self.ema.update(params)
        if "ema_dtype" in self.program.ema:
            dtype = self.program.ema["ema_dtype"]
            self.ema.average = {i: rounded(x, dtype) for i, x in self.ema.average.items()}
        if not self.ema.overwrite_when(self.ema.count - 1):
            return updates
        return {i: rounded(after[i] - self.params[i], self.update_dtype(i)) for i in updates}


class Outcome(NamedTuple):
    """What a step of the model did.

    Attributes:
      updates: of the leaves that have one.
      touched: of the leaves with row gradients, the rows that may move.
      held_at: the wrapper that held or skipped the step; None for none.
      norm: of the gradients.
    """

    updates: Tree
    touched: Tree
    held_at: int | None
    norm: Any = None


def by_row(rows: Any, x: Any, otherwise: Any) -> Any:
    """`x` in these rows, and something else in the others."""
    x = x if isinstance(x, Bounded) else Bounded(x)
    rows = np.reshape(rows, (-1, *[1] * (x.value.ndim - 1)))
    return np.where(rows & np.ones(x.value.shape, bool), x, otherwise)


def is_low(dtype: Any) -> bool:
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def wider(x: Any, y: Any) -> Any:
    return jnp.dtype(x) if jnp.dtype(x) == jnp.dtype(y) else jnp.dtype(jnp.float32)
