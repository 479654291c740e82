"""The dtype of the indices of `SparseRows`: that of PRNG keys, under a name of its own."""

from typing import Any

from jax.extend.random import define_prng_impl, threefry_prng_impl


class _Tag(str):
    """Equal to the tag of JAX's keys, but shown as other words.

    With a tag that differs the indices would have a dtype that `jax.export` does not serialize and
    Orbax does not restore. As it is, JAX's caches may show keys of the same shape by either name.
    """

    def __str__(self) -> str:
        return "SparseRows indices: see adam_transforms.lazy"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __reduce__(self) -> Any:
        return str, (threefry_prng_impl.tag,)  # A pickle does not need this class.


_fields: dict[str, Any] = threefry_prng_impl._asdict()
KEY_TYPE = define_prng_impl(**{**_fields, "tag": _Tag(_fields["tag"])})
"""For `jax.random.wrap_key_data`. JAX's errors call it ``key<SparseRows indices: see ...>``."""
