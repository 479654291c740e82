"""The base class of the optimizers of other systems, and their (gradient, variable) lists."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_transforms._core import trees
from adam_transforms._core.sparse_rows import SparseRows, to_dense
from adam_transforms._core.state_layout import Role, find_fields
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._embeddings.value_and_grad import grad
from adam_transforms._transforms.apply_updates import apply_updates
from adam_transforms._xla.dependence import depends_on


class Variable(NamedTuple):
    """A parameter or slot, with its path in the format of `path_str`."""

    path: Path
    value: Any


class Optimizer:
    """`init`, `apply` and `get_slot` of a `transform`."""

    # {the system's name of a slot: the field of an Adam state}.
    slot_fields: ClassVar[Mapping[str, str]] = {"m": "mu", "v": "nu"}

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer as a transformation, for an Optax chain; accepts row gradients too."""
        raise NotImplementedError

    def init(self, params: Params) -> State:
        """The state before the first step; it has slots for the floating parameters."""
        return self.transform().init(trained(params))

    def apply(self, grads: Updates, params: Params, state: State) -> tuple[Params, State]:
        """One step.

        Args:
          grads: a tree like `params`; a leaf is an array, a `SparseRows` (duplicates are summed) or
            None, which leaves the parameter and its slots unchanged.
          params, state: the current parameters and state.

        Returns:
          The new (params, state).

        Raises:
          ValueError: every gradient is None, or a structure or shape differs.
        """
        leaves, _ = trees.flatten_with_paths(grads)
        if all(g is None for _, g in leaves):
            raise _no_gradients([path for path, _ in leaves])
        updates, state = self.transform().update(grads, state, trained(params))
        return apply_updates(params, updates), state

    def get_slot(self, state: State, var: Any, name: str) -> Any:
        """The slot `name` of a variable; None if there is none.

        Args:
          state: the optimizer's state.
          var: a `Variable` or another (path, value) pair, or a path.
          name: one of `get_slot_names`.
        """
        path, field_name = path_of(var), self.slot_fields.get(name)
        for field in find_fields(state, Role.SLOT):
            slots = field.leaves() if field.name == field_name else {}
            if path in slots:
                return slots[path]
        return None

    def get_slot_names(self) -> list[str]:
        """The names that `get_slot` accepts."""
        return sorted(self.slot_fields)


def trained(params: Params) -> Params:
    """`params` with None for what no loss has a gradient by, such as integers."""
    return jax.tree.map(lambda p: p if is_differentiable(p) else None, params)


def current_value(value: Any) -> Any:
    """``value()`` if it is callable without arguments; else `value`, schedules included."""
    if not callable(value):
        return value
    try:
        inspect.signature(value).bind()
    except TypeError:
        return value
    except ValueError:  # a builtin without a signature
        return value
    return value()


def densify(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, with row gradients converted to dense arrays."""
    inner = optax.with_extra_args_support(inner)

    def update(updates: Updates, state: State, params: Params = None, **extra_args: Any):
        return inner.update(to_dense(updates), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def path_of(var: Any) -> Path:
    """The path of a variable, given as a (path, value) pair or as the path itself."""
    path = (
        var[0] if isinstance(var, Sequence) and not isinstance(var, str) and len(var) == 2 else var
    )
    if not isinstance(path, str):
        raise TypeError(f"a variable must be a (path, value) pair or a path, got {var!r}")
    return path


def variables_of(params: Params) -> list[Variable]:
    """The leaves of `params` in their order."""
    variables = [Variable(path, leaf) for path, leaf in trees.flatten_with_paths(params)[0]]
    paths = [variable.path for variable in variables]
    trees.refuse_equal_paths(paths, paths)
    return variables


def selected(params: Params, var_list: Iterable[Any] | None) -> list[Variable]:
    """The variables of `params` listed in `var_list` (variables, pairs or paths); all for None.

    Raises:
      TypeError: an entry is no variable, pair or path.
      ValueError: a variable is unknown, or there are none.
    """
    variables = {variable.path: variable for variable in variables_of(params)}
    if var_list is None:
        paths = list(variables)
    else:
        paths = [path_of(var) for var in var_list]
        unknown = [path for path in paths if path not in variables]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is no parameter; the parameters are {list(variables)}"
            )
    if not paths:
        raise ValueError("there are no variables to differentiate")
    return [variables[path] for path in paths]


def compute_gradients(
    loss: Callable[[Params], Any],
    params: Params,
    var_list: Iterable[Any] | None = None,
    *,
    grad_loss: Any = None,
    rows_from: Any = None,
) -> list[tuple[Any, Variable]]:
    """The gradient of `loss` with respect to each variable.

    Args:
      loss: a function of `params`; a non-scalar result is summed.
      params: a tree of arrays.
      var_list: as for `selected`.
      grad_loss: the incoming gradient, with the shape of the loss; None for ones.
      rows_from: as for `value_and_grad`.

    Returns:
      [(gradient, variable), ...]. A gradient is an array; a `SparseRows` if `loss` only reads rows
      of the variable; None if `loss` does not depend on it.
    """
    if not callable(loss):
        raise RuntimeError(f"loss must be a function of the parameters, got {loss!r}")
    leaves, treedef = trees.flatten_with_paths(params)
    floating = {path: x for path, x in leaves if is_differentiable(x)}

    def total(floating: dict[str, Any]) -> jax.Array:
        value = jnp.asarray(loss(treedef.unflatten([floating.get(p, x) for p, x in leaves])))
        if grad_loss is not None:
            weight = jnp.asarray(grad_loss)
            if weight.shape != value.shape:
                raise ValueError(
                    f"grad_loss must have the loss's shape {list(value.shape)}, "
                    f"got {list(weight.shape)}"
                )
            value = value * weight.astype(value.dtype)
        return jnp.sum(value)

    variables = selected(params, var_list)
    grads = grad(total, rows_from=rows_from)(floating)
    flags = depends_on(total, floating)
    depends = dict(zip(sorted(floating), flags, strict=True))
    return [
        (grads[variable.path] if depends.get(variable.path) else None, variable)
        for variable in variables
    ]


def gradients_by_path(grads_and_vars: Iterable[Any], params: Params) -> dict[Path, Any]:
    """The gradients of (gradient, variable) pairs by the path of the variable.

    Raises:
      TypeError: a pair is malformed.
      ValueError: there is no gradient, or a variable is unknown or repeated.
    """
    known = [variable.path for variable in variables_of(params)]
    grads: dict[str, Any] = {}
    try:
        pairs = list(grads_and_vars)
    except TypeError:
        raise TypeError(
            f"grads_and_vars must be a list of (gradient, variable) pairs, got {grads_and_vars!r}"
        ) from None
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"expected a (gradient, variable) pair, got {pair!r}")
        g, path = pair[0], path_of(pair[1])
        if path not in known:
            raise ValueError(f"{path!r} is no parameter; the parameters are {known}")
        if path in grads:
            raise ValueError(f"{path!r} is repeated in grads_and_vars")
        grads[path] = g if g is None or isinstance(g, SparseRows) else trees.as_gradient(path, g)
    if all(g is None for g in grads.values()):
        raise _no_gradients(list(grads))
    return grads


def tree_of(grads: Mapping[Path, Any], params: Params) -> Updates:
    """Gradients by path as a tree like `params`; None for the other parameters."""
    leaves, treedef = trees.flatten_with_paths(params)
    return treedef.unflatten([grads.get(path) for path, _ in leaves])


def _no_gradients(paths: list[Path]) -> ValueError:
    return ValueError(
        f"no variable has a gradient: {paths}; the loss must depend on at least one of them"
    )


def is_differentiable(x: Any) -> bool:
    """Whether `x` is a number or an array that a loss has a gradient by."""
    is_array = isinstance(x, jax.Array | np.ndarray | np.generic | float)
    return is_array and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
