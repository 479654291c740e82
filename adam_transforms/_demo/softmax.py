"""Cross entropy over a large vocabulary: exact, and estimated from sampled classes."""

import jax
import jax.numpy as jnp
import numpy as np


def full_softmax_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """(batch,) cross entropy in nats, given (batch, classes) logits and (batch,) class ids."""
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - target_logits


def sampled_softmax_loss(
    target_logits: jax.Array,
    negative_logits: jax.Array,
    targets: jax.Array,
    negatives: jax.Array,
    probability: jax.Array,
) -> jax.Array:
    """Cross entropy with an estimate of the sum over the non-target classes from a sample.

    The estimate is importance sampling as in Bengio and Senecal, "Adaptive importance sampling to
    accelerate training of a neural probabilistic language model", IEEE Transactions on Neural
    Networks 19(4), 2008, also known as the logQ correction: each negative has the weight 1 over its
    expected count in the sample. The estimated sum (not its logarithm) is unbiased. A negative
    that equals the target has weight 0, because the sum contains the target exactly.

    Args:
      target_logits: (batch,).
      negative_logits: (batch, samples).
      targets: (batch,) class ids.
      negatives: (samples,) class ids, drawn with replacement.
      probability: (samples,) the probability of each negative in one draw.

    Returns:
      (batch,) losses in nats.
    """
    log_expected_count = jnp.log(probability * negatives.shape[0])
    is_target = negatives[None, :] == targets[:, None]
    corrected = jnp.where(is_target, -jnp.inf, negative_logits - log_expected_count[None, :])
    logits = jnp.concatenate([target_logits[:, None], corrected], axis=1)
    return jax.nn.logsumexp(logits, axis=1) - target_logits


def draw_log_uniform(generator: np.random.Generator, samples: int, classes: int) -> np.ndarray:
    """Draws (samples,) int32 class ids, class k with probability log((k+2)/(k+1)) / log(classes+1).

    The distribution is close to Zipf's law and fits a vocabulary sorted by falling frequency. It
    needs no table: k + 1 is the floor of a variable with a uniform logarithm.
    """
    draws = np.exp(generator.random(samples) * np.log(classes + 1)).astype(np.int32) - 1
    return np.minimum(draws, classes - 1)  # rounding can reach the excluded upper bound


def log_uniform_probability(ids: jax.Array, classes: int) -> jax.Array:
    """The probability of each class in one draw of `draw_log_uniform`."""
    return jnp.log1p(1.0 / (ids.astype(jnp.float32) + 1.0)) / float(np.log(classes + 1))
