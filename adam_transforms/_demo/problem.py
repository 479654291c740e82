"""The task of every optimizer: the model, its initial parameters and the batches."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from adam_transforms._core.types import Params
from adam_transforms._demo import NEGATIVES
from adam_transforms._demo.corpus import Corpus, contexts
from adam_transforms._demo.held_out import HeldOut
from adam_transforms._demo.model import NextWord
from adam_transforms._demo.ngrams import ngram_rows
from adam_transforms._demo.softmax import draw_log_uniform


class Batch(NamedTuple):
    """The arguments of the model's loss."""

    context_rows: np.ndarray
    targets: np.ndarray
    negatives: np.ndarray


class Problem:
    """A corpus, a model of its next word, and a seed for the parameters and the batches."""

    def __init__(self, corpus: Corpus, *, rows: int, dim: int, batch: int, seed: int) -> None:
        self.corpus = corpus
        self.batch = batch
        self.seed = seed
        self.word_rows = ngram_rows(corpus.words, rows)
        smoothed = corpus.counts + 1  # a word may be missing from the training files
        self.model = NextWord(rows, dim, smoothed / smoothed.sum())
        self.held_out = HeldOut(corpus, self.model, self.word_rows)
        self._init = jax.jit(self.model.init)

    def init_params(self) -> Params:
        """The initial parameters, new arrays at each call."""
        return self._init(jax.random.key(self.seed), *next(self.batches()))

    def batches(self) -> Iterator[Batch]:
        """Endless random batches, the same at each call."""
        generator = np.random.default_rng(self.seed)
        stream = self.corpus.train
        positions = self.corpus.positions(stream)
        while True:
            chosen = generator.choice(positions, self.batch)
            yield Batch(
                self.word_rows[contexts(stream, chosen)],
                stream[chosen],
                draw_log_uniform(generator, NEGATIVES, len(self.corpus.words)),
            )
