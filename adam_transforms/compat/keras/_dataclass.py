"""The dataclasses of Keras's optimizers."""

import dataclasses
import functools
import inspect
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, eq_default=False)
def optimizer(cls: type[T]) -> type[T]:
    """`cls` as a frozen dataclass, in which an assignment raises an error with the remedy."""
    made: Any = dataclasses.dataclass(frozen=True, eq=False)(cls)
    made.__setattr__ = _refuse_assignment
    return made


def _refuse_assignment(self: Any, name: str, value: Any) -> None:
    del value
    field = "learning_rate" if name == "lr" else name
    own = {f.name for f in dataclasses.fields(self)}
    change = f"{field}=..."
    if field not in own and "inner_optimizer" in own:
        change = f"inner_optimizer=dataclasses.replace(optimizer.inner_optimizer, {change})"
    raise dataclasses.FrozenInstanceError(
        f"cannot assign to {name!r}, since an optimizer is not mutated: make another with "
        f"dataclasses.replace(optimizer, {change})"
    )


def accept_lr(cls: type[T]) -> type[T]:
    """The dataclass `cls`, whose constructor also takes `lr`, r2.0's name of the learning rate.

    As in r2.0, `lr` is a keyword and wins over `learning_rate`. A class with the field `legacy`
    takes it only with `legacy=True`.
    """
    made: Any = cls
    init = made.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def init_with_lr(*args: Any, **keywords: Any) -> None:
        if "lr" not in keywords:
            return init(*args, **keywords)
        rate = keywords.pop("lr")
        bound = signature.bind(*args, **keywords)
        if "legacy" in signature.parameters and not bound.arguments.get("legacy"):
            raise ValueError(
                f"lr needs legacy=True, which is r2.0's Adam; Keras 3's name is learning_rate, "
                f"got lr={rate!r}"
            )
        bound.arguments["learning_rate"] = rate
        return init(*bound.args, **bound.kwargs)

    made.__init__ = init_with_lr
    return made
