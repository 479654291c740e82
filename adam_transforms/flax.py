"""Row gradients of Flax NNX modules, and in Flax's own serialization.

Not imported with the package: ``import adam_transforms.flax`` needs Flax.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, serialization

from adam_transforms._core import trees
from adam_transforms._core.sparse_rows import SparseRows
from adam_transforms._embeddings import value_and_grad as _row_gradients


def value_and_grad(
    f: Callable[..., Any],
    *,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    has_aux: bool = False,
    tables: Any = "auto",
    rows_from: Any = None,
) -> Callable[..., Any]:
    r"""As `flax.nnx.value_and_grad`, but the gradient of a table is a `SparseRows`.

    What `adam_transforms.value_and_grad` does for trees of arrays this does for modules: `f` may
    draw from their `nnx.Rngs` and change what is not differentiated (batch statistics, counts,
    metrics), and afterwards these have changed.

    Args:
      f: returns a scalar, or (scalar, anything) with `has_aux`; of arguments that are modules or
        anything else.
      argnums: which positional arguments to differentiate, of a module its `nnx.Param`;
        ``nnx.DiffState(i, filter)`` chooses other variables. Several give a tuple of gradients.
      has_aux: whether `f` returns a pair.
      tables, rows_from: as for `adam_transforms.value_and_grad`; the paths are those within the
        module, and `rows_from` is the ``opt_state`` of an `nnx.Optimizer`.

    Returns:
      A function from `f`'s arguments to (value, gradient), value being `f`'s result, and gradient
      an `nnx.State` of the variables differentiated, which ``optimizer.update(model, gradient)``
      takes.

    Raises:
      TypeError: a differentiated argument is not given by position.
      ValueError: `f` changes a variable that is differentiated; and as for
        `adam_transforms.value_and_grad`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import adam_transforms as at
    >>> model = nnx.Embed(1000, 2, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, at.lazy_adam(0.1), wrt=nnx.Param)
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
    is_one = isinstance(argnums, int | nnx.DiffState)
    several = [argnums] if is_one else argnums
    wanted = [x if isinstance(x, nnx.DiffState) else nnx.DiffState(x, nnx.Param) for x in several]

    @functools.wraps(f)
    def value_and_grad_of(*args: Any, **kwargs: Any) -> Any:
        filters = {_position(x.argnum, args): nnx.filterlib.to_predicate(x.filter) for x in wanted}

        def is_chosen(path: tuple[Any, ...], x: Any) -> bool:
            of_args, position, *rest = path
            return of_args == 0 and position in filters and filters[position](tuple(rest), x)

        # Together, for arguments may share variables.
        graphdef, chosen, rest = nnx.split((args, kwargs), is_chosen, ...)
        modules = filters.keys() & _positions_of_variables(chosen, rest)
        parts = [_part(chosen, i) if i in modules else args[i] for i in filters]

        def of_parts(*parts: Any) -> Any:
            of_position = dict(zip(filters, parts, strict=True))
            states = nnx.State({0: {i: of_position[i] for i in modules}})
            before = jax.tree.leaves_with_path(states)
            # New variables, which can be changed where the function is traced.
            inner_args, inner_kwargs = nnx.merge(graphdef, states, jax.tree.map(lambda x: x, rest))
            result = f(
                *(x if i in modules else of_position.get(i, x) for i, x in enumerate(inner_args)),
                **inner_kwargs,
            )
            value, aux = result if has_aux else (result, None)
            inner = (inner_args, inner_kwargs)
            _, after, changed, _ = nnx.split(inner, is_chosen, nnx.Variable, ...)
            _refuse_changes(before, jax.tree.leaves_with_path(after))
            return value, (aux, changed)

        differentiated = _row_gradients.value_and_grad(
            of_parts, range(len(parts)), has_aux=True, tables=tables, rows_from=rows_from
        )
        (value, (aux, changed)), grads = differentiated(*parts)
        nnx.update((args, kwargs), changed)
        return ((value, aux) if has_aux else value), (grads[0] if is_one else grads)

    return value_and_grad_of


def grad(
    f: Callable[..., Any],
    *,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    has_aux: bool = False,
    tables: Any = "auto",
    rows_from: Any = None,
) -> Callable[..., Any]:
    """As `flax.nnx.grad`, but the gradient of a table is a `SparseRows`: see `value_and_grad`.

    Returns:
      A function from `f`'s arguments to its gradient, or to (gradient, aux) with `has_aux`. What
      `nnx.eval_shape` says of the gradient is what `accumulate` takes for `like`.

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
    """Which arguments have variables in them, and are no plain trees of arrays."""
    return {
        path[1]
        for state in states
        for path, x in nnx.to_flat_state(state)
        if path[0] == 0 and isinstance(x, nnx.Variable)
    }


def _part(chosen: Any, position: int) -> Any:
    """What is chosen of one argument."""
    return chosen.get(0, {}).get(position, nnx.State({}))


def _refuse_changes(before: Sequence[Any], after: Sequence[Any]) -> None:
    """Refuses a function that has changed what it is differentiated in."""
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
    keys = jax.random.wrap_key_data(jnp.asarray(state["indices"]), impl="threefry2x32")
    return jax.tree.structure(rows).unflatten([state["values"], keys])


serialization.register_serialization_state(SparseRows, _to_state_dict, _from_state_dict)
