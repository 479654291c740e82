"""Comparing a restored state with the state of the current configuration."""

from adam_transforms._core import state_check
from adam_transforms._core.types import State

_MOST_LINES = 30


def check_state(state: State, like: State) -> None:
    """Refuses a state that another configuration has made; names every difference.

    A checkpoint library may cast dtypes silently, accept arrays of any shape, or refuse them
    without their paths. This function compares all paths, shapes and dtypes, and for
    `deferred_adam` the decay rates and epsilon of the pending updates.

    Args:
      state: the restored state, or its description: any tree of arrays, `jax.ShapeDtypeStruct` or
        Orbax metadata, e.g. a state, or ``{"params": params, "state": state}``.
      like: the same tree from the current configuration, e.g. ``tx.init(params)``, or
        `jax.eval_shape` of it.

    Raises:
      ValueError: the trees differ; names the paths, the found and the expected arrays.

    Containers may differ in type, because checkpoints store a NamedTuple as a dictionary. PRNG keys
    are compared as the ``uint32`` arrays that checkpoints store.

    >>> import jax.numpy as jnp
    >>> from adam_transforms import adam
    >>> params = {"w": jnp.zeros(3)}
    >>> check_state(adam().init(params), like=adam(1e-4).init(params))
    >>> check_state(adam().init(params), like=adam(mu_dtype="bfloat16", amsgrad=True).init(params))
    Traceback (most recent call last):
        ...
    ValueError: the state is not as this configuration makes it:
      '0/mu/w' is float32[3], expected bfloat16[3]
      '0/nu_max' is missing
    """
    lines = state_check.differences(state, like)
    if lines:
        shown = state_check.shortened(lines, _MOST_LINES)
        listed = "\n  ".join([state_check.HEADING, *shown])
        if state_check.holds_states(state) and not state_check.holds_states(like):
            listed += (
                "\nIf `like` is the restored tree: check_state(restored, like=tx.init(params))"
            )
        raise ValueError(listed)
