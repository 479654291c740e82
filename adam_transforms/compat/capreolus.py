"""capreolus's AdamMultilr: r2.0's Keras Adam with learning rates by the names of variables."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from adam_transforms._core import arguments
from adam_transforms._core.patterns import Rules, compile_patterns
from adam_transforms._transforms import learning_rates
from adam_transforms.compat import keras
from adam_transforms.compat._optimizer import present
from adam_transforms.compat.keras import _adam_config, _config
from adam_transforms.compat.keras._surface import KerasOptimizer


@dataclasses.dataclass(frozen=True, eq=False)
class AdamMultilr(KerasOptimizer):
    r"""Adam with a learning rate for each group of variables.

    .. math::
      \theta_t = \theta_{t-1} - \eta_{g(\theta)} \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
                 \frac{m_t}{\sqrt{v_t} + \hat\epsilon}

    Args:
      learning_rate: the rate of variables that no group matches; as for `keras.Adam`.
      beta_1, beta_2, epsilon, amsgrad: as for `keras.Adam`; an epsilon of 0 is 1e-7.
      name: what it is called.
      pattern_lrs: groups ``{"patterns": [...], "lr": ...}``. The first group any of whose regular
        expressions is found in the variable's path, with TensorFlow's ":0" after it, gives the
        rate: whatever `learning_rate` may be. A group that no variable falls into is no mistake.
      clipnorm, clipvalue: limits of the gradient, as for `keras.Adam`; if both are given, value
        first.

    A row gradient stands for the dense array, as in r2.0: all rows decay and move. It differs from
    the original in two defects of that: there, sparse updates are not bias-corrected, and None for
    `pattern_lrs` fails.

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

    def __post_init__(self) -> None:
        self.adam  # noqa: B018 - checks all but the groups
        _groups(self.pattern_lrs)

    @property
    def adam(self) -> keras.Adam:
        """The optimizer without groups: one rate for all."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["pattern_lrs"]
        return keras.Adam(**fields, legacy=True)

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The transformation underneath, for an Optax chain; it takes row gradients too."""
        groups = _groups(self.pattern_lrs)
        rules = Rules(tuple(compiled for compiled, _ in groups))
        rates = [present(rate) for rate in (*(rate for _, rate in groups), self.learning_rate)]
        # The rates of the groups bring the sign.
        direction = dataclasses.replace(self.adam, learning_rate=-1.0).transform()
        scale = learning_rates.scale_by_chosen_rate(lambda path: rules.index(f"{path}:0"), rates)
        return optax.chain(direction, scale)

    def scaled_loss(self, loss: Any, state: Any) -> Any:
        """The loss to differentiate."""
        del state
        return loss

    def get_config(self) -> dict[str, Any]:
        """The arguments in what JSON has.

        >>> opt = AdamMultilr(pattern_lrs=[{"patterns": ["bert"], "lr": 0.01}])
        >>> AdamMultilr.from_config(opt.get_config()).pattern_lrs
        [{'patterns': ['bert'], 'lr': 0.01}]
        """
        config = self.adam.get_config()
        del config["decay"]
        if self.pattern_lrs is None:
            return config | {"pattern_lrs": None}
        groups = [
            {
                "patterns": [pattern.pattern for pattern in compiled],
                # As Adam writes a learning rate.
                "lr": keras.Adam(rate).get_config()["learning_rate"],
            }
            for compiled, rate in _groups(self.pattern_lrs)
        ]
        return config | {"pattern_lrs": groups}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> "AdamMultilr":
        """The optimizer of a config that `get_config` gave; see `keras.Adam.from_config`."""

        def rate(value: Any) -> Any:
            known = {"learning_rate": value}
            return _adam_config.arguments_of(known, custom_objects)["learning_rate"]

        fields = _adam_config.arguments_of(config, custom_objects)
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
