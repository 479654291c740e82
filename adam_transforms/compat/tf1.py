"""TensorFlow 1's Adam optimizers: `tf.train.AdamOptimizer` and `tf.contrib.opt.LazyAdamOptimizer`.

Arguments, defaults, methods and trajectories are those of TensorFlow, but nothing is mutated: each
call takes parameters and state and returns new ones.

| TensorFlow | here |
|---|---|
| `AdamOptimizer(...)`, `LazyAdamOptimizer(...)` | the same; `use_locking` is ignored |
| `opt.minimize(loss)` | `params, state = opt.minimize(loss, params, state)` |
| `opt.compute_gradients(loss, var_list)` | `opt.compute_gradients(loss, params)` |
| `opt.apply_gradients(grads_and_vars, global_step)` | `opt.apply_gradients(pairs, params, state)` |
| `opt.get_slot(var, name)` | `opt.get_slot(state, var, name)` |
| `opt.get_slot_names()`, `opt.get_name()` | the same |
| `opt.variables()` | `opt.variables(state)` |
| running the initializer | `state = opt.init(params)` |
| `IndexedSlices` | `SparseRows` |
| a `global_step` variable | `global_step=step`; the third result is the new one |

`loss` is a function of the parameters. A variable is a (path, value) pair; arguments also accept
its path alone. `gate_gradients`, `aggregation_method` and `colocate_gradients_with_ops` are
accepted and ignored, as TensorFlow does in eager mode.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from adam_transforms._core import dtypes, trees
from adam_transforms._core.patterns import Selection
from adam_transforms._core.state_layout import Role, find_fields
from adam_transforms._core.types import Params, State, Updates
from adam_transforms._embeddings.deferred import sync
from adam_transforms._embeddings.deferred.adam import deferred_adam
from adam_transforms._embeddings.lazy import lazy
from adam_transforms._optimizers import adam
from adam_transforms._transforms import numerics
from adam_transforms._transforms.adam import (
    Hyperparameters,
    ScheduledDecayState,
    coefficients_of,
    scale_by_adam,
    update_leaves,
)
from adam_transforms._transforms.learning_rates import scale_by_learning_rate
from adam_transforms.compat import _optimizer
from adam_transforms.compat._optimizer import Variable, current_value
from adam_transforms.interop import _slots
from adam_transforms.interop.tf1 import SLOT_SUFFIXES

__all__ = ["AdamOptimizer", "LazyAdamOptimizer"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Adam(_optimizer.Optimizer):
    """The base class of the two optimizers."""

    learning_rate: Any = 0.001
    beta1: Any = 0.9
    beta2: Any = 0.999
    epsilon: Any = 1e-8
    use_locking: bool = False
    name: str = "Adam"

    GATE_NONE: ClassVar[int] = 0
    GATE_OP: ClassVar[int] = 1
    GATE_GRAPH: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a non-empty string, got {self.name!r}")
        self.transform()  # checks the other arguments

    def compute_gradients(
        self,
        loss: Callable[[Params], Any],
        var_list: Any = None,
        *,
        grad_loss: Any = None,
        params: Params = None,
        state: State = None,
        gate_gradients: Any = GATE_OP,
        aggregation_method: Any = None,
        colocate_gradients_with_ops: bool = False,
    ) -> list[tuple[Any, Variable]]:
        """The gradient of `loss` with respect to each variable.

        Args:
          loss: a function of the parameters; a non-scalar result is summed.
          var_list: the parameters, a tree of arrays; or, with `params`, the list of variables or
            paths to differentiate.
          grad_loss: the incoming gradient, with the shape of the loss; None for ones.
          params: the parameters, if `var_list` is a list.
          state: the optimizer state; required with `deferred`, else ignored.
          gate_gradients, aggregation_method, colocate_gradients_with_ops: ignored.

        Returns:
          [(gradient, variable), ...]. A gradient is an array; a `SparseRows` if `loss` only reads
          rows of the variable; None if `loss` does not depend on it.

        Raises:
          RuntimeError: `loss` is no function.
          TypeError: an entry of `var_list` is no variable.
          ValueError: there are no variables; or `grad_loss` and the loss differ in shape.

        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones(2), "table": jnp.ones((5, 1)), "unused": jnp.ones(3)}
        >>> def loss(p):
        ...     return jnp.sum(p["w"] ** 2) + jnp.sum(p["table"][jnp.array([3, 3])])
        >>> for gradient, variable in AdamOptimizer().compute_gradients(loss, params):
        ...     print(variable.path, gradient)
        table SparseRows(float32[5,1], 2 of 5 distinct rows)
        unused None
        w [2. 2.]
        """
        del gate_gradients, aggregation_method, colocate_gradients_with_ops
        if params is None:
            params, var_list = var_list, None
        return _optimizer.compute_gradients(
            loss, params, var_list, grad_loss=grad_loss, rows_from=self._rows_from(state)
        )

    def apply_gradients(
        self,
        grads_and_vars: Iterable[Any],
        params: Params,
        state: State,
        global_step: Any = None,
        name: str | None = None,
    ) -> Any:
        """One step with a list of gradients.

        Args:
          grads_and_vars: (gradient, variable) pairs from `compute_gradients`. A variable without a
            pair, or with the gradient None, is unchanged.
          params, state: the current parameters and state.
          global_step: the step count to increment, or None.
          name: ignored.

        Returns:
          (params, state), or with `global_step` (params, state, global_step + 1).

        Raises:
          TypeError: `grads_and_vars` is malformed.
          ValueError: no variable has a gradient, or a variable is unknown or repeated.
        """
        del name
        grads = _optimizer.gradients_by_path(grads_and_vars, params)
        params, state = self.apply(_optimizer.tree_of(grads, params), params, state)
        return (params, state) if global_step is None else (params, state, global_step + 1)

    def minimize(
        self,
        loss: Callable[[Params], Any],
        params: Params,
        state: State,
        global_step: Any = None,
        var_list: Iterable[Any] | None = None,
        *,
        grad_loss: Any = None,
        gate_gradients: Any = GATE_OP,
        aggregation_method: Any = None,
        colocate_gradients_with_ops: bool = False,
        name: str | None = None,
    ) -> Any:
        """One step that minimizes `loss`: `compute_gradients`, then `apply_gradients`.

        Args:
          var_list: the variables or paths to update; None for all.
          loss, params, state, global_step, grad_loss: as for these methods; other arguments are
            ignored.

        Returns:
          The result of `apply_gradients`.

        Raises:
          RuntimeError, TypeError, ValueError: the errors of both methods.

        >>> import jax.numpy as jnp
        >>> opt = AdamOptimizer(learning_rate=0.1)
        >>> params = {"w": jnp.array(1.0)}
        >>> params, state = opt.minimize(lambda p: p["w"] ** 2, params, opt.init(params))
        >>> round(float(params["w"]), 6)
        0.9
        """
        del gate_gradients, aggregation_method, colocate_gradients_with_ops
        pairs = _optimizer.compute_gradients(
            loss, params, var_list, grad_loss=grad_loss, rows_from=self._rows_from(state)
        )
        return self.apply_gradients(pairs, params, state, global_step, name)

    def get_name(self) -> str:
        """The name of the optimizer."""
        return self.name

    def variables(self, state: State) -> list[Variable]:
        """The variables in `state`, with TensorFlow's names and in its order.

        Returns:
          `beta1_power` and `beta2_power` (the powers of the next step), and for each variable
          ``<path>/<name>`` (m) and ``<path>/<name>_1`` (v), sorted by name.
        """
        found = [Variable(f"beta{i}_power", x) for i, x in enumerate(self._powers(state), start=1)]
        for field in find_fields(state, Role.SLOT):
            if field.name in SLOT_SUFFIXES:
                found += [
                    Variable(f"{path}/{self.name}{SLOT_SUFFIXES[field.name]}", slot)
                    for path, slot in trees.flatten_with_paths(field.value)[0]
                    if slot is not None
                ]
        return sorted(found, key=lambda variable: variable.path)

    def _adam(self) -> optax.GradientTransformationExtraArgs:
        """The transformation of dense gradients."""
        rate, eps = current_value(self.learning_rate), current_value(self.epsilon)
        b1, b2 = current_value(self.beta1), current_value(self.beta2)
        if not (callable(self.beta1) or callable(self.beta2)):
            return adam(rate, b1, b2, eps, eps_hat=True)
        return optax.chain(_scale_by_powers(b1, b2, eps), scale_by_learning_rate(rate))

    def _powers(self, state: State) -> list[jax.Array]:
        """The powers of beta1 and beta2 at the next step."""
        scheduled = trees.find_states(state, ScheduledDecayState)
        if scheduled:
            return [1.0 - correction for correction in scheduled[0].corrections]
        (found,) = _slots.adam_states(state)
        return [
            1.0 - numerics.bias_correction(current_value(b), found.count + 1)
            for b in (self.beta1, self.beta2)
        ]

    def _rows_from(self, state: State) -> State | None:
        """The state with the pending updates of deferred tables; None if no table is deferred."""
        return None


def _scale_by_powers(b1: Any, b2: Any, eps: Any) -> optax.GradientTransformationExtraArgs:
    """Adam with the current betas `b1` and `b2`, bias-corrected by TensorFlow's powers.

    TensorFlow stores the powers of the betas as variables. They start at the first betas, and each
    step multiplies them by the current betas after using them: at step t the power contains the
    first beta twice and the current one not yet.
    """
    hp = Hyperparameters(b1, b2, eps, 0.0, None, None, eps_hat=True).checked()
    scale = scale_by_adam(b1, b2, eps, eps_hat=True)

    def init(params: Params) -> State:
        dtype = dtypes.scalar_dtype()
        first = [jnp.asarray(1.0 - dtypes.as_scalar(b), dtype) for b in (hp.b1, hp.b2)]
        return ScheduledDecayState((first[0], first[1]), scale.init(params))

    def update(updates: Updates, state: State, params: Params = None, **_: Any):
        inner = state.inner_state
        c = coefficients_of(hp, inner.count, hp.b1, hp.b2, list(state.corrections))
        updates, inner = update_leaves(hp, c, updates, inner, params)
        corrections = [
            numerics.moving_average(correction, 1.0, b)
            for correction, b in zip(state.corrections, (hp.b1, hp.b2), strict=True)
        ]
        return updates, ScheduledDecayState((corrections[0], corrections[1]), inner)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True, eq=False)
class AdamOptimizer(_Adam):
    r"""`tf.train.AdamOptimizer`.

    .. math::
      \theta_t = \theta_{t-1} - \eta \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
                 \frac{m_t}{\sqrt{v_t} + \hat\epsilon}

    A row gradient is the dense array with duplicates summed, as in TensorFlow: all rows of m and v
    decay, and all rows of the table are updated.

    Args:
      learning_rate: a number, a scalar array, a schedule ``count -> value``, or a callable without
        arguments that returns the current value (under `jax.jit`, it is called at each trace).
      beta1, beta2, epsilon: numbers, scalar arrays or callables without arguments. If a beta is a
        callable, bias corrections use running products of the betas, as in TensorFlow.
      use_locking: ignored.
      name: the name of the slots in `variables`.
      deferred: True to update tables by `deferred_adam`: the same trajectory at the cost of the
        rows in the gradient. Tables are all real floating parameters of two or more dimensions, or
        those that patterns or a predicate select, as for `deferred_adam`. `minimize`, and
        `compute_gradients` with the `state`, read rows with all pending updates applied. Call
        `flush` before other code reads a table.

    Raises:
      ValueError, TypeError: an argument is out of range, or of the wrong type.

    References:
      https://www.tensorflow.org/api_docs/python/tf/compat/v1/train/AdamOptimizer

    >>> import jax, jax.numpy as jnp
    >>> opt = AdamOptimizer(learning_rate=0.1)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> state = opt.init(params)
    >>> params, state = jax.jit(opt.apply)({"w": jnp.array([3.0, -4.0])}, params, state)
    >>> params["w"].round(3).tolist()
    [0.9..., -1.9...]
    """

    _: dataclasses.KW_ONLY
    deferred: bool | Selection = False

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer as a transformation, for an Optax chain; accepts row gradients too."""
        if self.deferred is False:
            return _optimizer.densify(self._adam())
        for name in ("beta1", "beta2", "epsilon"):
            if callable(getattr(self, name)):
                raise TypeError(f"with deferred, {name} must be a number, got a callable")
        return deferred_adam(
            current_value(self.learning_rate),
            *(self.beta1, self.beta2, self.epsilon),
            tables=_is_table if self.deferred is True else self.deferred,
            eps_hat=True,
        )

    def flush(self, params: Params, state: State) -> tuple[Params, State]:
        """Applies all pending updates, so that every row has TensorFlow's value.

        Required before other code reads a deferred table. Without `deferred`, changes nothing.
        """
        return (params, state) if self.deferred is False else sync.flush(params, state)

    def _rows_from(self, state: State) -> State | None:
        if self.deferred is False:
            return None
        if state is None:
            raise ValueError("with deferred, compute_gradients needs the state=, got None")
        return state


def _is_table(path: str, leaf: Any) -> bool:
    return jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


@dataclasses.dataclass(frozen=True, eq=False)
class LazyAdamOptimizer(_Adam):
    """`tf.contrib.opt.LazyAdamOptimizer`: a row gradient updates only its own rows.

    Moments and parameters of the other rows stay bit-identical; the bias correction counts all
    steps. The other arguments and the update of dense gradients are those of `AdamOptimizer`.

    Args:
      tables: the parameters whose gradients must have rows, as in `adam_transforms.lazy`.

    References:
      https://github.com/tensorflow/tensorflow/blob/r1.15/tensorflow/contrib/opt/python/training/lazy_adam_optimizer.py

    >>> import jax.numpy as jnp
    >>> from adam_transforms import SparseRows
    >>> opt = LazyAdamOptimizer(learning_rate=0.1)
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> rows = SparseRows(jnp.array([2, 2]), jnp.array([[3.0], [1.0]]), num_rows=4)
    >>> params, state = opt.apply({"table": rows}, params, opt.init(params))
    >>> params["table"].round(3).tolist()
    [[0.0], [0.0], [-0.1...], [0.0]]
    """

    _: dataclasses.KW_ONLY
    tables: Selection | None = None

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer as a transformation, for an Optax chain; accepts row gradients too."""
        return lazy(self._adam(), tables=self.tables)


def __dir__() -> list[str]:
    return __all__
