"""Cross entropy over a large vocabulary: exact, and estimated from a sample of it."""

import jax
import jax.numpy as jnp
import numpy as np


def full_softmax_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy in nats, (batch,), of (batch, classes) logits and (batch,) class ids."""
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - target_logits


def sampled_softmax_loss(
    target_logits: jax.Array,
    negative_logits: jax.Array,
    targets: jax.Array,
    negatives: jax.Array,
    probability: jax.Array,
) -> jax.Array:
    """Cross entropy whose sum over the classes beside the target is estimated from a sample.

    This is importance sampling as in Bengio and Senecal, "Adaptive importance sampling to
    accelerate training of a neural probabilistic language model", IEEE Transactions on Neural
    Networks 19(4), 2008, also known as the logQ correction: each negative is weighted by one over
    its expected count in the sample, which makes the estimated sum (not its logarithm) unbiased.
    A negative that happens to be the target counts for nothing, because the target is there
    already, exactly.

    Args:
      target_logits: (batch,).
      negative_logits: (batch, samples).
      targets: (batch,) class ids.
      negatives: (samples,) class ids, drawn with replacement.
      probability: (samples,) of drawing each of them in one draw.

    Returns:
      The loss of each example in nats, (batch,).
    """
    log_expected_count = jnp.log(probability * negatives.shape[0])
    is_target = negatives[None, :] == targets[:, None]
    corrected = jnp.where(is_target, -jnp.inf, negative_logits - log_expected_count[None, :])
    logits = jnp.concatenate([target_logits[:, None], corrected], axis=1)
    return jax.nn.logsumexp(logits, axis=1) - target_logits


def draw_log_uniform(generator: np.random.Generator, samples: int, classes: int) -> np.ndarray:
    """Draws (samples,) int32 class ids, class k with probability log((k+2)/(k+1)) / log(classes+1).

    That is close to Zipf's law, so it fits a vocabulary sorted by falling frequency, and takes no
    table: it is the floor of a variable whose logarithm is uniform, less one.
    """
    draws = np.exp(generator.random(samples) * np.log(classes + 1)).astype(np.int32) - 1
    return np.minimum(draws, classes - 1)  # rounding may reach the open end of the interval


def log_uniform_probability(ids: jax.Array, classes: int) -> jax.Array:
    """The probability of one draw of these classes by `draw_log_uniform`."""
    return jnp.log1p(1.0 / (ids.astype(jnp.float32) + 1.0)) / float(np.log(classes + 1))
