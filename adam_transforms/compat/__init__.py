"""Optimizers of other systems under their own names, in functional form."""

from adam_transforms.compat import capreolus, keras, tf1

__all__ = ["capreolus", "keras", "tf1"]
