"""Keras's Adam."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.types import Params, Path, State
from adam_transforms._optimizers import adam
from adam_transforms._transforms import accumulation, clipping, loss_scaling
from adam_transforms._transforms.ema import track_params_ema
from adam_transforms.compat import _optimizer
from adam_transforms.compat._optimizer import current_value
from adam_transforms.compat.keras import _absent, _adam_config, _config, _dataclass, _options
from adam_transforms.compat.keras._surface import KerasOptimizer


@_dataclass.accept_lr
@_dataclass.optimizer
class Adam(KerasOptimizer):
    r"""Keras's Adam: its arguments, defaults and trajectory.

    .. math::
      p_t = p_{t-1} - \eta_t \lambda\, p_{t-1}
            - \eta_t \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\, \frac{m_t}{\sqrt{v_t} + \epsilon}

    Each call of `apply` divides the gradients by `loss_scale_factor`, accumulates them and updates
    the average. Each `gradient_accumulation_steps`-th call also clips their mean, and decays and
    updates the parameters. The argument of a schedule is the number of calls, not of updates.

    Args:
      learning_rate: a number, a scalar array, one of `schedules`, another schedule
        ``step -> rate``, or a function without arguments.
      beta_1, beta_2: decay rates in [0, 1), or functions without arguments.
      epsilon: the paper's epsilon hat, or a function without arguments that returns it.
      amsgrad: use the maximum of all v so far.
      weight_decay: lambda, decoupled; see `exclude_from_weight_decay`.
      clipnorm, clipvalue, global_clipnorm: at most one of them; 0 is the same as None.
      use_ema, ema_momentum, ema_overwrite_frequency: whether to average the parameters, the
        momentum in [0, 1], and the number of iterations after which the average overwrites the
        parameters (None for never).
      loss_scale_factor: the factor of `scale_loss`.
      gradient_accumulation_steps: >= 2, or None.
      name: the first part of the variables' names; None for "adam", in r2.0 "Adam".
      legacy: r2.0's Adam. It has `decay` and `lr`, clips by value and then by one of the norms, and
        replaces an epsilon of 0 by 1e-7. Of the arguments from `weight_decay` on, it has only the
        clips and `name`.
      decay: legacy only; divides the learning rate by 1 + decay * iterations.
      lr: legacy only; r2.0's other name of the learning rate, which wins over `learning_rate`.
      excluded_from_weight_decay: patterns, set by `exclude_from_weight_decay`.

    Functions without arguments are called once per step, under `jax.jit` once per trace: all steps
    of one compiled function use the same value. The bias correction is ``1 - beta**t`` with the
    current beta.

    Raises:
      ValueError, TypeError: an argument is out of range, of the wrong type, or conflicts with
        another.

    >>> import jax.numpy as jnp
    >>> opt = Adam(learning_rate=0.1, weight_decay=0.01)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> params, state = opt.minimize(lambda p: jnp.sum(p["w"] ** 2), params, opt.init(params))
    >>> params["w"].round(3).tolist()
    [0.899..., -1.898...]
    """

    learning_rate: Any = 0.001
    beta_1: Any = 0.9
    beta_2: Any = 0.999
    epsilon: Any = 1e-7
    amsgrad: bool = False
    weight_decay: float | None = None
    clipnorm: float | None = None
    clipvalue: float | None = None
    global_clipnorm: float | None = None
    use_ema: bool = False
    ema_momentum: float = 0.99
    ema_overwrite_frequency: int | None = None
    loss_scale_factor: float | None = None
    gradient_accumulation_steps: int | None = None
    name: str | None = None
    _: dataclasses.KW_ONLY
    legacy: bool = False
    decay: float = 0.0
    excluded_from_weight_decay: Sequence[str] = ()
    if TYPE_CHECKING:  # at run time, accept_lr takes it and the property gives it
        lr: Any = None

    default_name: ClassVar[str] = "adam"

    def __post_init__(self) -> None:
        for field, value in _options.checked(self).items():
            object.__setattr__(self, field, value)

    @property
    def overwrites(self) -> bool:
        """Whether training overwrites parameters by their averages."""
        return self.use_ema and self.ema_overwrite_frequency is not None

    # The transformation.

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer as a transformation, for an Optax chain; accepts row gradients too."""
        return _optimizer.densify(self.dense_transform())

    def dense_transform(self) -> optax.GradientTransformationExtraArgs:
        """The transformation of dense gradients.

        If `overwrites`, it accepts the extra argument `without_gradient`: paths whose gradient is
        treated as None.
        """
        every = self.gradient_accumulation_steps
        b1, b2, epsilon = (self._current(field) for field in ("beta_1", "beta_2", "epsilon"))
        mask = None
        if self.weight_decay is not None and self.excluded_from_weight_decay:
            mask = self._decay_mask
        clips = [
            clip(limit)
            for clip, limit in (
                (clipping.clip_by_value, self.clipvalue),
                (clipping.clip_by_norm, self.clipnorm),
                (clipping.clip_by_global_norm, self.global_clipnorm),
            )
            if limit
        ]
        tx = adam(
            lambda count: self.learning_rate_at(
                count if every is None else count * every + every - 1
            ),
            b1,
            b2,
            epsilon,
            eps_hat=True,
            amsgrad=self.amsgrad,
            weight_decay=self.weight_decay,
            weight_decay_mask=mask,
        )
        tx = optax.chain(*clips, tx) if clips else tx
        if every is not None:
            tx = accumulation.accumulate(tx, every)
        if self.loss_scale_factor is not None:
            tx = loss_scaling.static_loss_scale(tx, self.loss_scale_factor)
        return self._with_average(tx) if self.use_ema else tx

    def _with_average(self, tx: Any) -> optax.GradientTransformationExtraArgs:
        """`tx`, followed by an average of the parameters at every call."""
        every, frequency = self.gradient_accumulation_steps or 1, self.ema_overwrite_frequency

        def momentum_at(calls: Any) -> jax.Array:
            # Zero while Keras's iterations, calls // every, are 0: the average is a copy.
            return jnp.where(calls < every, 0.0, self.ema_momentum)

        # Without accumulation this concerns the first call only, which copies at any momentum.
        momentum = self.ema_momentum if every == 1 else momentum_at
        if frequency is None:
            return optax.chain(tx, track_params_ema(momentum, None))
        averaging = track_params_ema(momentum, lambda calls: (calls // every + 1) % frequency == 0)
        return _absent.accept_absent_paths(optax.chain(tx, _absent.zero_updates(), averaging))

    def _current(self, field: str) -> Any:
        """The current value of a number or a function without arguments, checked."""
        value = current_value(getattr(self, field))
        if callable(value):
            raise TypeError(
                f"{field} must be a number or a function without arguments, got {value!r}"
            )
        limits = {"at_least": 0.0} if field == "epsilon" else {"at_least": 0.0, "below": 1.0}
        return arguments.scalar(field, value, **limits)

    def _decay_mask(self, params: Params) -> Any:
        """A tree like `params`: whether each parameter has weight decay."""
        patterns = [re.compile(pattern) for pattern in self.excluded_from_weight_decay]
        leaves, treedef = trees.flatten_with_paths(params)
        return treedef.unflatten(
            [not any(p.search(_variable_name(path)) for p in patterns) for path, _ in leaves]
        )

    def learning_rate_at(self, calls: Any) -> jax.Array:
        """The learning rate after this many calls of `apply`."""
        dtype = dtypes.scalar_dtype()
        rate = current_value(self.learning_rate)
        rate = jnp.asarray(rate(calls) if callable(rate) else rate).astype(dtype)
        if self.decay:
            rate = rate / (1.0 + self.decay * jnp.asarray(calls).astype(dtype))
        return rate

    # Keras's methods.

    def scale_loss(self, loss: Any) -> jax.Array:
        """The loss to differentiate: `loss` times `loss_scale_factor`, if there is one."""
        loss = jnp.asarray(loss)
        if self.loss_scale_factor is None:
            return loss
        # float16 would overflow.
        return loss.astype(dtypes.compute_dtype(loss.dtype)) * self.loss_scale_factor

    def exclude_from_weight_decay(
        self,
        var_list: Iterable[Any] | None = None,
        var_names: Iterable[str] | None = None,
    ) -> "Adam":
        """This optimizer without weight decay for some parameters.

        Args:
          var_list: variables, (path, value) pairs or paths.
          var_names: regular expressions. They are searched for in the parameter's path followed by
            TensorFlow's ":0". One without a match has no effect.

        Returns:
          A new optimizer; the argument replaces earlier exclusions. Configs do not contain it.

        Raises:
          TypeError, ValueError: a variable or a pattern is invalid.

        >>> opt = Adam(weight_decay=0.1).exclude_from_weight_decay(var_names=["bias"])
        >>> opt.excluded_from_weight_decay
        ('bias',)
        """
        names = [var_names] if isinstance(var_names, str) else list(var_names or ())
        paths = [_optimizer.path_of(var) for var in var_list or ()]
        exact = [f"^{re.escape(_variable_name(path))}$" for path in paths]
        return dataclasses.replace(self, excluded_from_weight_decay=(*exact, *names))

    def get_config(self) -> dict[str, Any]:
        """The arguments as JSON values, in the format of Keras's `get_config`.

        For a function without arguments, it has the current value. It does not contain the
        exclusions from weight decay.

        Raises:
          TypeError: the learning rate is a schedule without a config, or a traced value.

        >>> Adam.from_config(Adam(0.5, beta_1=0.8).get_config()).beta_1
        0.8
        """
        return _adam_config.config_of(self)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> "Adam":
        """The optimizer of a config from `get_config`, of this class or of Keras.

        Args:
          config: the config of Keras 3's Adam or AdamW, or of r2.0's Adam, recognized by `decay` or
            `lr`.
          custom_objects: {name: class} of custom schedules.

        Raises:
          ValueError: a key is unknown, or the config belongs to another optimizer.
        """
        return _config.construct(cls, _adam_config.arguments_of(config, custom_objects))

    def scaled_loss(self, loss: Any, state: State) -> Any:
        """The loss to differentiate."""
        del state
        return self.scale_loss(loss)


def _variable_name(path: Path) -> str:
    """TensorFlow's name of a variable."""
    return f"{path}:0"
