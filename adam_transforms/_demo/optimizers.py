"""The optimizers that the demonstration compares."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax

import adam_transforms as at

TABLE = "ngram_table"


class Optimizer(NamedTuple):
    """One way to train the model.

    Fields:
      description: a few words for the help text and the plan.
      make: maps the learning rate to the transformation.
      value_and_grad: maps (loss, optimizer state) to a function that computes loss and gradient.
      finalize: maps (params, state) to the parameters to evaluate.
      float32: of an optimizer with small states, the name of the same one with float32 moments.
    """

    description: str
    make: Callable[[float], optax.GradientTransformation]
    value_and_grad: Callable[[Any, Any], Any] = lambda loss, state: jax.value_and_grad(loss)
    finalize: Callable[[Any, Any], Any] = lambda params, state: params
    float32: str | None = None


def _adam_with_options(learning_rate: float) -> optax.GradientTransformation:
    return at.adam(
        learning_rate,
        clip_global_norm=0.1,  # in training the norm grows from 0.07 to above 0.2
        weight_decay=1e-2,
        weight_decay_mask=at.path_mask("bias", exclude=True),
        ema=0.98,  # averages about the last 50 steps, for training is short
    )


def _lazy(learning_rate: float, **options: Any) -> optax.GradientTransformation:
    return at.lazy_adam(learning_rate, tables=TABLE, **options)


def _row_gradients(loss: Any, state: Any) -> Any:
    return at.value_and_grad(loss, tables=TABLE)


OPTIMIZERS = {
    "optax": Optimizer("optax.adam", optax.adam),
    "adam": Optimizer("adam_transforms.adam", at.adam),
    "adam16": Optimizer(
        "adam_transforms.adam, 16 bits a moment", partial(at.adam, state_bits=16), float32="adam"
    ),
    "adam8": Optimizer(
        "adam_transforms.adam, 8 bits a moment", partial(at.adam, state_bits=8), float32="adam"
    ),
    "options": Optimizer(
        "adam_transforms.adam, clipped, decayed and averaged",
        _adam_with_options,
        finalize=at.finalize,
    ),
    "deferred": Optimizer(
        "adam_transforms.deferred_adam on row gradients",
        partial(at.deferred_adam, tables=TABLE),
        value_and_grad=lambda loss, state: at.value_and_grad(loss, rows_from=state),
        finalize=lambda params, state: at.flush(params, state)[0],
    ),
    "lazy": Optimizer("adam_transforms.lazy_adam on row gradients", _lazy, _row_gradients),
    "lazy16": Optimizer(
        "adam_transforms.lazy_adam, 16 bits a moment",
        partial(_lazy, state_bits=16),
        _row_gradients,
        float32="lazy",
    ),
    "lazy8": Optimizer(
        "adam_transforms.lazy_adam, 8 bits a moment",
        partial(_lazy, state_bits=8),
        _row_gradients,
        float32="lazy",
    ),
}

# Three minutes on two cores; the others are dense, and slower, or between two of these.
DEFAULT = ("optax", "adam", "deferred", "lazy", "lazy8")
REFERENCES = ("optax", "adam")  # the others are compared with the first of these that is trained
