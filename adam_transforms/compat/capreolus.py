"""capreolus's AdamMultilr: Keras r2.0's Adam with learning rates by variable name."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optax

from adam_transforms._core import arguments
from adam_transforms._core.patterns import Rules, compile_patterns
from adam_transforms._core.types import State
from adam_transforms._transforms import clipping, learning_rates
from adam_transforms._transforms.adam import scale_by_adam, scale_by_amsgrad
from adam_transforms.compat import keras
from adam_transforms.compat._optimizer import current_value, densify
from adam_transforms.compat.keras import _adam_config, _config, _dataclass
from adam_transforms.compat.keras._surface import KerasOptimizer

__all__ = ["AdamMultilr"]


@_dataclass.accept_lr
@_dataclass.optimizer
class AdamMultilr(KerasOptimizer):
    r"""Adam with a learning rate for each group of variables.

    .. math::
      \theta_t = \theta_{t-1} - \eta_{g(\theta)} \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
                 \frac{m_t}{\sqrt{v_t} + \hat\epsilon}

    Args:
      learning_rate: the rate of variables that match no group; as for `keras.Adam`.
      beta_1, beta_2, epsilon, amsgrad: as for `keras.Adam`; an epsilon of 0 is replaced by 1e-7.
      name: the name of the optimizer.
      pattern_lrs: groups ``{"patterns": [...], "lr": ...}``, where lr has the same types as
        `learning_rate`. Patterns are regular expressions, searched for in the variable's name in
        TensorFlow: its path followed by ":0". The first group with a match gives the rate of a
        variable. A group may match no variable.
      clipnorm, clipvalue: gradient limits as for `keras.Adam`; if both are given, values are
        clipped first.
      decay: divides all rates by 1 + decay * iterations.
      lr: another name of the learning rate, which wins over `learning_rate`.

    A row gradient is treated as the dense array, as in r2.0: all rows decay and are updated. Two
    defects of the original are corrected: its sparse updates have no bias correction, and it
    rejects None for `pattern_lrs`.

    Raises:
      ValueError, TypeError: an argument is out of range or of the wrong type.

    References:
      https://capreolus.readthedocs.io, `capreolus.utils.keras_support`.

    >>> import jax.numpy as jnp
    >>> groups = [{"patterns": ["bert"], "lr": 0.01}]
    >>> opt = AdamMultilr(learning_rate=0.1, pattern_lrs=groups)
    >>> params = {"bert": jnp.zeros(1), "head": jnp.zeros(1)}
    >>> params, _ = opt.apply({"bert": jnp.ones(1), "head": jnp.ones(1)}, params, opt.init(params))
    >>> round(float(params["bert"][0]), 4), round(float(params["head"][0]), 4)
    (-0.01, -0.1)
    """

    learning_rate: Any = 0.001
    beta_1: Any = 0.9
    beta_2: Any = 0.999
    epsilon: Any = 1e-7
    amsgrad: bool = False
    name: str = "AdamMultilr"
    pattern_lrs: Sequence[Mapping[str, Any]] | None = None
    _: dataclasses.KW_ONLY
    clipnorm: float | None = None
    clipvalue: float | None = None
    decay: float = 0.0
    if TYPE_CHECKING:  # at run time, accept_lr takes it and the property gives it
        lr: Any = None

    def __post_init__(self) -> None:
        self.adam  # noqa: B018 - checks all arguments but pattern_lrs
        _groups(self.pattern_lrs)

    @property
    def adam(self) -> keras.Adam:
        """The optimizer without groups: a single learning rate."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["pattern_lrs"]
        return keras.Adam(**fields, legacy=True)

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer as a transformation, for an Optax chain; accepts row gradients too."""
        groups = _groups(self.pattern_lrs)
        rules = Rules(tuple(compiled for compiled, _ in groups))
        rates = [
            current_value(rate) for rate in (*(rate for _, rate in groups), self.learning_rate)
        ]
        adam = self.adam
        if self.decay:
            decayed = [dataclasses.replace(adam, learning_rate=rate) for rate in rates]
            rates = [with_rate.learning_rate_at for with_rate in decayed]
        clips = [
            clip(limit)
            for clip, limit in (
                (clipping.clip_by_value, adam.clipvalue),
                (clipping.clip_by_norm, adam.clipnorm),
            )
            if limit
        ]
        b1, b2, eps = map(current_value, (adam.beta_1, adam.beta_2, adam.epsilon))
        if adam.amsgrad:
            moments = scale_by_amsgrad(b1, b2, eps, max_of="raw", eps_hat=True)
        else:
            moments = scale_by_adam(b1, b2, eps, eps_hat=True)
        scale = learning_rates.scale_by_chosen_rate(lambda path: rules.index(f"{path}:0"), rates)
        return densify(optax.chain(*clips, moments, scale))

    def scaled_loss(self, loss: Any, state: State) -> Any:
        """The loss to differentiate: `loss` itself."""
        del state
        return loss

    def get_config(self) -> dict[str, Any]:
        """The arguments as JSON values.

        >>> opt = AdamMultilr(pattern_lrs=[{"patterns": ["bert"], "lr": 0.01}])
        >>> AdamMultilr.from_config(opt.get_config()).pattern_lrs
        [{'patterns': ['bert'], 'lr': 0.01}]
        """
        config = self.adam.get_config()
        if self.pattern_lrs is None:
            return config | {"pattern_lrs": None}
        groups = [
            {
                "patterns": [pattern.pattern for pattern in compiled],
                # The format of the learning rate in Adam's config.
                "lr": keras.Adam(rate).get_config()["learning_rate"],
            }
            for compiled, rate in _groups(self.pattern_lrs)
        ]
        return config | {"pattern_lrs": groups}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> "AdamMultilr":
        """The optimizer of a config from `get_config`, of this class or of capreolus."""

        def rate(value: Any) -> Any:
            known = {"learning_rate": value}
            return _adam_config.arguments_of(known, custom_objects)["learning_rate"]

        fields = _adam_config.arguments_of(config, custom_objects, legacy=True)
        del fields["legacy"]
        groups = fields.get("pattern_lrs")
        if groups is not None:
            fields["pattern_lrs"] = [{**group, "lr": rate(group["lr"])} for group in groups]
        return _config.construct(cls, fields)


def _groups(pattern_lrs: Any) -> list[tuple[tuple[re.Pattern[str], ...], Any]]:
    """[(patterns, learning rate), ...], checked."""
    if pattern_lrs is None:
        return []
    if not isinstance(pattern_lrs, Sequence) or isinstance(pattern_lrs, str):
        raise TypeError(f"pattern_lrs must be a list of groups, got {pattern_lrs!r}")
    groups = []
    for i, group in enumerate(pattern_lrs):
        name = f"pattern_lrs[{i}]"
        if not isinstance(group, Mapping) or group.keys() != {"patterns", "lr"}:
            raise TypeError(
                f'{name} must be a dictionary {{"patterns": [...], "lr": ...}}, got {group!r}'
            )
        compiled = compile_patterns(f"{name}['patterns']", group["patterns"])
        rate = arguments.scalar_or_schedule(f"{name}['lr']", group["lr"])
        groups.append((compiled, rate))
    return groups


def __dir__() -> list[str]:
    return __all__
