"""Trains with one optimizer and measures loss, time and memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adam_transforms as at
from adam_transforms._core.types import Params, State
from adam_transforms._demo import CONTEXT, NEGATIVES
from adam_transforms._demo.corpus import Corpus
from adam_transforms._demo.model import NextWord
from adam_transforms._demo.ngrams import ngram_rows
from adam_transforms._demo.optimizers import Optimizer
from adam_transforms._demo.softmax import draw_log_uniform, full_softmax_loss

EVALUATED = 4096  # held-out words, evenly spaced
CHUNK = 512  # words evaluated at once; bounds the (CHUNK, vocabulary) logits


class Batch(NamedTuple):
    """The arguments of the model's loss."""

    context_rows: np.ndarray
    targets: np.ndarray
    negatives: np.ndarray


@dataclass(frozen=True)
class Result:
    """The measurements of one optimizer's training."""

    losses: np.ndarray  # (steps,) sampled-softmax training losses in nats
    milliseconds: np.ndarray  # (steps,), without compilation
    compile_seconds: float
    state_bytes: int
    held_out_loss: float  # nats a word, over the full vocabulary
    params: Params  # after training and `settle`


class Problem:
    """The task of every optimizer: the model, its initial parameters and the batches."""

    def __init__(self, corpus: Corpus, *, rows: int, dim: int, batch: int, seed: int) -> None:
        self.corpus = corpus
        self.batch = batch
        self.seed = seed
        self.word_rows = ngram_rows(corpus.words, rows)
        smoothed = corpus.counts + 1  # a word may be missing from the training files
        self.frequency = smoothed / smoothed.sum()
        self.model = NextWord(rows, dim, self.frequency)
        positions = corpus.positions(corpus.held_out)
        spread = np.linspace(0, len(positions) - 1, min(EVALUATED, len(positions)))
        self.evaluated = positions[spread.astype(np.int64)]

    def init_params(self) -> Params:
        """The initial parameters. Each call returns new arrays, because training donates them."""
        return jax.jit(self.model.init)(jax.random.key(self.seed), *next(self.batches()))

    def batches(self) -> Iterator[Batch]:
        """Endless random batches, the same at each call."""
        generator = np.random.default_rng(self.seed)
        stream = self.corpus.train
        positions = self.corpus.positions(stream)
        while True:
            chosen = generator.choice(positions, self.batch)
            yield Batch(
                self.word_rows[_contexts(stream, chosen)],
                stream[chosen],
                draw_log_uniform(generator, NEGATIVES, len(self.corpus.words)),
            )

    def held_out_loss(self, params: Params) -> float:
        """The mean cross entropy of the held-out words over the full vocabulary, in nats."""
        model, stream = self.model, self.corpus.held_out

        @jax.jit
        def losses(params: Params, vectors: jax.Array, ids: jax.Array, targets: jax.Array):
            logits: Any = model.apply(params, vectors[ids], method="logits")
            return full_softmax_loss(logits, targets)

        vectors = jax.jit(lambda params, rows: model.apply(params, rows, method="word_vectors"))(
            params, self.word_rows
        )
        chunks = np.array_split(self.evaluated, range(CHUNK, len(self.evaluated), CHUNK))
        return float(
            np.concatenate(
                [losses(params, vectors, _contexts(stream, c), stream[c]) for c in chunks]
            ).mean()
        )

    def unigram_loss(self) -> float:
        """`held_out_loss` of the unigram model, which ignores the context."""
        return float(-np.log(self.frequency[self.corpus.held_out[self.evaluated]]).mean())


def train(
    problem: Problem,
    optimizer: Optimizer,
    learning_rate: float,
    steps: int,
    on_step: Callable[[float, float], None] = lambda loss, milliseconds: None,
) -> Result:
    """Trains from the initial parameters; calls ``on_step(loss, milliseconds)`` at each step."""
    transform = optimizer.make(learning_rate)

    def step(params: Params, state: State, batch: Batch) -> tuple[Params, State, jax.Array]:
        value_and_grad = optimizer.value_and_grad(problem.model.apply, state)
        loss, gradients = value_and_grad(params, *batch)
        updates, state = transform.update(gradients, state, params)
        return at.apply_updates(params, updates), state, loss

    params = problem.init_params()
    state = jax.jit(transform.init)(params)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    batches = problem.batches()
    start = perf_counter()
    # Ahead of time, so that step times contain no compilation.
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, next(batches)).compile()
    compile_seconds = perf_counter() - start

    losses, milliseconds = np.empty(steps), np.empty(steps)
    for i, batch in zip(range(steps), problem.batches(), strict=False):
        start = perf_counter()
        params, state, loss = jax.block_until_ready(compiled(params, state, batch))
        losses[i], milliseconds[i] = float(loss), 1e3 * (perf_counter() - start)
        on_step(losses[i], milliseconds[i])

    params, state = optimizer.settle(params, state)
    held_out_loss = problem.held_out_loss(optimizer.finalize(params, state))
    return Result(losses, milliseconds, compile_seconds, state_bytes, held_out_loss, params)


@jax.jit
def largest_difference(params: Params, others: Params) -> jax.Array:
    """The largest absolute difference between two trees of parameters."""
    differences = jax.tree.map(lambda p, q: jnp.abs(p - q).max(), params, others)
    return jnp.stack(jax.tree.leaves(differences)).max()


def _contexts(stream: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(positions, CONTEXT): the ids before each of these positions of a stream."""
    return stream[positions[:, None] + np.arange(-CONTEXT, 0)[None, :]]
