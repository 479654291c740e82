"""What Keras's optimizers offer beside the step itself: its other ways in, and state in and out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from adam_transforms._transforms.ema import finalize
from adam_transforms.compat import _optimizer
from adam_transforms.compat._optimizer import Variable
from adam_transforms.compat.keras import _variables

# What takes the place of a method that writes to variables.
INSTEAD: Mapping[str, str] = {
    "add_variable": "init(params) makes the whole state; chain a transformation of your own with "
    "transform() for slots of your own",
    "add_variable_from_reference": "init(params) makes the slots, jnp.zeros_like makes another",
    "add_slot": "init(params) makes the slots, get_slot(state, var, name) reads one",
    "add_weight": "init(params) makes the whole state, weights(state) lists it",
    "assign": "nothing is written to: a new tree takes the place of the old one, and "
    "optax.tree.set(state, name=value) makes such a state",
    "assign_add": "nothing is written to: x + value, or apply_updates(params, updates)",
    "assign_sub": "nothing is written to: x - value, or apply_updates(params, updates)",
    "get_updates": "no step is put off: minimize(loss, params, state) takes it",
    "update_step": "apply(grads, params, state) takes the step of all variables",
}


class KerasOptimizer(_optimizer.Optimizer):
    """The functional form of Keras's methods that `Adam` and `LossScaleOptimizer` share."""

    if not TYPE_CHECKING:  # which would take every name for one that there is

        def __getattr__(self, name: str) -> Any:
            instead = f": {INSTEAD[name]}" if name in INSTEAD else ""
            raise AttributeError(f"{type(self).__name__!r} has no {name!r}{instead}")

    # What the two do differently.

    @property
    def adam(self) -> Any:
        """The optimizer that holds Adam's options: itself, or the inner one."""
        return self

    def own_variables(self, state: Any) -> list[Variable]:
        """What Keras keeps before the variables of `adam`."""
        del state
        return []

    def scaled_loss(self, loss: Any, state: Any) -> Any:
        """The loss to differentiate."""
        raise NotImplementedError

    # The step.

    def build(self, params: Any) -> Any:
        """The state before the first step: `init` by Keras's name."""
        return self.init(params)

    def stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any
    ) -> tuple[Any, Any]:
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
        self, grads_and_vars: Iterable[Any], params: Any, state: Any, name: str | None = None
    ) -> tuple[Any, Any]:
        """One step with a list of gradients.

        Args:
          grads_and_vars: (gradient, variable) pairs, a variable being a (path, value) pair or a
            path. One whose gradient is None, or that is not among them, takes no step.
          params, state: as they are now.
          name: ignored.

        Returns:
          (params, state) as they are then.

        Raises:
          TypeError: `grads_and_vars` is malformed.
          ValueError: no variable has a gradient; a variable is unknown or comes twice.
        """
        del name
        return self.apply(_optimizer.gradients_tree(grads_and_vars, params), params, state)

    def minimize(
        self,
        loss: Callable[[Any], Any],
        params: Any,
        state: Any,
        var_list: Any = None,
        grad_loss: Any = None,
        name: str | None = None,
    ) -> tuple[Any, Any]:
        """One step down the gradient of `loss`, which is scaled if there is a loss scale.

        Args:
          loss: a function of the parameters; what it returns is summed if it is no scalar.
          params, state: as they are now.
          var_list: the variables to update, a list of (path, value) pairs or paths, or a function
            that returns one; None for all.
          grad_loss: an array like the loss, the gradient of whatever it goes into.
          name: ignored.

        Returns:
          (params, state) as they are then.

        Raises:
          TypeError, ValueError: as `apply_gradients`; RuntimeError: `loss` is no function.
        """
        del name
        var_list = var_list() if callable(var_list) else var_list

        def scaled(params: Any) -> Any:
            return self.scaled_loss(loss(params), state)

        checked = scaled if callable(loss) else loss
        pairs = _optimizer.compute_gradients(checked, params, var_list, grad_loss=grad_loss)
        return self.apply_gradients(pairs, params, state)

    def get_gradients(self, loss: Callable[[Any], Any], params: Any) -> list[Any]:
        """The gradients of `loss`, not scaled, in the order of the parameters' leaves.

        A gradient is a `SparseRows` where the variable is only read by row.

        Raises:
          ValueError: the loss does not depend on a variable; names all such.
        """
        pairs = _optimizer.compute_gradients(loss, params)
        without = [variable.path for gradient, variable in pairs if gradient is None]
        if without:
            raise ValueError(f"the loss does not depend on {', '.join(map(repr, without))}")
        return [gradient for gradient, _ in pairs]

    def finalize_variable_values(self, params: Any, state: Any) -> Any:
        """The parameters to keep: their averages with use_ema, else `params` as they are."""
        return finalize(params, state) if self.adam.use_ema else params

    # The state.

    def iterations(self, state: Any) -> jax.Array:
        """Updates made, int32 (): calls // gradient_accumulation_steps."""
        return _variables.adam_state(state).count

    def current_learning_rate(self, state: Any) -> jax.Array:
        """The learning rate of the next call: Keras's `learning_rate` property.

        Under accumulation a schedule is read at the calls made, as Keras reads it.
        """
        return self.adam.learning_rate_at(_variables.calls(self.adam, state))

    def get_slot(self, state: Any, var: Any, name: str) -> Any:
        """The slot called `name` of a variable; None if it has none.

        Args:
          state: the optimizer's state.
          var: a (path, value) pair, or a path.
          name: one of `get_slot_names`.
        """
        return _variables.slots(self.adam, state).get(_optimizer.path_of(var), {}).get(name)

    def get_slot_names(self) -> list[str]:
        """What `get_slot` can be asked for: Keras's names for the slots, in its order."""
        return _variables.slot_names(self.adam)

    def variables(self, state: Any, names: Sequence[str] | None = None) -> list[Variable]:
        """What the state holds, by Keras's names and in its order.

        Args:
          state: the optimizer's state.
          names: the paths of the parameters in Keras's order, that in which the model's variables
            were made; None for that of the leaves, which of a dictionary is alphabetic.
        """
        return [
            *self.own_variables(state),
            *_variables.scalars(self.adam, state),
            *_variables.slot_variables(self.adam, state, names),
        ]

    def weights(self, state: Any, names: Sequence[str] | None = None) -> list[Variable]:
        """`variables`, which r2.0 has by this name too."""
        return self.variables(state, names)

    def get_weights(self, state: Any, names: Sequence[str] | None = None) -> list[np.ndarray]:
        """The values of `variables`, as NumPy arrays."""
        return [np.asarray(variable.value) for variable in self.variables(state, names)]

    def save_own_variables(
        self, state: Any, names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """`get_weights` under the keys "0", "1", ..., as Keras stores them in a file."""
        return {str(i): array for i, array in enumerate(self.get_weights(state, names))}

    def set_weights(
        self,
        weights: Sequence[Any],
        params: Any,
        names: Sequence[str] | None = None,
        *,
        rename: Any = None,
    ) -> Any:
        """The state of `get_weights`, ours or Keras's.

        Args:
          weights: the list of arrays.
          params: the parameters, as they are there now.
          names: as for `variables`, or what the parameters are called there, for `rename`.
          rename: from a path to the name there, or to (name, axes): see `interop.keras.state_from`.

        Returns:
          The state.

        Raises:
          ValueError: something is missing, left over or of another shape; or the learning rate
            there is not this optimizer's, which a state does not hold.
        """
        if not isinstance(weights, list | tuple):
            raise TypeError(f"weights must be a list of arrays, got {weights!r:.80}")
        return _variables.loaded(self, weights, params, names, rename)

    def load_own_variables(
        self,
        store: Mapping[str, Any],
        params: Any,
        names: Sequence[str] | None = None,
        *,
        rename: Any = None,
    ) -> Any:
        """The state of `save_own_variables`, ours or Keras's.

        Args:
          store: the mapping of "0", "1", ... to arrays.
          params, names, rename: as for `set_weights`, and so are the errors.

        Returns:
          The state.
        """
        if not isinstance(store, Mapping):
            raise TypeError(f"store must be a mapping of arrays, got {store!r:.80}")
        return _variables.loaded(self, store, params, names, rename)
