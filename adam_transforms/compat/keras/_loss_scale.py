"""Keras's LossScaleOptimizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_transforms._core import arguments, trees
from adam_transforms._core.types import State
from adam_transforms._transforms import loss_scaling
from adam_transforms.compat import _optimizer
from adam_transforms.compat._optimizer import Variable
from adam_transforms.compat.keras import _absent, _adam_config, _config, _dataclass
from adam_transforms.compat.keras._adam import Adam
from adam_transforms.compat.keras._adamw import deserialized
from adam_transforms.compat.keras._surface import KerasOptimizer

# Keras halves the scale without a limit; below the smallest normal number it becomes zero.
_MIN_SCALE = float(np.finfo(np.float32).tiny)
# What Keras accepts with these values only: its first versions write them into configs.
_UNUSED: Mapping[str, Any] = {
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}


@_dataclass.optimizer
class LossScaleOptimizer(KerasOptimizer):
    """`Adam` with a dynamic loss scale, which skips steps with non-finite gradients.

    If all gradients are finite, they are divided by the scale and passed to the inner optimizer;
    `dynamic_growth_steps` consecutive such calls double the scale. If a gradient has an infinity or
    a NaN, the scale is halved, and parameters and inner state are unchanged.

    Args:
      inner_optimizer: an `Adam` or `AdamW`; its `loss_scale_factor` is ignored.
      initial_scale: > 0.
      dynamic_growth_steps: >= 1.
      name: the first part of the names of its own variables.
      dynamic: True. For a constant scale, use `Adam` with `loss_scale_factor`.
      **options: the other arguments of `Adam` with their defaults, as in Keras. Other values belong
        to the inner optimizer.

    Raises:
      ValueError, TypeError: an argument is out of range or of the wrong type, or belongs to the
        inner optimizer.

    >>> import jax.numpy as jnp
    >>> opt = LossScaleOptimizer(Adam(0.1), initial_scale=8.0)
    >>> params = {"w": jnp.array([1.0])}
    >>> params, state = opt.minimize(lambda p: jnp.sum(p["w"] / 0), params, opt.init(params))
    >>> params["w"].tolist(), float(opt.dynamic_scale(state))
    ([1.0], 4.0)
    """

    inner_optimizer: Adam
    initial_scale: float
    dynamic_growth_steps: int
    name: str

    def __init__(
        self,
        inner_optimizer: Adam,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        name: str | None = None,
        *,
        dynamic: bool = True,
        **options: Any,
    ) -> None:
        _check_options(dynamic, options)
        if not isinstance(inner_optimizer, Adam):
            raise TypeError(
                f"inner_optimizer must be an Adam or AdamW of this module, got {inner_optimizer!r}"
            )
        if inner_optimizer.loss_scale_factor is not None:
            inner_optimizer = dataclasses.replace(inner_optimizer, loss_scale_factor=None)
        name = "loss_scale_optimizer" if name is None else name
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r}")
        fields = {
            "inner_optimizer": inner_optimizer,
            "initial_scale": _config.number("initial_scale", initial_scale, above=0.0),
            "dynamic_growth_steps": arguments.positive_int(
                "dynamic_growth_steps", dynamic_growth_steps
            ),
            "name": name,
        }
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    @property
    def adam(self) -> Adam:
        """The optimizer that holds Adam's options."""
        return self.inner_optimizer

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer as a transformation, for an Optax chain; accepts row gradients too."""
        tx = loss_scaling.dynamic_loss_scale(
            self.inner_optimizer.dense_transform(),
            self.initial_scale,
            self.dynamic_growth_steps,
            min_scale=min(_MIN_SCALE, self.initial_scale),
            # Keras doubles the scale until it is infinite.
            max_scale=loss_scaling.MAX_SCALE,
        )
        if self.inner_optimizer.overwrites:
            tx = _absent.pass_absent_paths(tx)
        return _optimizer.densify(tx)

    def scale_loss(self, loss: Any, state: State) -> jax.Array:
        """The loss to differentiate: `loss` times the current scale."""
        return loss_scaling.scale_loss(loss, state)

    def dynamic_scale(self, state: State) -> jax.Array:
        """The current scale, float32 ()."""
        return _state(state).scale

    def step_counter(self, state: State) -> jax.Array:
        """The number of finite calls since the last change of the scale, int32 ()."""
        return _state(state).finite_steps

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the inner optimizer."""
        return self.inner_optimizer.learning_rate

    def exclude_from_weight_decay(
        self, var_list: Any = None, var_names: Any = None
    ) -> "LossScaleOptimizer":
        """Applies `Adam.exclude_from_weight_decay` to the inner optimizer."""
        inner = self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)
        return dataclasses.replace(self, inner_optimizer=inner)

    def get_config(self) -> dict[str, Any]:
        """The arguments as JSON values, in the format of Keras's `get_config`.

        >>> opt = LossScaleOptimizer(Adam(0.5))
        >>> LossScaleOptimizer.from_config(opt.get_config()).learning_rate
        0.5
        """
        return {
            "name": self.name,
            "inner_optimizer": _adam_config.serialized(self.inner_optimizer),
            "initial_scale": self.initial_scale,
            "dynamic_growth_steps": self.dynamic_growth_steps,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> "LossScaleOptimizer":
        """The optimizer of a config from `get_config`, of this class or of Keras.

        Arguments and errors are those of `Adam.from_config`.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"the config of {cls.__name__} must be a dictionary, got {config!r}")
        if "inner_optimizer" not in config:
            raise ValueError(f"the config of {cls.__name__} lacks inner_optimizer")
        inner = deserialized(config["inner_optimizer"], custom_objects)
        return cls(**{**config, "inner_optimizer": inner})

    def scaled_loss(self, loss: Any, state: State) -> Any:
        """The loss to differentiate."""
        return self.scale_loss(loss, state)

    def own_variables(self, state: State) -> list[Variable]:
        """The variables of the wrapper, which precede those of the inner optimizer."""
        # The wrapper's iteration and learning rate are always 0 in Keras.
        own = {
            "iteration": jnp.zeros((), jnp.int32),
            "learning_rate": jnp.zeros((), jnp.float32),
            "step_counter": self.step_counter(state),
            "dynamic_scale": self.dynamic_scale(state),
        }
        return [Variable(f"{self.name}/{name}", value) for name, value in own.items()]


def _check_options(dynamic: Any, options: Mapping[str, Any]) -> None:
    """Raises ValueError if an argument has another value than Keras accepts."""
    if not arguments.flag("dynamic", dynamic):
        raise ValueError(
            "LossScaleOptimizer has no dynamic=False: for a constant scale, set loss_scale_factor "
            "on the inner_optimizer and use that alone, or use adam_transforms.static_loss_scale"
        )
    of_inner = {"lr", *(field.name for field in dataclasses.fields(Adam))}
    for key, value in options.items():
        default = _UNUSED.get(key, dataclasses.MISSING)
        if isinstance(value, type(default)) and value == default:
            continue
        remedy = "its arguments are inner_optimizer, initial_scale, dynamic_growth_steps and name"
        if key in of_inner:
            remedy = f"set {key} on the inner_optimizer"
        if key == "loss_scale_factor":
            remedy += ", and use it without a LossScaleOptimizer, whose scale is initial_scale"
        raise ValueError(f"LossScaleOptimizer has no {key}: {remedy}")


def _state(state: State) -> loss_scaling.DynamicLossScaleState:
    found = trees.find_states(state, loss_scaling.DynamicLossScaleState)
    if len(found) != 1:
        raise ValueError(f"state must be a result of init, but has {len(found)} loss scales")
    return found[0]
