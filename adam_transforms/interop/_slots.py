"""What an optimizer state keeps that other systems keep too, found in it and read from it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_transforms._core import trees
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._embeddings.deferred.state import DeferredAdamState
from adam_transforms._transforms.accumulation import AccumulateState
from adam_transforms._transforms.adam import ScheduledDecayState
from adam_transforms._transforms.ema import ParamsEmaState
from adam_transforms._transforms.loss_scaling import DynamicLossScaleState

ADAM: Any = (optax.ScaleByAdamState, optax.ScaleByAmsgradState, DeferredAdamState)
ACCUMULATIONS: Any = (AccumulateState, optax.MultiStepsState)


class Contents(NamedTuple):
    """What is brought to a state, or read from it.

    Attributes:
      count: updates made, Adam's count.
      slots: {path: {slot: array}}; the slots are mu, nu, nu_max, ema (of `params_ema`) and acc
        (of `accumulate`, the sum of the cycle so far).
      calls: steps made where one update takes several of them; None if that is not known.
      mini_step: gradients received in this cycle of an accumulation.
      scale, finite_steps: of a dynamic loss scale; None without.
    """

    count: int
    slots: Mapping[str, Mapping[str, Any]]
    calls: int | None = None
    mini_step: int = 0
    scale: Any = None
    finite_steps: int = 0


def fresh(tx: Any, params: Any) -> Any:
    """``tx.init(params)``, known to keep Adam's moments."""
    if isinstance(tx, type) or not callable(getattr(tx, "init", None)):
        raise TypeError(f"tx must be a gradient transformation or an optimizer, got {tx!r}")
    state = tx.init(params)
    _adam_states(state)
    return state


def slots_of(state: Any, *, ema: bool = False, acc: bool = False) -> dict[str, dict[str, Any]]:
    """{path: {slot: leaf}}, of Adam's moments and on demand of averages and accumulators.

    Raises:
      ValueError: two states keep the same slot of a parameter, or nothing is kept by Adam's rule.
    """
    slots: dict[str, dict[str, Any]] = {}
    for slot, tree in _slot_trees(state, ema, acc):
        for path, leaf in trees.flatten_with_paths(tree)[0]:
            if leaf is None:
                continue
            if slots.setdefault(path, {}).setdefault(slot, leaf) is not leaf:
                raise ValueError(f"the state holds two slots {slot} of {path!r}")
    return slots


def has(state: Any, kind: Any) -> bool:
    """Whether there is a state of this kind anywhere."""
    return bool(trees.find_states(state, kind))


def read(state: Any, params: Any) -> Contents:
    """What a state holds, as NumPy arrays.

    Raises:
      ValueError: there is no Adam state, or several that disagree; it is not that of `params`; it
        owes steps.
    """
    adams = _adam_states(state)
    counts = sorted({int(adam.count) for adam in adams})
    if len(counts) > 1:
        raise ValueError(f"the state's Adams have made different numbers of steps: {counts}")
    for adam in adams:
        _check_paid(adam)
    for average in trees.find_states(state, ParamsEmaState):
        if float(average.weight) != 1.0:
            raise ValueError(
                "the state has an average with debias=True, which is kept nowhere else"
            )
    mini_step = 0
    for found in trees.find_states(state, ACCUMULATIONS):
        mini_step = int(found.mini_step)
        if mini_step and isinstance(found, optax.MultiStepsState):
            raise ValueError("a cycle of optax.MultiSteps is under way; at.accumulate can be read")
    slots = slots_of(state, ema=True, acc=True)
    _check_params(slots, params)
    for path, of_path in slots.items():
        if "acc" in of_path and mini_step == 0:  # what it holds then means nothing
            of_path["acc"] = np.zeros(of_path["acc"].shape, of_path["acc"].dtype)
        if isinstance(of_path.get("acc"), SparseRows):
            raise ValueError(by_rows(path))
    arrays = {path: {s: np.array(x) for s, x in of.items()} for path, of in slots.items()}
    contents = Contents(counts[0], arrays, mini_step=mini_step)
    for found in trees.find_states(state, DynamicLossScaleState):
        contents = contents._replace(
            scale=np.array(found.scale), finite_steps=int(found.finite_steps)
        )
    return contents


def _adam_states(state: Any) -> list[Any]:
    if has(state, ScheduledDecayState):
        raise ValueError(
            "tx has a schedule for b1 or b2, and so keeps a running product of their values, which "
            "is not known here: use numbers"
        )
    found = trees.find_states(state, ADAM)
    if not found:
        raise ValueError(
            "the state of tx holds no Adam: none of optax.ScaleByAdamState, "
            "optax.ScaleByAmsgradState and DeferredAdamState"
        )
    return found


def _slot_trees(state: Any, ema: bool, acc: bool) -> Iterator[tuple[str, Any]]:
    for found in _adam_states(state):
        for slot in ("mu", "nu", "nu_max"):
            if getattr(found, slot, None) is not None:
                yield slot, getattr(found, slot)
    for found in trees.find_states(state, ParamsEmaState) if ema else ():
        yield "ema", found.ema
    for found in trees.find_states(state, AccumulateState) if acc else ():
        yield "acc", found.acc


# ---- checks -------------------------------------------------------------------------------------


def _check_paid(adam: Any) -> None:
    for group in (getattr(adam, "idle", None), getattr(adam, "idle_decayed", None)):
        for last in jax.tree.leaves(None if group is None else group.last_step):
            if np.any(np.asarray(last) != np.asarray(adam.count)):
                raise ValueError(
                    "the state owes steps to idle rows: flush(params, state) first, and go on with "
                    "the parameters that it returns too"
                )


def by_rows(path: str) -> str:
    return f"a cycle of accumulation is under way, in which {path!r} is accumulated by rows"


def _check_params(slots: Mapping[str, Mapping[str, Any]], params: Any) -> None:
    leaves = trees.flatten_with_paths(params)[0]
    shapes = {path: jnp.shape(p) for path, p in leaves if p is not None}
    for path, of_path in slots.items():
        for slot, leaf in of_path.items():
            if shapes.get(path) != leaf.shape:
                theirs = "is not there" if path not in shapes else f"has shape {list(shapes[path])}"
                raise ValueError(
                    f"the state is not that of params: {path!r} {theirs}, "
                    f"but its {slot} has shape {list(leaf.shape)}"
                )
