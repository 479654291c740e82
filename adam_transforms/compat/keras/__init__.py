"""Keras's Adam in functional form: Keras 3's, r2.0's with `legacy=True`, and `LossScaleOptimizer`.

Arguments, defaults, methods, counters and trajectories are those of Keras, but nothing is mutated:
each call takes parameters and state and returns new ones. A variable is given by its path, or as a
(path, value) pair.

| Keras | here |
|---|---|
| `Adam(...)`, `AdamW(...)`, `LossScaleOptimizer(...)` | the same arguments |
| `Adam(lr=0.1)`, `opt.lr` of r2.0 | `Adam(lr=0.1, legacy=True)`, `opt.lr` |
| `schedules.ExponentialDecay(...)` and the others | the same, in `schedules` |
| `build(var_list)` | `state = opt.build(params)`, or `init` |
| `apply(grads)` | `params, state = opt.apply(grads, params, state)` |
| `apply_gradients(grads_and_vars)` | `params, state = opt.apply_gradients(pairs, params, state)` |
| `stateless_apply(...)` | `params, state = opt.stateless_apply(state, grads, params)` |
| `minimize(loss, var_list)` | `params, state = opt.minimize(loss, params, state)` |
| `get_gradients(loss, params)` | the same; `loss` is a function of the parameters |
| `scale_loss(loss)` | the same; `scale_loss(loss, state)` of a `LossScaleOptimizer` |
| `exclude_from_weight_decay(var_list, var_names)` | `opt = opt.exclude_from_weight_decay(...)` |
| `finalize_variable_values(var_list)` | `params = opt.finalize_variable_values(params, state)` |
| `iterations` | `opt.iterations(state)` |
| `learning_rate` | as given; `opt.current_learning_rate(state)` for its current value |
| `learning_rate = value` | `opt = dataclasses.replace(opt, learning_rate=value)`; the state fits |
| `dynamic_scale`, `step_counter` | `opt.dynamic_scale(state)`, `opt.step_counter(state)` |
| `variables` | `opt.variables(state)`: (path, value) pairs with Keras's names and order |
| `weights` | `opt.weights(state)`: the same |
| `get_slot(var, name)` | `opt.get_slot(state, var, name)` |
| `get_slot_names()` | the same |
| `get_weights()` | `opt.get_weights(state)` |
| `set_weights(weights)` | `state = opt.set_weights(weights, params)` |
| `save_own_variables(store)` | `store = opt.save_own_variables(state)` |
| `load_own_variables(store)` | `state = opt.load_own_variables(store, params)` |
| `get_config()` | the same |
| `from_config(config)` | the same |
| `serialize(opt)`, `deserialize(config)`, `get("adam")` | functions of this module |
| `add_variable` | none: `init` makes the state; chain a transformation to `opt.transform()` |
| `add_variable_from_reference`, `add_optimizer_variables` | none: `init` makes the slots |
| `add_slot` | none: `init` makes the slots |
| `add_weight` | none: `init` makes the state |
| `assign` | none: a new tree replaces the old one |
| `assign_add` | none: `x + value`, or `apply_updates` |
| `assign_sub` | none: `x - value`, or `apply_updates` |
| `check_finite` | none: `apply` skips a step that is not finite |
| `gradient_transformers`, `gradient_aggregator` | none: transform the gradients before `apply` |
| `get_updates(loss, params)` | none: `minimize` makes the step |
| `update_step(gradient, variable)` | none: `apply` updates all variables |
| `constraint` | none: project the new parameters, as with `optax.projections` |
| `overwrite_with_gradient` | none: keep it out of `params`, take its gradient as its value |

A method without a counterpart raises an AttributeError that names the replacement. The names of
operations (`name` of `apply_gradients` and `minimize`) are ignored. There is no locking.

Intended differences from Keras:

* Duplicate rows of a row gradient (`SparseRows`) are summed before they are squared, as in r2.0;
  Keras 3 squares them separately. As in Keras, a row gradient is the dense array: rows without a
  gradient decay and are updated too.
* `finalize_variable_values` before the first step returns `params`; Keras returns zeros.
* Under accumulation, a variable whose gradient is None at the step of the update loses its
  accumulated gradient, as in Keras on TensorFlow; Keras on JAX keeps it for the next update.
* The minimum of a loss scale is the smallest normal float32; Keras's decreases to zero.
* Names are not numbered: two `Adam()` are both "adam", where Keras's second is "adam_1".
* `decay` without `legacy` is an error, not ignored; so is a clip of 0 with `legacy`.
* Loading a state does not set the learning rate; a stored one that differs is an error.
"""

from adam_transforms.compat.keras import schedules
from adam_transforms.compat.keras._adam import Adam
from adam_transforms.compat.keras._adamw import AdamW
from adam_transforms.compat.keras._loss_scale import LossScaleOptimizer
from adam_transforms.compat.keras._serialization import deserialize, get, serialize

__all__ = ["Adam", "AdamW", "LossScaleOptimizer", "deserialize", "get", "schedules", "serialize"]


def __dir__() -> list[str]:
    return __all__
