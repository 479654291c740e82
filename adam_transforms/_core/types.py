"""Names for the trees that transformations take and return.

JAX has no type for "a tree of arrays", so that each is `Any` to a type checker; the names tell a
reader which tree is meant. Functions that return the tree that they were given use `P` and `S`, and
functions that return one with the arguments of another `A`.
"""

from typing import Any, ParamSpec, TypeAlias, TypeVar

Params: TypeAlias = Any
"""The parameters: a tree of arrays, in which None stands for a parameter left out."""

Updates: TypeAlias = Any
"""Gradients, or what is added to the parameters: like `Params`, with `SparseRows` for some leaves
and None where there is no gradient."""

State: TypeAlias = Any
"""An optimizer state: a tree of arrays in NamedTuples, tuples and dictionaries."""

Path: TypeAlias = str
"""Where a leaf is in its tree, as `path_str` writes it."""

P = TypeVar("P")
S = TypeVar("S")
A = ParamSpec("A")
