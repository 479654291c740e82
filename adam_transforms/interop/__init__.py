"""The state of a running optimizer, in from PyTorch, Keras and TensorFlow 1 and back out.

Arrays come and go by name, as NumPy arrays, and none of the other systems is imported. Optax's
states need nothing of the kind: they are the ones that this package's transformations keep.
"""

from adam_transforms.interop import keras, tf1, torch

__all__ = ["keras", "tf1", "torch"]
