"""The optimizers that the demonstration compares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import adam_transforms as at

REFERENCE = "optax"  # the parameters of all others are compared with its own


class Optimizer(NamedTuple):
    """One way to train the model.

    Fields:
      description: a few words for the help text and the legend of the table.
      make: maps the learning rate to the transformation.
      value_and_grad: maps (loss, optimizer state) to a function that computes loss and gradient.
      settle: maps (params, state) to (params, state) after the last step.
      finalize: maps the settled (params, state) to the parameters to evaluate.
    """

    description: str
    make: Callable[[float], optax.GradientTransformation]
    value_and_grad: Callable[[Any, Any], Any] = lambda loss, state: jax.value_and_grad(loss)
    settle: Callable[[Any, Any], Any] = lambda params, state: (params, state)
    finalize: Callable[[Any, Any], Any] = lambda params, state: params


def _adam_with_options(learning_rate: float) -> optax.GradientTransformation:
    return at.adam(
        learning_rate,
        clip_global_norm=0.1,  # in training the norm grows from 0.07 to above 0.2
        weight_decay=1e-2,
        weight_decay_mask=at.path_mask("bias", exclude=True),
        ema=0.98,  # averages about the last 50 steps, for training is short
    )


OPTIMIZERS = {
    "adam": Optimizer("adam_transforms.adam", at.adam),
    REFERENCE: Optimizer("optax.adam", optax.adam),
    "options": Optimizer(
        "adam_transforms.adam, clipped, decayed and averaged",
        _adam_with_options,
        finalize=at.finalize,
    ),
    "lazy": Optimizer(
        "adam_transforms.lazy_adam on row gradients",
        lambda learning_rate: at.lazy_adam(learning_rate, tables="ngram_table"),
        value_and_grad=lambda loss, state: at.value_and_grad(loss, tables="ngram_table"),
    ),
    "deferred": Optimizer(
        "adam_transforms.deferred_adam on row gradients",
        lambda learning_rate: at.deferred_adam(learning_rate, tables="ngram_table"),
        value_and_grad=lambda loss, state: at.value_and_grad(loss, rows_from=state),
        settle=at.flush,
    ),
}
