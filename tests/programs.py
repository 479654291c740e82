"""Random training programs for `test_fuzz`: a tree, an optimizer, gradients, faults.

A program is plain data. Its `repr` reproduces it, and programs of one structure share what is
compiled: then only the numbers differ.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_transforms as at


class Pair(NamedTuple):
    first: Any
    second: Any


class Described:
    """A dataclass whose `repr` leaves out the defaults."""

    def __repr__(self) -> str:
        given = []
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            value = getattr(self, field.name)
            if default is dataclasses.MISSING or value != default:
                given.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Leaf(Described):
    """A parameter, and what its gradients are like: dense, or `ids` rows of it."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    gradient_dtype: str = "float32"
    ids: int | None = None
    unique: bool = False


@dataclasses.dataclass(frozen=True)
class Number:
    """A hyperparameter: a Python number, one of NumPy, a JAX scalar, or a schedule.

    The last two are arguments of the compiled step, and are exactly float32.
    """

    kind: str
    values: tuple[float, ...]

    @property
    def is_traced(self) -> bool:
        return self.kind in ("array", "schedule")

    def at(self, count: int) -> float:
        value = self.values[min(count, len(self.values) - 1)]
        return float(np.float32(value)) if self.kind != "number" else value

    def argument(self) -> jax.Array | None:
        """What is passed to the compiled step."""
        if not self.is_traced:
            return None
        values = self.values if self.kind == "schedule" else self.values[0]
        return jnp.asarray(values, jnp.float32)

    def given(self, argument: Any) -> Any:
        """What is passed to the factory."""
        if self.kind == "schedule":
            last = len(self.values) - 1
            return lambda count: argument[jnp.minimum(count, last)]
        if self.kind == "numpy":
            return np.float32(self.values[0])
        return self.values[0] if argument is None else argument


@dataclasses.dataclass(frozen=True, repr=False)
class Wrapper(Described):
    """One of `WRAPPERS`, with its static arguments; `numbers` of the program has the others."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Event(NamedTuple):
    """What is unusual about the gradient of a leaf in one step."""

    step: int
    leaf: int
    kind: str


# Outermost first.
WRAPPERS = ("master_weights", "skip", "static", "dynamic", "accumulate", "skip inside", "freeze")


@dataclasses.dataclass(frozen=True, repr=False)
class Program(Described):
    """A training run.

    Attributes:
      tree: the parameters, as `Leaf` or None.
      seed: of the starting values and the gradients.
      steps: how many.
      family: "dense", "lazy" or "deferred".
      numbers: {name: hyperparameter}; the clip, the decay and the average are there if they have
        one.
      options: of scale_by_adam, scale_by_amsgrad (``max_of``) or deferred_adam.
      clip: the name of a clipping transformation.
      decayed: which leaves decay; None for all. `mask` is the form in which they are given.
      rates: the leaves that have the learning rate ``rate_by_path``.
      ema: static options of params_ema, which is inside `lazy` or, if `averages_outside`, after it.
      wrappers: outermost first.
      emits: whether `accumulate` is told when to emit.
      frozen: {leaf: rows}.
      alternative: the leaf that in the steps `alternatives` has no gradient, or a dense one.
      events: unusual gradients.
      transport: (step, what happens to parameters and state before it).
      preset: whether the chain is made by `adam` or `lazy_adam`.
      resumed: whether the moments start from random values, and not from zero.
      measured: whether the norm of the gradients is compared too.
      donated: whether the step gets its buffers to write into.
      optimized: whether the step is compiled as usual; else, faster, with fewer optimizations.
    """

    tree: Any
    seed: int
    steps: int = 6
    family: str = "dense"
    numbers: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    clip: str | None = None
    decayed: tuple[bool, ...] | None = None
    mask: str = "tree"
    rates: tuple[int, ...] = ()
    ema: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    averages_outside: bool = False
    wrappers: tuple[Wrapper, ...] = ()
    emits: bool = False
    frozen: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    alternative: tuple[int, str] | None = None
    alternatives: tuple[int, ...] = ()
    events: tuple[Event, ...] = ()
    transport: tuple[tuple[int, str], ...] = ()
    preset: bool = False
    resumed: bool = False
    measured: bool = False
    donated: bool = False
    optimized: bool = False

    @functools.cached_property
    def leaves(self) -> list[Leaf]:
        return jax.tree.leaves(self.tree)

    @functools.cached_property
    def paths(self) -> list[str]:
        return [at.path_str(path) for path, _ in jax.tree_util.tree_flatten_with_path(self.tree)[0]]

    def structure(self) -> str:
        """What the compiled step depends on."""
        numbers = {
            name: (n.kind, len(n.values)) if n.is_traced else n for name, n in self.numbers.items()
        }
        alike = {"seed": 0, "steps": 0, "alternatives": (), "events": (), "transport": ()}
        return repr(dataclasses.replace(self, numbers=numbers, **alike))

    def number(self, name: str, count: int = 0) -> float:
        return self.numbers[name].at(count)

    def wrapper(self, name: str) -> Wrapper | None:
        return next((w for w in self.wrappers if w.name == name), None)

    @functools.cached_property
    def limited_tables(self) -> list[int]:
        """The leaves that max_row_norm limits."""
        return [i for i, x in enumerate(self.leaves) if x.ids is not None or len(x.shape) > 1]

    @property
    def skips_its_faults(self) -> bool:
        """Whether an infinity or a NaN meets a wrapper that skips it."""
        can_skip = any(w.name in ("skip", "dynamic", "skip inside") for w in self.wrappers)
        return can_skip or not any(event.kind in ("inf", "nan") for event in self.events)

    # The optimizer

    def arguments(self) -> dict[str, jax.Array | None]:
        return {name: n.argument() for name, n in self.numbers.items()}

    def optimizer(self, arguments: Mapping[str, Any]) -> Any:
        """The transformation; `arguments` are the traced hyperparameters."""
        given = {name: n.given(arguments[name]) for name, n in self.numbers.items()}
        tx = self._base(given)
        for wrapper in reversed(self.wrappers):
            tx = self._wrapped(wrapper, tx, given)
        return tx

    def _base(self, given: Mapping[str, Any]) -> Any:
        if self.family == "deferred":
            names = ("learning_rate", "b1", "b2", "eps", "weight_decay")
            options = {"amsgrad": "max_of" in self.options} | dict(self.options)
            adam = at.deferred_adam(
                **{name: given[name] for name in names if name in given},
                weight_decay_mask=self._mask(),
                tables=self._tables(),
                **options,
            )
            if self.clip is None:
                return adam
            return optax.chain(at.lazy(self._clip(given), tables=self._always_by_row()), adam)
        chain = self._preset(given) if self.preset else self._chain(given)
        if self.family == "lazy" and not self.preset:
            chain = at.lazy(chain, tables=self._always_by_row())
        if self.averages_outside:
            chain = optax.chain(chain, at.params_ema(given["ema"], **self.ema))
        return chain

    def _chain(self, given: Mapping[str, Any]) -> Any:
        chain = [] if self.clip is None else [self._clip(given)]
        factory = at.scale_by_amsgrad if "max_of" in self.options else at.scale_by_adam
        names = ("b1", "b2", "eps", "eps_root")
        chain.append(factory(*(given[name] for name in names if name in given), **self.options))
        if "weight_decay" in given:
            chain.append(optax.add_decayed_weights(given["weight_decay"], self._mask()))
        rate = given["learning_rate"]
        if self.rates:
            rules = [([self._pattern(i) for i in self.rates], given["rate_by_path"])]
            chain.append(at.scale_by_path_learning_rate(rules, rate))
        else:
            chain.append(optax.scale_by_learning_rate(rate))
        if "row_norm" in given:
            tables = [self._pattern(i) for i in self.limited_tables]
            chain.append(at.max_row_norm(given["row_norm"], tables=tables))
        if "ema" in given and not self.averages_outside:
            chain.append(at.params_ema(given["ema"], **self.ema))
        return optax.chain(*chain)

    def _preset(self, given: Mapping[str, Any]) -> Any:
        options = dict(given) | dict(self.options)
        options["amsgrad"] = "max_of" in options
        if "clip" in options:
            options[self.clip] = options.pop("clip")
        if self.decayed is not None and "weight_decay" in given:
            options["weight_decay_mask"] = self._mask()
        if "overwrite_every" in self.ema:
            options["ema_overwrite_every"] = self.ema["overwrite_every"]
        for name in OUTSIDE_PRESETS:
            options.pop(name, None)
        if self.family == "lazy":
            return at.lazy_adam(**options, tables=self._always_by_row())
        return at.adam(**options)

    def _tables(self) -> list[str]:
        return [self._pattern(i) for i, leaf in enumerate(self.leaves) if leaf.ids is not None]

    def _always_by_row(self) -> list[str]:
        """The tables of which no step has a dense gradient."""
        return [
            self._pattern(i)
            for i, leaf in enumerate(self.leaves)
            if leaf.ids is not None and self.alternative != (i, "dense")
        ]

    def _clip(self, given: Mapping[str, Any]) -> Any:
        makes = {
            "clip_value": at.clip_by_value,
            "clip_norm": at.clip_by_norm,
            "clip_global_norm": at.clip_by_global_norm,
        }
        return makes[self.clip](given["clip"])

    def _pattern(self, leaf: int) -> str:
        return f"^{re.escape(self.paths[leaf])}$"

    def _mask(self) -> Any:
        if self.decayed is None:
            return None
        if self.mask == "paths" and any(self.decayed):
            return at.path_mask([self._pattern(i) for i, x in enumerate(self.decayed) if x])
        mask = jax.tree.structure(self.tree).unflatten(self.decayed)
        return mask if self.mask == "tree" else lambda _: mask

    def _wrapped(self, wrapper: Wrapper, tx: Any, given: Mapping[str, Any]) -> Any:
        options = dict(wrapper.options)
        if wrapper.name == "master_weights":
            return at.master_weights(tx)
        if wrapper.name in ("skip", "skip inside"):
            return at.skip_nonfinite(tx, **options)
        if wrapper.name == "static":
            return at.static_loss_scale(tx, given["loss_scale"])
        if wrapper.name == "dynamic":
            options |= {"initial_scale": given["loss_scale"], "factor": given["factor"]}
            options |= {"min_scale": given["min_scale"], "max_scale": given["max_scale"]}
            return at.dynamic_loss_scale(tx, **options)
        if wrapper.name == "accumulate":
            like = jax.tree.structure(self.tree).unflatten(map(self._like, self.leaves))
            has_rows = any(leaf.ids is not None for leaf in self.leaves)
            every = given["every"] if callable(given["every"]) else int(given["every"])
            return at.accumulate(tx, every, like=like if has_rows else None, **options)
        rows = {self._pattern(i): list(rows) for i, rows in self.frozen.items()}
        return at.freeze_rows(tx, rows)

    def _like(self, leaf: Leaf) -> Any:
        if leaf.ids is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.gradient_dtype)
        values = jnp.zeros((leaf.ids, *leaf.shape[1:]), leaf.gradient_dtype)
        return at.SparseRows(np.zeros(leaf.ids, np.int32), values, leaf.shape[0])

    # Values

    def start(self) -> list[np.ndarray]:
        return [self._normal(leaf.shape, leaf.dtype, i) for i, leaf in enumerate(self.leaves)]

    def moment(self, leaf: int, name: str) -> np.ndarray:
        """What mu, nu or nu_max starts from, if the program is `resumed`."""
        x = self.leaves[leaf]
        real = "float32" if name != "mu" and x.dtype == "complex64" else x.dtype
        start = self._normal(x.shape, real, 5, leaf)
        return start if name == "mu" else np.square(start.astype(np.float32)) + 0.1

    def kind_of(self, step: int, leaf: int) -> str:
        """Whether this gradient is "none", "dense" or "rows"."""
        if self.alternative is not None and self.alternative[0] == leaf:
            if step in self.alternatives:
                return self.alternative[1]
        return "dense" if self.leaves[leaf].ids is None else "rows"

    def gradient(self, step: int, leaf: int, scale: float) -> Any:
        """An array, (ids, values) or None; all are multiplied by `scale`, the loss scale."""
        kind, shape = self.kind_of(step, leaf), self.leaves[leaf].shape
        if kind == "none":
            return None
        dtype = self.leaves[leaf].gradient_dtype
        events = [e.kind for e in self.events if e[:2] == (step, leaf)]
        rng = np.random.default_rng([self.seed, 1, step, leaf])
        ids = None
        if kind == "rows":
            ids = self._ids(rng, leaf, events)
            shape = (ids.size, *shape[1:])
        size = scale * 10 ** rng.uniform(-1.5, 1.5)
        if dtype == "float16":
            size = min(size, 1e3)
        values = self._normal(shape, dtype, 2, step, leaf, size=size)
        for event in events:
            values = _changed(values, event, rng)
        if not self.extra_arguments(step).get("weight", 1.0) and rng.random() < 0.5:
            values = np.full_like(values, np.nan)  # the mean over no tokens
        if ids is None:
            return values
        # What stands at padding means nothing.
        is_padding = (ids < 0) | (ids >= self.leaves[leaf].shape[0])
        values[is_padding] = np.nan
        return ids, values

    def _ids(self, rng: Any, leaf: int, events: list[str]) -> np.ndarray:
        num_rows, n = self.leaves[leaf].shape[0], self.leaves[leaf].ids
        outside = np.array([num_rows, -1, num_rows + 3, -num_rows, 2**31 - 1], np.int32)
        if self.leaves[leaf].unique:
            inside = rng.permutation(num_rows)[:n]
        else:
            inside = np.floor(num_rows * rng.random(n) ** 2)
        ids = np.resize(inside, n).astype(np.int32) if num_rows else rng.choice(outside, n)
        at_padding = rng.random(n) < (1.0 if "empty" in events else 0.2)
        if self.leaves[leaf].unique:
            at_padding |= np.arange(n) >= num_rows
        if "same row" in events and not self.leaves[leaf].unique:
            ids[:] = ids[:1]
        return np.where(at_padding, rng.choice(outside, n), ids).astype(np.int32)

    def extra_arguments(self, step: int) -> dict[str, Any]:
        """What `update` gets beside the gradients."""
        accumulate, rng = self.wrapper("accumulate"), np.random.default_rng([self.seed, 4, step])
        if accumulate is None:
            return {}
        extra: dict[str, Any] = {}
        weight, emit = rng.choice([0.0, 1.0, 3.0, 7.5, 120.0]), rng.random() < 0.25
        if accumulate.options.get("weighted"):
            extra["weight"] = np.float32(weight)
        if self.emits:
            extra["emit"] = np.bool_(emit)
        return extra

    def _normal(self, shape: Any, dtype: str, *key: int, size: float = 1.0) -> np.ndarray:
        rng = np.random.default_rng([self.seed, *key])
        x = rng.standard_normal(shape) * size
        if dtype == "complex64":
            x = x + 1j * rng.standard_normal(shape) * size
        return np.asarray(x).astype(jnp.dtype(dtype))


OUTSIDE_PRESETS = ("loss_scale", "factor", "min_scale", "max_scale", "every")


def _changed(values: np.ndarray, event: str, rng: Any) -> np.ndarray:
    """A gradient with something unusual in it."""
    if event in ("empty", "same row") or values.size == 0:
        return values
    if event == "zero":
        return np.zeros_like(values)
    if event == "tiny":
        return (
            (values.astype(np.complex128) * 1e-25).astype(values.dtype)
            if np.iscomplexobj(values)
            else (values.astype(np.float64) * 1e-25).astype(values.dtype)
        )
    values = values.copy()
    place = rng.integers(values.size)
    sign = rng.choice([-1.0, 1.0])
    values.reshape(-1)[place] = {
        "inf": sign * np.inf,
        "nan": np.nan,
        "huge": sign * 1e25,
        "large": sign * 10 ** rng.uniform(18, 21),
    }[event]
    return values


# Drawing

# Programs in a row of one structure, whose steps are compiled once.
ALIKE = 4

DENSE_SHAPES = [(), (3,), (2, 3), (1, 1, 2), (0,), (2, 0)]
ROWS_OF_TABLES, TAILS_OF_TABLES = [6, 9, 5, 1, 0], [(2,), (3,), (), (2, 2)]
DTYPES = ["float32"] * 6 + ["bfloat16", "float16", "complex64"]
# (b1, b2) for deferred_adam, whose momentum is spent within MAX_IDLE steps.
DEFERRED_BETAS = [(0.9, 0.999), (0.9, 0.95), (0.5, 0.9), (0.0, 0.9), (0.9, 0.99)]
MAX_IDLE = 500
CHOICES = {
    "b1": [0.9, 0.0, 0.5, 0.99, 0.3],
    "b2": [0.999, 0.9, 0.5, 0.9999, 0.97],
    "eps": [1e-8, 1e-3, 1e-12, 0.3],
    "eps_root": [1e-8, 1e-2],
    "learning_rate": [1e-3, 0.1, 1.0, 0.02],
    "rate_by_path": [1e-2, 0.5],
    "weight_decay": [1e-2, 0.3],
    "clip": [1.0, 0.1, 20.0],
    "ema": [0.9, 0.5, 0.99, 0.0, 0.2],
    "loss_scale": [1024.0, 32768.0, 1.0, 300.0],
    "factor": [2.0, 4.0, 1.5],
    "min_scale": [1.0, 500.0],
    "max_scale": [2.0**24, 50000.0],
    "every": [2, 1, 3],
    "row_norm": [1.0, 0.2, 5.0],
}


def draw(seed: int) -> Program:
    """The program of this number; `ALIKE` numbers in a row share their structure."""
    program = _draw_structure(np.random.default_rng([seed // ALIKE, 0]))
    rng = np.random.default_rng([seed, 1])
    numbers = {
        name: Number(n.kind, _values(rng, name, len(n.values))) if n.is_traced else n
        for name, n in program.numbers.items()
    }
    scanned = next((step for step, how in program.transport if how == "scan"), program.steps)
    steps = program.steps if scanned < program.steps else int(rng.integers(3, 12))
    transport = program.transport or _draw_transport(rng, program, steps)
    alternatives = ()
    if program.alternative is not None:
        alternatives = tuple(t for t in range(min(steps, scanned)) if rng.random() < 0.3)
    return dataclasses.replace(
        program,
        seed=seed,
        numbers=numbers,
        steps=steps,
        transport=transport,
        alternatives=alternatives,
        events=_draw_events(rng, program, steps),
    )


def _draw_structure(rng: np.random.Generator) -> Program:
    def happens(probability: float) -> bool:
        return bool(rng.random() < probability)

    family = _pick(rng, ["dense"] * 4 + ["lazy"] * 4 + ["deferred"] * 3)
    tree = _draw_tree(rng, family)
    leaves = jax.tree.leaves(tree)
    options: dict[str, Any] = {}
    names = ["b1", "b2", "eps", "learning_rate"]
    if happens(0.4):
        options["max_of"] = _pick(rng, ["raw", "corrected"])
    if happens(0.3) and options.get("max_of") != "corrected":
        options["eps_hat"] = True
    if happens(0.2):
        options["mu_dtype"] = _pick(rng, ["float32", "bfloat16"])
        if any(leaf.dtype == "complex64" for leaf in leaves):
            del options["mu_dtype"]
    if happens(0.15):
        options["nu_dtype"] = _pick(rng, ["float32", "bfloat16"])
    if family == "deferred":
        options["max_idle"] = MAX_IDLE
    else:
        names += ["eps_root"] * happens(0.2)
        if "max_of" not in options:
            options |= {"nesterov": True} if happens(0.4) else {}

    has_corrected = options.get("max_of") == "corrected"  # whose maximum moves idle rows at first
    clip = _pick(rng, ["clip_value", "clip_norm", "clip_global_norm"]) if happens(0.5) else None
    names += ["clip"] * (clip is not None)
    has_decay, has_ema = happens(0.4), family != "deferred" and happens(0.35)
    names += ["weight_decay"] * has_decay + ["ema"] * has_ema
    decayed = tuple(happens(0.6) for _ in leaves) if has_decay and happens(0.6) else None
    preset = family != "deferred" and happens(0.3)
    rates, ema = (), {}
    if has_ema and family == "dense":
        ema |= {"overwrite_every": int(rng.integers(1, 4))} if happens(0.5) else {}
    if not preset:
        if "max_of" in options and family != "deferred":
            options |= {f"bias_correction_{x}": False for x in ("mu", "nu") if happens(0.15)}
        if family != "deferred" and happens(0.15):
            rates = tuple(i for i in range(len(leaves)) if happens(0.5))
            names += ["rate_by_path"] * bool(rates)
        if has_ema:
            ema |= _pick(rng, [{}, {"debias": True}, {"initial": "params"}])
            real = all(leaf.dtype != "complex64" for leaf in leaves)
            ema |= {"ema_dtype": "bfloat16"} if real and happens(0.15) else {}
        is_limited = any(leaf.ids is not None or len(leaf.shape) > 1 for leaf in leaves)
        if family != "deferred" and is_limited and happens(0.15):
            names.append("row_norm")

    frozen = {}
    if happens(0.3) and not (family == "deferred" and has_decay):
        for i, leaf in enumerate(leaves):
            if leaf.shape and leaf.shape[0] and happens(0.6):
                rows = [r for r in range(leaf.shape[0]) if happens(0.4)]
                frozen[i] = tuple(rows) or (0,)
    wrappers = _draw_wrappers(rng, family, leaves, bool(frozen))
    has = {w.name for w in wrappers}
    names += ["loss_scale"] * bool(has & {"static", "dynamic"})
    names += ["factor", "min_scale", "max_scale"] * ("dynamic" in has)
    names += ["every"] * ("accumulate" in has)

    alternative = None
    if happens(0.25):
        i = int(rng.integers(len(leaves)))
        kinds = ["none", "dense"] if leaves[i].ids is not None else ["none"]
        alternative = (i, "none" if "accumulate" in has else _pick(rng, kinds))
    scan_from = int(rng.integers(1, 4)) if happens(0.1) else None
    program = Program(
        tree=tree,
        seed=0,
        steps=8,
        family=family,
        options=options,
        clip=clip,
        decayed=decayed,
        mask=_pick(rng, ["tree", "function", "paths"]),
        rates=rates,
        ema=ema,
        wrappers=wrappers,
        frozen=frozen,
        alternative=alternative,
        transport=() if scan_from is None else ((scan_from, "scan"),),
        preset=preset,
        averages_outside=family == "lazy" and has_ema and not preset and happens(0.5),
        emits="accumulate" in has and happens(0.3),
        resumed=happens(0.7 if frozen else 0.3)
        and not (family == "deferred" and (frozen or has_corrected)),
        measured=happens(0.2),
        donated=happens(0.4),
        optimized=happens(0.1),
    )
    return dataclasses.replace(program, numbers=_draw_numbers(rng, program, names))


def _draw_tree(rng: np.random.Generator, family: str) -> Any:
    leaves: list[Any] = [_draw_leaf(rng, family, False) for _ in range(rng.integers(0, 3))]
    if family != "dense" or not leaves:
        leaves += [_draw_leaf(rng, family, family != "dense") for _ in range(rng.integers(1, 3))]
    if rng.random() < 0.2:
        leaves.append(None)
    rng.shuffle(leaves)
    while len(leaves) > 1 or rng.random() < 0.3:
        n = int(rng.integers(1, len(leaves) + 1))
        some, leaves = leaves[:n], leaves[n:]
        keys = rng.permutation(list("abcde"))[:n]
        node: Any = _pick(
            rng, [list(some), tuple(some), dict(zip(keys.tolist(), some, strict=False))]
        )
        if n == 2 and rng.random() < 0.5:
            node = Pair(*some)
        leaves.insert(int(rng.integers(len(leaves) + 1)), node)
    return leaves[0]


def _draw_leaf(rng: np.random.Generator, family: str, is_table: bool) -> Leaf:
    dtype = _pick(rng, DTYPES)
    if is_table and family == "deferred" and dtype == "complex64":
        dtype = "float32"
    gradient_dtype = dtype
    if rng.random() < 0.15:
        gradient_dtype = {"float32": "bfloat16", "bfloat16": "float32"}.get(dtype, dtype)
    if not is_table:
        return Leaf(_pick(rng, DENSE_SHAPES), dtype, gradient_dtype)
    num_rows = 40 if family == "deferred" and rng.random() < 0.6 else _pick(rng, ROWS_OF_TABLES)
    ids, unique = int(rng.choice([4, 1, 7, 0], p=[0.5, 0.2, 0.2, 0.1])), rng.random() < 0.2
    shape = (num_rows, *_pick(rng, TAILS_OF_TABLES))
    return Leaf(shape, dtype, gradient_dtype, ids, bool(unique))


def _draw_wrappers(
    rng: np.random.Generator, family: str, leaves: list[Leaf], frozen: bool
) -> tuple[Wrapper, ...]:
    is_low = [leaf.dtype in ("bfloat16", "float16") for leaf in leaves]
    deferred = family == "deferred"
    low_tables = any(low and x.ids is not None for low, x in zip(is_low, leaves, strict=True))
    chosen: dict[str, dict[str, Any]] = {}
    if rng.random() < (0.5 if any(is_low) else 0.1) and not (deferred and low_tables):
        chosen["master_weights"] = {}
    if rng.random() < 0.25:
        chosen["skip"] = {"max_consecutive": 2} if rng.random() < 0.2 else {}
    scale = _pick(rng, ["static", "dynamic", None, None])
    if scale is not None:
        chosen[scale] = {}
        if scale == "dynamic":
            chosen[scale] = {"growth_interval": int(rng.integers(1, 4))}
    if rng.random() < 0.35:
        chosen["accumulate"] = {"average": rng.random() < 0.7}
        if rng.random() < 0.3:
            chosen["accumulate"]["weighted"] = True
        if rng.random() < 0.1 and all(leaf.dtype != "complex64" for leaf in leaves):
            chosen["accumulate"]["accumulator_dtype"] = "bfloat16"
        if rng.random() < 0.2:
            chosen["skip inside"] = {}
    if frozen:
        chosen["freeze"] = {}
    return tuple(Wrapper(name, chosen[name]) for name in WRAPPERS if name in chosen)


def _draw_numbers(
    rng: np.random.Generator, program: Program, names: list[str]
) -> dict[str, Number]:
    has_rows = any(leaf.ids is not None for leaf in program.leaves)

    def kind_of(name: str) -> str:
        kinds = ["number"] * 5 + ["array"] * 3 + ["numpy"]
        if name == "every":
            return "number" if has_rows else _pick(rng, ["number", "schedule"])
        if name == "ema" and program.family == "lazy":
            return "number"
        if name in ("b1", "b2", "eps", "learning_rate", "rate_by_path", "weight_decay", "ema"):
            kinds += ["schedule"] * 3
        if program.family == "deferred":
            if name in ("b1", "b2", "eps"):
                return "number"
            if name == "weight_decay":
                kinds = ["number", "array"]
        return _pick(rng, kinds)

    numbers = {}
    for name in names:
        kind = kind_of(name)
        values = _values(rng, name, int(rng.integers(2, 6)) if kind == "schedule" else 1)
        numbers[name] = Number(kind, values)
    if program.family == "deferred":
        for name, value in zip(("b1", "b2"), _pick(rng, DEFERRED_BETAS), strict=True):
            numbers[name] = Number("number", (value,))
    return numbers


def _values(rng: np.random.Generator, name: str, count: int) -> tuple[float, ...]:
    choices = CHOICES[name]
    first = 0.5 if len(choices) > 2 else 1 / len(choices)
    rest = (1 - first) / (len(choices) - 1)
    p = [first] + [rest] * (len(choices) - 1)
    return tuple(float(x) for x in rng.choice(choices, count, p=p))


def _draw_transport(
    rng: np.random.Generator, program: Program, steps: int
) -> tuple[tuple[int, str], ...]:
    kinds = ["pickle", "numpy", "tree", "transfer"]
    kinds += ["flush accumulated"] * (program.wrapper("accumulate") is not None)
    kinds += ["flush", "catch up"] * 2 * (program.family == "deferred")
    found = [(t, _pick(rng, kinds)) for t in range(steps) if rng.random() < 0.15]
    if rng.random() < 0.01:
        found.append((steps - 1, "eager"))
    return tuple(found)


def _draw_events(rng: np.random.Generator, program: Program, steps: int) -> tuple[Event, ...]:
    events = []
    names = {w.name for w in program.wrappers}
    for leaf, x in enumerate(program.leaves):
        kinds = ["zero", "tiny"] + ["empty", "same row"] * (x.ids is not None)
        if "float16" not in (x.dtype, x.gradient_dtype):
            kinds += ["huge", "large"]
        if names & {"skip", "dynamic", "skip inside"}:
            # An infinity that is let through makes NaN in different ways.
            limited = any("max_consecutive" in w.options for w in program.wrappers)
            kinds += ["nan"] * 6 if limited else ["inf", "nan"] * 3
        for step in range(steps):
            if rng.random() < 0.1:
                events.append(Event(step, leaf, _pick(rng, kinds)))
    return tuple(events)


def _pick(rng: np.random.Generator, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]
