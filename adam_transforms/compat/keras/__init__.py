"""Keras's Adam in functional form: Keras 3's, r2.0's with `legacy=True`, and `LossScaleOptimizer`.

Arguments, defaults, methods, counters and trajectories are Keras's; but nothing is mutated:
parameters and state go in and come out of every call. A parameter goes by its path; wherever a
variable is expected, that or a (path, value) pair will do.

| Keras | here |
|---|---|
| `Adam(...)`, `LossScaleOptimizer(...)` | the same arguments |
| `AdamW(...)` | `Adam(weight_decay=0.004)` |
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
| `learning_rate` | as given; `opt.current_learning_rate(state)` for its present value |
| `learning_rate = value` | `opt = dataclasses.replace(opt, learning_rate=value)`; the state fits |
| `dynamic_scale`, `step_counter` | `opt.dynamic_scale(state)`, `opt.step_counter(state)` |
| `variables` | `opt.variables(state)`: (path, value) pairs, Keras's names in Keras's order |
| `weights` | `opt.weights(state)`: the same |
| `get_slot(var, name)` | `opt.get_slot(state, var, name)` |
| `get_slot_names()` | the same |
| `get_weights()` | `opt.get_weights(state)` |
| `set_weights(weights)` | `state = opt.set_weights(weights, params)` |
| `save_own_variables(store)` | `store = opt.save_own_variables(state)` |
| `load_own_variables(store)` | `state = opt.load_own_variables(store, params)` |
| `get_config()` | the same |
| `from_config(config)` | the same |
| `serialize(opt)`, `deserialize(config)` | functions of this module |
| `add_variable` | none: `init` makes the state; chain a transformation with `opt.transform()` |
| `add_variable_from_reference` | none: `init` makes the slots |
| `add_slot` | none: `init` makes the slots |
| `add_weight` | none: `init` makes the state |
| `assign` | none: a new tree takes the place of the old one |
| `assign_add` | none: `x + value`, or `apply_updates` |
| `assign_sub` | none: `x - value`, or `apply_updates` |
| `get_updates(loss, params)` | none: `minimize` takes the step |
| `update_step(gradient, variable)` | none: `apply` takes the step of all variables |

Asking for one that is not here raises an AttributeError that says what to do instead. The names of
operations (`name` of `apply_gradients` and `minimize`) are ignored. There is no locking.

Differences from Keras, all of them meant:

* The values of a row that a row gradient (`SparseRows`) names twice are summed before they are
  squared, as r2.0 does; Keras 3 squares them apart. Rows are dense to Adam, here as there: idle
  ones decay and move too.
* `finalize_variable_values` before the first step changes nothing; Keras puts zeros there.
* Under accumulation, a variable whose gradient is None when the others are updated loses what it
  has accumulated, as in Keras on TensorFlow; on JAX Keras keeps it for the next update.
* A loss scale stops at the smallest normal float32, where Keras's goes on to zero.
* `decay` without `legacy` is an error, not ignored; so is a clip of 0 with it.
* A state that is loaded does not bring a learning rate: one that differs is an error.
"""

from adam_transforms.compat.keras import schedules
from adam_transforms.compat.keras._adam import Adam
from adam_transforms.compat.keras._loss_scale import LossScaleOptimizer
from adam_transforms.compat.keras._serialization import deserialize, serialize

__all__ = ["Adam", "LossScaleOptimizer", "deserialize", "schedules", "serialize"]
