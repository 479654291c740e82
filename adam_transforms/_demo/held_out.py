"""The held-out loss: over the full vocabulary, at words of files that training does not read."""

from typing import Any

import jax
import numpy as np

from adam_transforms._core.types import Params
from adam_transforms._demo.corpus import Corpus, contexts
from adam_transforms._demo.model import NextWord
from adam_transforms._demo.softmax import full_softmax_loss

EVALUATED = 4096  # held-out words, evenly spaced
CHUNK = 512  # words evaluated at once; bounds the (CHUNK, vocabulary) logits


class HeldOut:
    """The held-out words of a corpus, and a model's loss at them; compiled once."""

    def __init__(self, corpus: Corpus, model: NextWord, word_rows: np.ndarray) -> None:
        stream = corpus.held_out
        positions = corpus.positions(stream)
        spread = np.linspace(0, len(positions) - 1, min(EVALUATED, len(positions)))
        evaluated = positions[spread.astype(np.int64)]
        self._contexts = contexts(stream, evaluated)
        self._targets = stream[evaluated]
        self._frequency = model.frequency
        self._word_rows = word_rows

        @jax.jit
        def word_vectors(params: Params, rows: jax.Array) -> Any:
            return model.apply(params, rows, method="word_vectors")

        @jax.jit
        def losses(params: Params, vectors: jax.Array, contexts: jax.Array, targets: jax.Array):
            logits: Any = model.apply(params, vectors[contexts], method="logits")
            return full_softmax_loss(logits, targets)

        self._word_vectors, self._losses = word_vectors, losses

    def __len__(self) -> int:
        return len(self._targets)

    def loss(self, params: Params) -> float:
        """The mean cross entropy in nats a word."""
        vectors = self._word_vectors(params, self._word_rows)
        chunks = [slice(start, start + CHUNK) for start in range(0, len(self), CHUNK)]
        return float(
            np.concatenate(
                [self._losses(params, vectors, self._contexts[c], self._targets[c]) for c in chunks]
            ).mean()
        )

    def unigram_loss(self) -> float:
        """`loss` of the unigram model, which ignores the context."""
        return float(-np.log(self._frequency[self._targets]).mean())
