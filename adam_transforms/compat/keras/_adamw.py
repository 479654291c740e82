"""Keras's AdamW, and the classes by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from adam_transforms.compat.keras import _adam_config, _config, _dataclass
from adam_transforms.compat.keras._adam import Adam


@dataclasses.dataclass(frozen=True, eq=False)
class _FirstFields:
    """Puts `weight_decay` second, as in Keras: a dataclass keeps the order of its last base."""

    learning_rate: Any = 0.001
    weight_decay: float | None = 0.004


@_dataclass.accept_lr
@_dataclass.optimizer
class AdamW(Adam, _FirstFields):
    """Keras 3's AdamW: `Adam` whose `weight_decay` is the second argument, and 0.004 by default.

    Args:
      learning_rate, weight_decay: as for `Adam`; `weight_decay` is not None.
      beta_1, beta_2, epsilon, amsgrad and the others: as for `Adam`, in its order. There is no
        `legacy` AdamW.

    Raises:
      ValueError, TypeError: the errors of `Adam`.

    >>> AdamW(0.5, 0.1).weight_decay, AdamW().weight_decay
    (0.1, 0.004)
    """

    weight_decay: float | None = 0.004

    default_name: ClassVar[str] = "adam_w"

    def __post_init__(self) -> None:
        if self.legacy:
            raise ValueError("legacy=True needs Adam: r2.0 has no AdamW")
        super().__post_init__()
        if self.weight_decay is None:
            raise ValueError("weight_decay must be a number, got None; Adam has none by default")


ADAM_CLASSES: dict[str, type[Adam]] = {"Adam": Adam, "AdamW": AdamW}


def deserialized(config: Any, custom_objects: Mapping[str, Any] | None) -> Adam:
    """The Adam or AdamW of the result of `serialize`, of this package or of Keras."""
    cls, fields = _config.class_and_config("an optimizer", config, ADAM_CLASSES)
    legacy = str(config.get("module") or "").endswith(".legacy")
    return _config.construct(cls, _adam_config.arguments_of(fields, custom_objects, legacy=legacy))
