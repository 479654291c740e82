"""Training with several optimizers at once, in turns of one step, each with its own clock."""

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import jax
import numpy as np

import adam_transforms as at
from adam_transforms._core.types import Params, State
from adam_transforms._demo.optimizers import Optimizer
from adam_transforms._demo.problem import Batch, Problem

EVALUATIONS = 10  # of the held-out loss, after the one at the start


@dataclass(frozen=True)
class Result:
    """The measurements of one optimizer's training."""

    losses: np.ndarray  # (steps,) sampled-softmax training losses in nats
    milliseconds: np.ndarray  # (steps,), without compilation
    compile_seconds: float
    state_bytes: int
    evaluated_after: np.ndarray  # (evaluations,) numbers of steps, from 0 to all
    held_out_losses: np.ndarray  # (evaluations,) nats a word, over the full vocabulary
    params: Params  # those of the last evaluation

    @property
    def held_out_loss(self) -> float:
        """The loss after training."""
        return float(self.held_out_losses[-1])

    @property
    def step_milliseconds(self) -> float:
        return float(np.median(self.milliseconds))

    @property
    def seconds(self) -> np.ndarray:
        """(evaluations,) seconds of training before each evaluation."""
        return np.concatenate([[0.0], np.cumsum(self.milliseconds) / 1e3])[self.evaluated_after]


class Observer:
    """Is told of the progress of `train`; this one ignores it."""

    def on_step(self, name: str, loss: float, milliseconds: float) -> None:
        """After each step of an optimizer, with its training loss and its time."""

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """After `step` steps of all optimizers, with their held-out losses."""


def train(
    problem: Problem,
    optimizers: Mapping[str, Optimizer],
    learning_rate: float,
    steps: int,
    observer: Observer | None = None,
) -> dict[str, Result]:
    """Trains with each optimizer, from the same parameters and on the same batches.

    The optimizers take turns of one step, so that a disturbance of the machine hits all alike. The
    order within a turn is random: each step runs after every other equally often, with the caches
    that it left. Batches are made, and held-out losses computed, while no clock runs.
    """
    observer = Observer() if observer is None else observer
    runs = {name: _Run(problem, item, learning_rate) for name, item in optimizers.items()}
    evaluated_after = np.unique(np.linspace(0, steps, EVALUATIONS + 1).round().astype(int))
    orders = np.random.default_rng(problem.seed)
    for step, batch in zip(range(steps + 1), problem.batches(), strict=False):
        if step in evaluated_after:
            observer.on_evaluation(step, {name: run.evaluate() for name, run in runs.items()})
        if step < steps:
            batch = jax.block_until_ready(jax.device_put(batch))
            for index in orders.permutation(len(runs)):
                name = [*runs][index]
                observer.on_step(name, *runs[name].step(batch))
    return {name: run.result(evaluated_after) for name, run in runs.items()}


class _Run:
    """The training with one optimizer; its clock runs in `step` alone."""

    def __init__(self, problem: Problem, optimizer: Optimizer, learning_rate: float) -> None:
        transform = optimizer.make(learning_rate)

        def step(params: Params, state: State, batch: Batch) -> tuple[Params, State, jax.Array]:
            value_and_grad = optimizer.value_and_grad(problem.model.apply, state)
            loss, gradients = value_and_grad(params, *batch)
            params, state = at.update_and_apply(transform, gradients, state, params)
            return params, state, loss

        self._held_out, self._finalize = problem.held_out, jax.jit(optimizer.finalize)
        self._params = problem.init_params()
        self._state = jax.jit(transform.init)(self._params)
        self._losses: list[float] = []
        self._milliseconds: list[float] = []
        self._held_out_losses: list[float] = []
        start = perf_counter()
        # Ahead of time, so that step times contain no compilation.
        self._step = (
            jax.jit(step, donate_argnums=(0, 1))
            .lower(self._params, self._state, next(problem.batches()))
            .compile()
        )
        self._compile_seconds = perf_counter() - start

    def step(self, batch: Batch) -> tuple[float, float]:
        """Takes a step and returns its training loss and its milliseconds."""
        start = perf_counter()
        self._params, self._state, loss = jax.block_until_ready(
            self._step(self._params, self._state, batch)
        )
        self._milliseconds.append(1e3 * (perf_counter() - start))
        self._losses.append(float(loss))
        return self._losses[-1], self._milliseconds[-1]

    def evaluate(self) -> float:
        """Computes the held-out loss."""
        params = self._finalize(self._params, self._state)
        self._held_out_losses.append(self._held_out.loss(params))
        return self._held_out_losses[-1]

    def result(self, evaluated_after: np.ndarray) -> Result:
        return Result(
            losses=np.array(self._losses),
            milliseconds=np.array(self._milliseconds),
            compile_seconds=self._compile_seconds,
            state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(self._state)),
            evaluated_after=evaluated_after,
            held_out_losses=np.array(self._held_out_losses),
            params=self._finalize(self._params, self._state),
        )
