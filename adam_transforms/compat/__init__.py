"""The optimizers of other systems, under their names and in functional form."""

from adam_transforms.compat import capreolus, keras, tf1

__all__ = ["capreolus", "keras", "tf1"]


def __dir__() -> list[str]:
    return __all__
