"""The model: logits of the next word from the hashed n-grams of the preceding words."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from adam_transforms._demo import ngrams, softmax

HIDDEN = 128
OUTPUT_DIM = 64
TABLE_STDDEV = 0.1  # lowest held-out loss among 0.1, 0.3 and 1.0


class NextWord(nn.Module):
    """N-gram vectors of the context, a small MLP, and a dot product with each word's output vector.

    Attributes:
      rows, dim: the shape of the n-gram table.
      frequency: (vocabulary,) unigram probabilities. Their logarithm is the initial output bias:
        training starts from the unigram model, and every improvement comes from the context.
    """

    rows: int
    dim: int
    frequency: np.ndarray

    def setup(self) -> None:
        normal = nn.initializers.normal
        vocabulary = self.frequency.shape[0]
        self.ngram_table = nn.Embed(self.rows, self.dim, embedding_init=normal(TABLE_STDDEV))
        self.hidden = nn.Dense(HIDDEN)
        self.query = nn.Dense(OUTPUT_DIM)
        self.output_table = nn.Embed(
            vocabulary, OUTPUT_DIM, embedding_init=normal(OUTPUT_DIM**-0.5)
        )
        self.output_bias = self.param(
            "output_bias", lambda key: jnp.log(jnp.asarray(self.frequency, jnp.float32))
        )

    def word_vectors(self, rows: jax.Array) -> jax.Array:
        """(..., dim): the mean n-gram vector of each word, given (..., MAX_NGRAMS) row ids."""
        is_ngram = (rows != ngrams.PADDING)[..., None]
        total = jnp.where(is_ngram, self.ngram_table(rows), 0.0).sum(axis=-2)
        return total / jnp.maximum(is_ngram.sum(axis=-2), 1).astype(total.dtype)

    def queries(self, vectors: jax.Array) -> jax.Array:
        """(batch, OUTPUT_DIM) query vectors, given (batch, CONTEXT, dim) word vectors."""
        # tanh because it is smooth. A rounding error at the kink of a relu flips a unit: the losses
        # of two equivalent optimizers then differ by 1e-3 after 200 steps, with tanh by 1e-5.
        return self.query(nn.tanh(self.hidden(vectors.reshape(vectors.shape[0], -1))))

    def logits(self, vectors: jax.Array) -> jax.Array:
        """(batch, vocabulary) logits, given (batch, CONTEXT, dim) word vectors."""
        return self.output_table.attend(self.queries(vectors)) + self.output_bias[None, :]

    def __call__(
        self, context_rows: jax.Array, targets: jax.Array, negatives: jax.Array
    ) -> jax.Array:
        """The mean sampled-softmax loss of a batch in nats.

        Args:
          context_rows: (batch, CONTEXT, MAX_NGRAMS) row ids of the words before the targets.
          targets: (batch,) ids of the words to predict.
          negatives: (samples,) ids drawn by `softmax.draw_log_uniform`, shared by the batch.
        """
        queries = self.queries(self.word_vectors(context_rows))
        target_logits = (queries * self.output_table(targets)).sum(axis=1)
        negative_logits = queries @ self.output_table(negatives).T
        return softmax.sampled_softmax_loss(
            target_logits + self.output_bias[targets],
            negative_logits + self.output_bias[negatives][None, :],
            targets,
            negatives,
            softmax.log_uniform_probability(negatives, self.output_bias.shape[0]),
        ).mean()
