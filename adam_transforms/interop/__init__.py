"""Imports optimizer states from PyTorch, Keras and TensorFlow, and exports them again.

Arrays are NumPy arrays matched by name; none of the other systems is imported. Files are untrusted:
only the given file is read, nothing is unpickled, and shapes are compared before data are read.
Optax states need no conversion: the transformations of this package use the same state classes.
"""

from adam_transforms.interop import keras, tf1, tf2, torch

__all__ = ["keras", "tf1", "tf2", "torch"]


def __dir__() -> list[str]:
    return __all__
