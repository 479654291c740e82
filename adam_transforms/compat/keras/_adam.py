"""Keras's Adam."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._optimizers import adam
from adam_transforms._transforms import accumulation, clipping, loss_scaling
from adam_transforms._transforms.ema import track_params_ema
from adam_transforms.compat import _optimizer
from adam_transforms.compat._optimizer import present
from adam_transforms.compat.keras import _absent, _adam_config, _config, _options
from adam_transforms.compat.keras._surface import KerasOptimizer


@dataclasses.dataclass(frozen=True, eq=False)
class Adam(KerasOptimizer):
    r"""Keras's Adam: its arguments, defaults and trajectory.

    .. math::
      p_t = p_{t-1} - \eta_t \lambda\, p_{t-1}
            - \eta_t \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\, \frac{m_t}{\sqrt{v_t} + \epsilon}

    A call of `apply` divides the gradients by `loss_scale_factor`; accumulates them; on each
    `gradient_accumulation_steps`-th call clips their mean, decays and moves the parameters; and on
    every call moves the average. A schedule is read at the calls so far, not at the updates.

    Args:
      learning_rate: a number, a scalar array, one of `schedules` or any other ``step -> rate``, or
        a function without arguments.
      beta_1, beta_2: decay rates in [0, 1), or functions without arguments.
      epsilon: the paper's epsilon hat, or a function without arguments.
      amsgrad: divide by the largest v so far.
      weight_decay: lambda, decoupled; see `exclude_from_weight_decay`.
      clipnorm, clipvalue, global_clipnorm: one of them at most; 0 is None.
      use_ema, ema_momentum, ema_overwrite_frequency: average the parameters, with a momentum in
        [0, 1], and put the average in their place on every so many iterations, or never for None.
      loss_scale_factor: what `scale_loss` multiplies the loss by.
      gradient_accumulation_steps: >= 2, or None.
      name: the first part of the variables' names.
      legacy: be r2.0's Adam: `decay`; clipping by value, then by one of the norms, together; an
        epsilon of 0 is 1e-7; and none of the arguments from weight_decay on but the clips and
        `name`.
      decay: legacy; the learning rate is divided by 1 + decay * iterations.
      excluded_from_weight_decay: patterns that `exclude_from_weight_decay` sets.

    Functions without arguments are called once a step; under `jax.jit` when it is traced, so that
    what they give then is what all later steps have. Betas are bias-corrected by ``1 - beta**t`` at
    their present value.

    Raises:
      ValueError, TypeError: an argument is out of range or of the wrong type, or excludes another.

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

    def __post_init__(self) -> None:
        for field, value in _options.checked(self).items():
            object.__setattr__(self, field, value)

    @property
    def overwrites(self) -> bool:
        """Whether parameters are overwritten by their averages in training."""
        return self.use_ema and self.ema_overwrite_frequency is not None

    # The transformation.

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The transformation underneath, for an Optax chain; it takes row gradients too."""
        return _optimizer.densely(self.dense_transform())

    def dense_transform(self) -> optax.GradientTransformationExtraArgs:
        """The transformation of dense gradients.

        Where None gradients are to be overwritten by averages, it takes their paths as the extra
        argument `without_gradient` too.
        """
        every = self.gradient_accumulation_steps
        b1, b2, epsilon = (self._present(field) for field in ("beta_1", "beta_2", "epsilon"))
        mask = None
        if self.weight_decay is not None and self.excluded_from_weight_decay:
            mask = self._decays
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
        return self._averaged(tx) if self.use_ema else tx

    def _averaged(self, tx: Any) -> optax.GradientTransformationExtraArgs:
        """`tx`, and the average of the parameters after every call."""
        every, frequency = self.gradient_accumulation_steps or 1, self.ema_overwrite_frequency

        def momentum_at(calls: Any) -> jax.Array:
            # There is none while Keras's iterations, calls // every, are 0.
            return jnp.where(calls < every, 0.0, self.ema_momentum)

        # Without accumulation that is the first call alone, after which the average is a copy.
        momentum = self.ema_momentum if every == 1 else momentum_at
        if frequency is None:
            return optax.chain(tx, track_params_ema(momentum, None))
        averaging = track_params_ema(momentum, lambda calls: (calls // every + 1) % frequency == 0)
        return _absent.by_name(optax.chain(tx, _absent.zero_updates(), averaging))

    def _present(self, field: str) -> Any:
        """What a number, or a function without arguments, is now."""
        value = present(getattr(self, field))
        if callable(value):
            raise TypeError(
                f"{field} must be a number or a function without arguments, got {value!r}"
            )
        limits = {"at_least": 0.0} if field == "epsilon" else {"at_least": 0.0, "below": 1.0}
        return arguments.scalar(field, value, **limits)

    def _decays(self, params: Any) -> Any:
        """True for each parameter that is not excluded from weight decay."""
        patterns = [re.compile(pattern) for pattern in self.excluded_from_weight_decay]
        leaves, treedef = trees.flatten_with_paths(params)
        return treedef.unflatten(
            [not any(p.search(_variable_name(path)) for p in patterns) for path, _ in leaves]
        )

    def learning_rate_at(self, calls: Any) -> jax.Array:
        """The learning rate when apply has been called this many times."""
        dtype = dtypes.scalar_dtype()
        rate = present(self.learning_rate)
        rate = jnp.asarray(rate(calls) if callable(rate) else rate).astype(dtype)
        if self.decay:
            rate = rate / (1.0 + self.decay * jnp.asarray(calls).astype(dtype))
        return rate

    # Keras's methods.

    def scale_loss(self, loss: Any) -> jax.Array:
        """The loss times `loss_scale_factor`, if there is one; differentiate this one."""
        loss = jnp.asarray(loss)
        if self.loss_scale_factor is None:
            return loss
        # Scaled in float16 it would soon be infinite.
        return loss.astype(dtypes.compute_dtype(loss.dtype)) * self.loss_scale_factor

    def exclude_from_weight_decay(
        self,
        var_list: Iterable[Any] | None = None,
        var_names: Iterable[str] | None = None,
    ) -> "Adam":
        """This optimizer, but for the parameters that it does not decay.

        Args:
          var_list: variables, (path, value) pairs or paths.
          var_names: regular expressions, searched for in a parameter's path with ":0" at the end,
            as TensorFlow names variables. One that matches nothing has no effect.

        Returns:
          A new optimizer; what was excluded before is not. A config does not hold it.

        Raises:
          TypeError, ValueError: a variable or a pattern is none.

        >>> opt = Adam(weight_decay=0.1).exclude_from_weight_decay(var_names=["bias"])
        >>> opt.excluded_from_weight_decay
        ('bias',)
        """
        names = [var_names] if isinstance(var_names, str) else list(var_names or ())
        paths = [_optimizer.path_of(var) for var in var_list or ()]
        exactly = [f"^{re.escape(_variable_name(path))}$" for path in paths]
        return dataclasses.replace(self, excluded_from_weight_decay=(*exactly, *names))

    def get_config(self) -> dict[str, Any]:
        """The arguments in what JSON has, as Keras's `get_config` gives them.

        A function without arguments is written as what it gives now. What is excluded from weight
        decay is no part of it.

        Raises:
          TypeError: the learning rate is a schedule without a config, or traced.

        >>> Adam.from_config(Adam(0.5, beta_1=0.8).get_config()).beta_1
        0.8
        """
        return _adam_config.config_of(self)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> "Adam":
        """The optimizer of a config that `get_config` gave, ours or Keras's.

        Args:
          config: of Keras 3's Adam or AdamW, or of r2.0's Adam, which is told by its `decay`.
          custom_objects: schedules of your own: their classes by name.

        Raises:
          ValueError: there is an unknown key, or the config is of another optimizer.
        """
        return _config.construct(cls, _adam_config.arguments_of(config, custom_objects))

    def scaled_loss(self, loss: Any, state: Any) -> Any:
        """The loss to differentiate."""
        del state
        return self.scale_loss(loss)


def _variable_name(path: str) -> str:
    return f"{path}:0"
