"""Keras's optimizer methods: steps, slots and variables, saving and loading."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from adam_transforms._core import trees
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._transforms.ema import finalize
from adam_transforms.compat import _optimizer
from adam_transforms.compat._optimizer import Variable
from adam_transforms.compat.keras import _variables

# {name that an optimizer of Keras has and these have not: its replacement}.
REPLACEMENTS: Mapping[str, str] = {
    "add_optimizer_variables": "init(params) makes the slots, jnp.zeros_like makes others",
    "add_variable": "init(params) makes the whole state; chain a transformation to transform() "
    "for additional slots",
    "add_variable_from_reference": "init(params) makes the slots, jnp.zeros_like makes others",
    "add_slot": "init(params) makes the slots, get_slot(state, var, name) reads one",
    "add_weight": "init(params) makes the whole state, weights(state) lists it",
    "assign": "nothing is mutated: make a new tree, or a new state by "
    "optax.tree.set(state, name=value)",
    "assign_add": "nothing is mutated: x + value, or apply_updates(params, updates)",
    "assign_sub": "nothing is mutated: x - value, or apply_updates(params, updates)",
    "check_finite": "apply skips a step that is not finite, dynamic_scale(state) tells of it",
    "gradient_aggregator": "reduce the gradients before apply, as all_reduce_rows does",
    "gradient_transformers": "chain transformations before transform()",
    "get_updates": "steps are not deferred: minimize(loss, params, state) makes one",
    "lr": "Keras 3 has learning_rate only, legacy=True has both names",
    "update_step": "apply(grads, params, state) updates all variables",
}


class KerasOptimizer(_optimizer.Optimizer):
    """Keras's methods in functional form; the base of `Adam` and `LossScaleOptimizer`."""

    if not TYPE_CHECKING:  # a type checker would accept every name

        def __getattr__(self, name: str) -> Any:
            hint = f": {REPLACEMENTS[name]}" if name in REPLACEMENTS else ""
            raise AttributeError(f"{type(self).__name__!r} has no {name!r}{hint}")

    # Overridden by subclasses.

    @property
    def adam(self) -> Any:
        """The optimizer with Adam's options: this one or the inner one."""
        return self

    def own_variables(self, state: State) -> list[Variable]:
        """The variables that precede those of `adam`."""
        del state
        return []

    def scaled_loss(self, loss: Any, state: State) -> Any:
        """The loss to differentiate."""
        raise NotImplementedError

    @property
    def lr(self) -> Any:
        """r2.0's second name of the learning rate; Keras 3 has none."""
        if not self.adam.legacy:
            raise AttributeError("lr")  # __getattr__ names the replacement
        return self.adam.learning_rate

    # The step.

    def apply(self, grads: Updates, params: Params, state: State) -> tuple[Params, State]:
        """One step, as `Optimizer.apply` makes it.

        Warns:
          UserWarning: names the floating parameters whose gradient is None, as Keras does; under
            `jax.jit` when the step is traced.
        """
        leaves, _ = trees.flatten_with_paths(grads)
        absent = [path for path, g in leaves if g is None]
        if len(absent) < len(leaves):
            _warn_of_absent(absent, params)
        return super().apply(grads, params, state)

    def build(self, params: Params) -> State:
        """The state before the first step: Keras's name of `init`."""
        return self.init(params)

    def stateless_apply(
        self, optimizer_variables: State, grads: Updates, trainable_variables: Params
    ) -> tuple[Params, State]:
        """`apply` with Keras's order of arguments.

        Args:
          optimizer_variables: the state.
          grads: as for `apply`.
          trainable_variables: the parameters.

        Returns:
          (trainable_variables, optimizer_variables) after the step.
        """
        return self.apply(grads, trainable_variables, optimizer_variables)

    def apply_gradients(
        self, grads_and_vars: Iterable[Any], params: Params, state: State, name: str | None = None
    ) -> tuple[Params, State]:
        """One step with a list of gradients.

        Args:
          grads_and_vars: (gradient, variable) pairs; a variable is a (path, value) pair or a path.
            A variable without a pair, or with the gradient None, takes no step.
          params, state: the current parameters and state.
          name: ignored.

        Returns:
          The new (params, state).

        Warns:
          UserWarning: names the variables whose gradient is None, as for `apply`.

        Raises:
          TypeError: `grads_and_vars` is malformed.
          ValueError: no variable has a gradient, or a variable is unknown or repeated.
        """
        del name
        grads = _optimizer.gradients_by_path(grads_and_vars, params)
        _warn_of_absent([path for path, g in grads.items() if g is None], params)
        return super().apply(_optimizer.tree_of(grads, params), params, state)

    def minimize(
        self,
        loss: Callable[[Params], Any],
        params: Params,
        state: State,
        var_list: Any = None,
        grad_loss: Any = None,
        name: str | None = None,
    ) -> tuple[Params, State]:
        """One step that minimizes `loss`, multiplied by the loss scale if there is one.

        Args:
          loss: a function of the parameters; a non-scalar result is summed.
          params, state: the current parameters and state.
          var_list: the variables to update: a list of (path, value) pairs or paths, or a function
            that returns such a list; None for all.
          grad_loss: the incoming gradient, with the shape of the loss; None for ones.
          name: ignored.

        Returns:
          The new (params, state).

        Raises:
          TypeError, ValueError: an error of `apply_gradients`.
          RuntimeError: `loss` is no function.
        """
        del name
        var_list = var_list() if callable(var_list) else var_list

        def scaled(params: Params) -> Any:
            return self.scaled_loss(loss(params), state)

        objective = scaled if callable(loss) else loss  # not callable: compute_gradients raises
        pairs = _optimizer.compute_gradients(objective, params, var_list, grad_loss=grad_loss)
        return self.apply_gradients(pairs, params, state)

    def get_gradients(self, loss: Callable[[Params], Any], params: Params) -> list[Any]:
        """The gradients of the unscaled `loss`, in the order of the leaves of `params`.

        A gradient is a `SparseRows` if `loss` only reads rows of the variable.

        Raises:
          ValueError: lists the variables that the loss does not depend on.
        """
        pairs = _optimizer.compute_gradients(loss, params)
        independent = [variable.path for gradient, variable in pairs if gradient is None]
        if independent:
            raise ValueError(f"the loss does not depend on {', '.join(map(repr, independent))}")
        return [gradient for gradient, _ in pairs]

    def finalize_variable_values(self, params: Params, state: State) -> Params:
        """The final parameters: with use_ema their averages, else `params`."""
        return finalize(params, state) if self.adam.use_ema else params

    # The state.

    def iterations(self, state: State) -> jax.Array:
        """The number of updates, int32 (): calls // gradient_accumulation_steps."""
        return _variables.adam_state(state).count

    def current_learning_rate(self, state: State) -> jax.Array:
        """The learning rate of the next call: Keras's `learning_rate` property.

        The argument of a schedule is the number of calls, under accumulation too, as in Keras.
        """
        return self.adam.learning_rate_at(_variables.calls(self.adam, state))

    def get_slot(self, state: State, var: Any, name: str) -> Any:
        """The slot `name` of a variable; None if there is none.

        Args:
          state: the optimizer's state.
          var: a (path, value) pair, or a path.
          name: one of `get_slot_names`.
        """
        return _variables.slots(self.adam, state).get(_optimizer.path_of(var), {}).get(name)

    def get_slot_names(self) -> list[str]:
        """The names that `get_slot` accepts: Keras's names of the slots, in its order."""
        return _variables.slot_names(self.adam)

    def variables(self, state: State, names: Sequence[Path] | None = None) -> list[Variable]:
        """The variables in the state, with Keras's names and in its order.

        Args:
          state: the optimizer's state.
          names: the paths of the parameters in Keras's order, in which the model created its
            variables; None for the order of the leaves (alphabetical for a dictionary).
        """
        return [
            *self.own_variables(state),
            *_variables.scalar_variables(self.adam, state),
            *_variables.slot_variables(self.adam, state, names),
        ]

    def weights(self, state: State, names: Sequence[Path] | None = None) -> list[Variable]:
        """The same as `variables`; r2.0 has both names."""
        return self.variables(state, names)

    def get_weights(self, state: State, names: Sequence[Path] | None = None) -> list[np.ndarray]:
        """The values of `variables`, as NumPy arrays."""
        return [np.asarray(variable.value) for variable in self.variables(state, names)]

    def save_own_variables(
        self, state: State, names: Sequence[Path] | None = None
    ) -> dict[str, np.ndarray]:
        """`get_weights` with the keys "0", "1", ..., as in Keras's files."""
        return {str(i): array for i, array in enumerate(self.get_weights(state, names))}

    def set_weights(
        self,
        weights: Sequence[Any],
        params: Params,
        names: Sequence[str] | None = None,
        *,
        rename: Any = None,
    ) -> State:
        """The state of the result of `get_weights`, of this class or of Keras.

        Args:
          weights: the list of arrays, or the result of `variables`.
          params: the current parameters.
          names: as for `variables`; with `rename`, the Keras names in the same order.
          rename: maps a path to the Keras name or to (name, axes); see `interop.keras.state_from`.

        Returns:
          The state.

        Raises:
          ValueError: an array is missing, left over or of another shape; a variable has another
            name than the one in its place; or the stored learning rate, which a state does not
            contain, differs from this optimizer's.
        """
        if not isinstance(weights, list | tuple):
            raise TypeError(f"weights must be a list of arrays, got {weights!r:.80}")
        arrays = [w.value if isinstance(w, Variable) else w for w in weights]
        state = _variables.load_state(self, arrays, params, names, rename)
        if rename is None:
            _variables.check_names(weights, self.variables(state, names))
        return state

    def load_own_variables(
        self,
        store: Mapping[str, Any],
        params: Params,
        names: Sequence[str] | None = None,
        *,
        rename: Any = None,
    ) -> State:
        """The state of the result of `save_own_variables`, of this class or of Keras.

        Args:
          store: the mapping of "0", "1", ... to arrays.
          params, names, rename: as for `set_weights`.

        Returns:
          The state.

        Raises:
          TypeError, ValueError: the errors of `set_weights`.
        """
        if not isinstance(store, Mapping):
            raise TypeError(f"store must be a mapping of arrays, got {store!r:.80}")
        return _variables.load_state(self, store, params, names, rename)


def _warn_of_absent(paths: Sequence[Path], params: Params) -> None:
    """Warns, in Keras's words, of the floating parameters among `paths`, which have no gradient."""
    if not paths:
        return
    leaves, _ = trees.flatten_with_paths(params)
    floating = {path for path, p in leaves if _optimizer.is_differentiable(p)}
    absent = [path for path in paths if path in floating]
    if absent:
        warnings.warn(
            f"Gradients do not exist for variables {absent} when minimizing the loss: "
            "they take no step",
            stacklevel=3,
        )
