"""Complete optimizers: chains of this package's transformations, in Keras's order of operations."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax.typing import DTypeLike

from adam_transforms._core import arguments, trees
from adam_transforms._core.patterns import Selection
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.types import Params, State, Updates
from adam_transforms._embeddings.lazy import lazy
from adam_transforms._transforms import accumulation, clipping, loss_scaling
from adam_transforms._transforms.adam import scale_by_adam, scale_by_amsgrad
from adam_transforms._transforms.compress_moments import compress_moments
from adam_transforms._transforms.ema import params_ema
from adam_transforms._transforms.learning_rates import scale_by_learning_rate


@arguments.suggest_names
def adam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    eps_hat: bool = False,
    amsgrad: bool = False,
    max_of: Literal["raw", "corrected"] = "raw",
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    clip_value: float | jax.Array | None = None,
    clip_norm: float | jax.Array | None = None,
    clip_global_norm: float | jax.Array | None = None,
    ema: optax.ScalarOrSchedule | None = None,
    ema_overwrite_every: int | None = None,
    accumulate_every: int | None = None,
    loss_scale: float | jax.Array | Literal["dynamic"] | None = None,
    nu_dtype: DTypeLike | None = None,
    state_bits: int | Mapping[str, int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with every option of the Keras constructor, in Keras's order.

    It is this chain, without the parts whose option is None: unscale, accumulate, clip, Adam,
    decay, average::

        dynamic_loss_scale(                      # loss_scale="dynamic"; static_loss_scale: a number
            accumulate(                          # accumulate_every
                optax.chain(
                    clip_by_global_norm(...),    # or clip_by_norm, or clip_by_value
                    scale_by_adam(...),          # or scale_by_amsgrad; in compress_moments
                    optax.add_decayed_weights(weight_decay, weight_decay_mask),
                    scale_by_learning_rate(learning_rate),
                    params_ema(ema, overwrite_every=ema_overwrite_every),
                ),
                accumulate_every,
            )
        )

    The average is inside accumulation: it averages the parameters once in a cycle.

    Args:
      learning_rate: a number, a scalar array, or a schedule ``count -> value``; with accumulation
        `count` is the number of completed cycles.
      b1, b2, eps, eps_root, eps_hat, nesterov, mu_dtype, nu_dtype: as in `scale_by_adam`.
      amsgrad, max_of: whether to use `scale_by_amsgrad`, and its `max_of`.
      weight_decay: decoupled (AdamW): each update adds ``-learning_rate * weight_decay * p`` to p.
      weight_decay_mask: the parameters to decay: a tree of booleans or a function from the
        parameters to one, e.g. `path_mask`; None for all.
      clip_value, clip_norm, clip_global_norm: at most one of them.
      ema, ema_overwrite_every: as in `params_ema`; read with `ema_params` or `finalize`.
      accumulate_every: the number of gradients averaged for one update.
      loss_scale: a number, or "dynamic" for the defaults of `dynamic_loss_scale`; scale the loss
        with `scale_loss`.
      state_bits: 8, 16, ...: the `bits` of `compress_moments`, which then keeps the moments. None
        or 32: moments have `mu_dtype` and `nu_dtype`. Under `optax.inject_hyperparams` it belongs
        in ``static_args``.

    Returns:
      A transformation; its state is that of the chain above.

    Raises:
      ValueError: an argument is out of range, or options exclude each other.
      TypeError: an argument has the wrong type.

    References:
      Kingma & Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015; Loshchilov & Hutter, `Decoupled
      Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.

    >>> import jax, jax.numpy as jnp, optax
    >>> tx = adam(learning_rate=0.1, clip_global_norm=1.0)
    >>> params = jnp.array([3.0, -2.0])
    >>> state = tx.init(params)
    >>> update = jax.jit(tx.update)
    >>> for _ in range(100):
    ...     grads = jax.grad(lambda p: jnp.sum(p**2))(params)
    ...     updates, state = update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(jnp.abs(params).max() < 0.2)
    True
    """
    options = _Options(**locals())
    return _add_wrappers(_check_parts(_chain(options)), options)


@arguments.suggest_names
def adamw(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    eps_hat: bool = False,
    amsgrad: bool = False,
    max_of: Literal["raw", "corrected"] = "raw",
    nesterov: bool = False,
    weight_decay_mask: Any = None,
    clip_value: float | jax.Array | None = None,
    clip_norm: float | jax.Array | None = None,
    clip_global_norm: float | jax.Array | None = None,
    ema: optax.ScalarOrSchedule | None = None,
    ema_overwrite_every: int | None = None,
    accumulate_every: int | None = None,
    loss_scale: float | jax.Array | Literal["dynamic"] | None = None,
    nu_dtype: DTypeLike | None = None,
    state_bits: int | Mapping[str, int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`adam` with decoupled weight decay: 1e-4 by default, as in Optax (1e-2 in PyTorch).

    The return value, the errors and the other arguments are those of `adam`.

    Args:
      mask: Optax's name of `weight_decay_mask`.

    >>> import jax.numpy as jnp
    >>> tx = adamw(learning_rate=0.1, weight_decay=0.5)
    >>> params = jnp.array([2.0])
    >>> tx.update(jnp.zeros(1), tx.init(params), params)[0].round(3).tolist()
    [-0.1...]
    """
    given = dict(locals())
    if given.pop("mask") is not None:
        if weight_decay_mask is not None:
            raise ValueError("mask is weight_decay_mask under another name, got both")
        given["weight_decay_mask"] = mask
    options = _Options(**given)
    return _add_wrappers(_check_parts(_chain(options)), options)


@arguments.suggest_names
def lazy_adam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    eps_hat: bool = False,
    amsgrad: bool = False,
    max_of: Literal["raw", "corrected"] = "raw",
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    clip_value: float | jax.Array | None = None,
    clip_norm: float | jax.Array | None = None,
    clip_global_norm: float | jax.Array | None = None,
    ema: optax.ScalarOrSchedule | None = None,
    accumulate_every: int | None = None,
    accumulate_like: Any = None,
    loss_scale: float | jax.Array | Literal["dynamic"] | None = None,
    nu_dtype: DTypeLike | None = None,
    state_bits: int | Mapping[str, int] | None = None,
    tables: Selection | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`adam` that updates only the touched rows of a table with a row gradient.

    The chain of `adam` is inside `lazy`, and the wrappers are around it::

        dynamic_loss_scale(
            accumulate(lazy(chain, tables=tables), accumulate_every, like=accumulate_like)
        )

    The other arguments are those of `adam`, without `ema_overwrite_every`, which sets all rows.

    Args:
      ema: as in `params_ema`, a Python number.
      accumulate_like: with `accumulate_every`, a tree like the gradients, as in `accumulate`.
      tables: the parameters whose gradients must have rows, as in `lazy`: a dense gradient of one
        is an error. Under `optax.inject_hyperparams` a predicate belongs in its ``static_args``.

    >>> import jax.numpy as jnp, optax
    >>> from adam_transforms import SparseRows
    >>> tx = lazy_adam(learning_rate=0.1, tables="table")
    >>> params = {"table": jnp.zeros((4, 1))}
    >>> rows = SparseRows(jnp.array([2]), jnp.array([[3.0]]), num_rows=4)
    >>> updates, _ = tx.update({"table": rows}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["table"].round(3).tolist()
    [[0.0], [0.0], [-0.1...], [0.0]]
    """
    arguments = dict(locals())
    if accumulate_like is not None and accumulate_every is None:
        raise ValueError("accumulate_like needs accumulate_every, got None")
    like, tables = arguments.pop("accumulate_like"), arguments.pop("tables")
    options = _Options(**arguments, ema_overwrite_every=None)
    return _add_wrappers(lazy(_chain(options), tables=tables), options, like)


class _Options(NamedTuple):
    """The arguments of a preset."""

    learning_rate: Any
    b1: Any
    b2: Any
    eps: Any
    eps_root: Any
    mu_dtype: Any
    eps_hat: bool
    amsgrad: bool
    max_of: Literal["raw", "corrected"]
    nesterov: bool
    weight_decay: Any
    weight_decay_mask: Any
    clip_value: Any
    clip_norm: Any
    clip_global_norm: Any
    ema: Any
    ema_overwrite_every: Any
    accumulate_every: Any
    loss_scale: Any
    nu_dtype: Any
    state_bits: Any


def _chain(options: _Options) -> optax.GradientTransformationExtraArgs:
    """Clip, Adam, decay, learning rate, average, each if its option is given."""
    o = options
    chain: list[Any] = [*_clips(o), _moments(o)]
    if o.weight_decay is not None:
        weight_decay = arguments.scalar_or_schedule("weight_decay", o.weight_decay)
        _check_mask(o.weight_decay_mask)
        chain.append(optax.add_decayed_weights(weight_decay, o.weight_decay_mask))
    elif o.weight_decay_mask is not None:
        raise ValueError("weight_decay_mask needs weight_decay, got None")
    chain.append(scale_by_learning_rate(o.learning_rate))
    if o.ema is not None:
        arguments.decay_rate("ema", o.ema)
        if o.ema_overwrite_every is not None:
            arguments.positive_int("ema_overwrite_every", o.ema_overwrite_every)
        chain.append(params_ema(o.ema, overwrite_every=o.ema_overwrite_every))
    elif o.ema_overwrite_every is not None:
        raise ValueError("ema_overwrite_every needs ema, got None")
    return optax.chain(*chain)


def _check_parts(
    chain: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """A chain that refuses the state of a chain of other parts by name."""

    @functools.cache
    def kinds() -> list[type]:
        return [type(part) for part in jax.eval_shape(chain.init, trees.placeholder())]

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, State]:
        if type(state) is not tuple or [type(part) for part in state] != kinds():
            raise wrong_state(chain.init, updates, state, params)
        return chain.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _clips(options: _Options) -> list[Any]:
    """The clipping transformation, if any; at most one is allowed."""
    clips = {
        name: clip(arguments.scalar(name, limit, above=0.0))
        for name, clip, limit in (
            ("clip_value", clipping.clip_by_value, options.clip_value),
            ("clip_norm", clipping.clip_by_norm, options.clip_norm),
            ("clip_global_norm", clipping.clip_by_global_norm, options.clip_global_norm),
        )
        if limit is not None
    }
    if len(clips) > 1:
        raise ValueError(f"at most one kind of clipping may be given, got {' and '.join(clips)}")
    return [*clips.values()]


def _moments(options: _Options) -> optax.GradientTransformationExtraArgs:
    """`scale_by_adam` or `scale_by_amsgrad`, in `compress_moments` if `state_bits` says so."""
    o = options
    if arguments.flag("amsgrad", o.amsgrad) and arguments.flag("nesterov", o.nesterov):
        raise ValueError("amsgrad and nesterov exclude each other, got both")
    shared = (o.b1, o.b2, o.eps, o.eps_root, o.mu_dtype)
    if o.amsgrad:
        tx = scale_by_amsgrad(*shared, eps_hat=o.eps_hat, nu_dtype=o.nu_dtype, max_of=o.max_of)
    else:
        arguments.choice("max_of", o.max_of, ("corrected", "raw"))
        tx = scale_by_adam(*shared, nesterov=o.nesterov, eps_hat=o.eps_hat, nu_dtype=o.nu_dtype)
    bits = o.state_bits
    if bits is not None and not isinstance(bits, Mapping):
        bits = arguments.static_number("state_bits", bits)
    if bits is None or (not isinstance(bits, bool) and bits == 32):
        return tx
    if o.mu_dtype is not None or o.nu_dtype is not None:
        raise ValueError("state_bits and mu_dtype or nu_dtype exclude each other, got both")
    return compress_moments(tx, bits)


def _check_mask(mask: Any) -> None:
    """Refuses non-boolean leaves, which `optax.masked` would treat as True."""
    if not callable(mask) and not all(isinstance(leaf, bool) for leaf in jax.tree.leaves(mask)):
        raise TypeError(
            "weight_decay_mask must be a tree of booleans or a function from the parameters to one "
            f"(path_mask makes it from patterns), got {mask!r:.200}"
        )


def _add_wrappers(
    tx: optax.GradientTransformationExtraArgs, options: _Options, like: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Wraps a chain in accumulation and loss scaling, each if its option is given."""
    every, scale = options.accumulate_every, options.loss_scale
    if every is not None:
        every = arguments.positive_int("accumulate_every", every)
        tx = accumulation.accumulate(tx, every, like=like)
    if scale is None:
        return tx
    if isinstance(scale, str):
        if scale != "dynamic":
            raise ValueError(f'loss_scale must be a number or "dynamic", got {scale!r}')
        return loss_scaling.dynamic_loss_scale(tx)
    return loss_scaling.static_loss_scale(tx, arguments.scalar("loss_scale", scale, above=0.0))
