"""Row gradients of Flax NNX modules, and Flax serialization of `SparseRows`.

``import adam_transforms`` does not import this module, because it needs Flax.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, serialization

from adam_transforms._core import trees
from adam_transforms._core.key_type import KEY_TYPE
from adam_transforms._core.patterns import Selection
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._embeddings import value_and_grad as _row_gradients

__all__ = ["grad", "value_and_grad"]


def value_and_grad(
    f: Callable[..., Any],
    *,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    has_aux: bool = False,
    tables: Selection = "auto",
    rows_from: Any = None,
) -> Callable[..., tuple[Any, Any]]:
    r"""As `flax.nnx.value_and_grad`, but the gradient of a table is a `SparseRows`.

    The equivalent of `adam_transforms.value_and_grad` for modules. `f` may draw from their
    `nnx.Rngs` and change variables that are not differentiated (batch statistics, counts, metrics);
    the modules passed in keep these changes.

    Args:
      f: a function of modules and any other arguments; returns a scalar, or with `has_aux`
        (scalar, aux).
      argnums: the positions of the arguments to differentiate. Of a module, its `nnx.Param` are
        differentiated; ``nnx.DiffState(i, filter)`` selects other variables. For a sequence, the
        gradient is a tuple.
      has_aux: whether `f` returns a pair.
      tables, rows_from: as for `adam_transforms.value_and_grad`. Paths are relative to the module;
        `rows_from` is the ``opt_state`` of an `nnx.Optimizer`.

    Returns:
      A function from `f`'s arguments to (value, gradient). The value is `f`'s result. The gradient
      is an `nnx.State` of the differentiated variables, for ``optimizer.update(model, gradient)``.

    Raises:
      TypeError: `f` is not callable, or a differentiated argument is not passed by position.
      ValueError: `f` changes a differentiated variable; or an error of
        `adam_transforms.value_and_grad`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import adam_transforms as at
    >>> model = nnx.Embed(1000, 2, rngs=nnx.Rngs(0))
    >>> tx = at.lazy_adam(0.1, tables="embedding")
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> def loss(model, ids):
    ...     return jnp.sum((model(ids) - 1.0) ** 2)
    >>> @nnx.jit
    ... def step(model, optimizer, ids):
    ...     value, grads = value_and_grad(loss)(model, ids)
    ...     optimizer.update(model, grads)
    ...     return value
    >>> ids = jnp.array([3, 1])
    >>> before = step(model, optimizer, ids)
    >>> bool(step(model, optimizer, ids) < before)
    True
    """
    _row_gradients.check_loss(f)
    is_single = isinstance(argnums, int | nnx.DiffState)
    sequence = [argnums] if is_single else argnums
    wanted = [x if isinstance(x, nnx.DiffState) else nnx.DiffState(x, nnx.Param) for x in sequence]

    @functools.wraps(f)
    def value_and_grad_of(*args: Any, **kwargs: Any) -> Any:
        filters = {_position(x.argnum, args): nnx.filterlib.to_predicate(x.filter) for x in wanted}

        def is_chosen(path: tuple[Any, ...], x: Any) -> bool:
            is_keyword, position, *rest = path
            return not is_keyword and position in filters and filters[position](tuple(rest), x)

        # One split for all arguments, because they may share variables.
        graphdef, chosen, rest = nnx.split((args, kwargs), is_chosen, ...)
        modules = filters.keys() & _positions_of_variables(chosen, rest)
        inputs = [_state_at(chosen, i) if i in modules else args[i] for i in filters]

        def pure(*inputs: Any) -> Any:
            by_position = dict(zip(filters, inputs, strict=True))
            states = nnx.State({0: {i: by_position[i] for i in modules}})
            before = jax.tree.leaves_with_path(states)
            # Merged into new variables, which belong to this trace and may change in it.
            inner_args, inner_kwargs = nnx.merge(graphdef, states, jax.tree.map(lambda x: x, rest))
            result = f(
                *(x if i in modules else by_position.get(i, x) for i, x in enumerate(inner_args)),
                **inner_kwargs,
            )
            value, aux = result if has_aux else (result, None)
            inner = (inner_args, inner_kwargs)
            _, after, changed, _ = nnx.split(inner, is_chosen, nnx.Variable, ...)
            _refuse_changes(before, jax.tree.leaves_with_path(after))
            return value, (aux, changed)

        differentiated = _row_gradients.value_and_grad(
            pure, range(len(inputs)), has_aux=True, tables=tables, rows_from=rows_from
        )
        (value, (aux, changed)), grads = differentiated(*inputs)
        nnx.update((args, kwargs), changed)
        return ((value, aux) if has_aux else value), (grads[0] if is_single else grads)

    return value_and_grad_of


def grad(
    f: Callable[..., Any],
    *,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    has_aux: bool = False,
    tables: Selection = "auto",
    rows_from: Any = None,
) -> Callable[..., Any]:
    """As `flax.nnx.grad`, but the gradient of a table is a `SparseRows`: see `value_and_grad`.

    Returns:
      A function from `f`'s arguments to its gradient, or with `has_aux` to (gradient, aux). The
      `nnx.eval_shape` of the gradient can be the `like` of `accumulate`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx.Embed(1000, 2, rngs=nnx.Rngs(0))
    >>> grads = grad(lambda model: jnp.sum(model(jnp.array([3]))))(model)
    >>> nnx.to_pure_dict(grads)["embedding"]
    SparseRows(float32[1000,2], 1 of 1000 distinct rows)
    """
    both = value_and_grad(f, argnums=argnums, has_aux=has_aux, tables=tables, rows_from=rows_from)

    @functools.wraps(f)
    def grad_of(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_of


def _position(argnum: int, args: Sequence[Any]) -> int:
    if not -len(args) <= argnum < len(args):
        raise TypeError(
            f"argument {argnum} is to be differentiated and must be given by position, "
            f"but {len(args)} are"
        )
    return argnum % len(args)


def _positions_of_variables(*states: Any) -> set[Any]:
    """The positions of arguments that contain NNX variables, not only plain arrays."""
    return {
        path[1]
        for state in states
        for path, x in nnx.to_flat_state(state)
        if path[0] == 0 and isinstance(x, nnx.Variable)
    }


def _state_at(chosen: Any, position: int) -> Any:
    """The differentiated variables of one argument."""
    return chosen.get(0, {}).get(position, nnx.State({}))


def _refuse_changes(before: Sequence[Any], after: Sequence[Any]) -> None:
    """Raises ValueError if the function has assigned to a differentiated variable."""
    arrays = dict(before)
    for path, x in after:
        if arrays.get(path) is not x:
            raise ValueError(
                f"{trees.path_str(path[2:])!r} is differentiated, but the function changes it"
            )


# ---- serialization ------------------------------------------------------------------------------


def _to_state_dict(rows: SparseRows) -> dict[str, Any]:
    values, keys = jax.tree.leaves(rows)
    return {"values": values, "indices": jax.random.key_data(keys)}


def _from_state_dict(rows: SparseRows, state: dict[str, Any]) -> SparseRows:
    keys = jax.random.wrap_key_data(jnp.asarray(state["indices"]), impl=KEY_TYPE)
    return jax.tree.structure(rows).unflatten([state["values"], keys])


serialization.register_serialization_state(SparseRows, _to_state_dict, _from_state_dict)


def __dir__() -> list[str]:
    return __all__
