"""Adam and AMSGrad: gradients rescaled by their moments.

Both bias corrections are folded into scalars of the step (`Coefficients`). For each element there
remain two moving averages and one ``alpha * m / (sqrt(v + eps_root) + eps)``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adam_transforms._core import arguments, dtypes, trees
from adam_transforms._core.state_check import wrong_state
from adam_transforms._core.state_layout import Role, register
from adam_transforms._core.types import Params, Path, State, Updates
from adam_transforms._transforms import numerics


@register(corrections=Role.SCALAR, inner_state=Role.INNER)
class ScheduledDecayState(NamedTuple):
    """State of Adam or AMSGrad when a decay rate is a schedule.

    For scheduled values ``b(0), b(1), ...`` the bias correction is one minus their running product,
    ``1 - b(0) b(1) ... b(t-1)``: the moving average of ones, started at zero.

    Attributes:
      corrections: (of mu, of nu), float32 scalars (float64 in x64 mode).
      inner_state: Optax's ScaleByAdamState or ScaleByAmsgradState.
    """

    corrections: tuple[jax.Array, jax.Array]
    inner_state: State


class Coefficients(NamedTuple):
    """The scalars of one step in ``alpha * m / (sqrt(v + eps_root) + eps)``."""

    count: jax.Array  # of steps, with this one
    b1: Any
    b2: Any
    alpha: Any
    eps: Any
    eps_root: Any
    # (x, y) of Nesterov's m = x * mu + y * g; None for m = mu.
    nesterov: tuple[Any, Any] | None
    # AMSGrad with max_of="corrected": the divisor of nu before the maximum; None otherwise.
    nu_correction: Any


class Hyperparameters(NamedTuple):
    """The arguments of `scale_by_adam` (``max_of=None``) or `scale_by_amsgrad`."""

    b1: Any
    b2: Any
    eps: Any
    eps_root: Any
    mu_dtype: Any
    nu_dtype: Any
    eps_hat: bool
    nesterov: bool = False
    max_of: Literal["raw", "corrected"] | None = None
    bias_correction_mu: bool = True
    bias_correction_nu: bool = True
    nu_per: Literal["element", "row"] = "element"

    def checked(self) -> Hyperparameters:
        """A copy whose values are checked; numbers become Python floats."""
        hp = self._replace(
            b1=arguments.decay_rate("b1", self.b1),
            b2=arguments.decay_rate("b2", self.b2),
            eps=arguments.scalar_or_schedule("eps", self.eps, at_least=0.0),
            eps_root=arguments.scalar_or_schedule("eps_root", self.eps_root, at_least=0.0),
            mu_dtype=arguments.float_dtype("mu_dtype", self.mu_dtype),
            nu_dtype=arguments.float_dtype("nu_dtype", self.nu_dtype),
        )
        arguments.choice("nu_per", hp.nu_per, ("element", "row"))
        for name in ("eps_hat", "nesterov", "bias_correction_mu", "bias_correction_nu"):
            arguments.flag(name, getattr(hp, name))
        if hp.eps_hat and hp.max_of == "corrected":
            raise ValueError('eps_hat=True needs max_of="raw", got max_of="corrected"')
        return hp


def direction(m: jax.Array, v: jax.Array, c: Coefficients) -> jax.Array:
    """``alpha * m / (sqrt(v + eps_root) + eps)``, elementwise, in the dtype of `m`."""
    if not (isinstance(c.eps_root, float) and c.eps_root == 0.0):
        v = v + dtypes.as_scalar(c.eps_root, v.dtype)
    denominator = jnp.sqrt(v) + dtypes.as_scalar(c.eps, v.dtype)
    return dtypes.scale(m, dtypes.as_scalar(c.alpha, v.dtype) / denominator)


def scale_by_adam(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
    nu_dtype: DTypeLike | None = None,
    nu_per: Literal["element", "row"] = "element",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by Adam's rule.

    .. math::
      m_t &= b_1 m_{t-1} + (1-b_1) g_t, \qquad \hat m_t = m_t / (1-b_1^t) \\
      v_t &= b_2 v_{t-1} + (1-b_2) |g_t|^2, \qquad \hat v_t = v_t / (1-b_2^t) \\
      u_t &= \hat m_t / (\sqrt{\hat v_t + \epsilon_{root}} + \epsilon)

    With `eps_hat` (TensorFlow, Keras), epsilon is added to the uncorrected root:

    .. math::
      u_t = \frac{\sqrt{1-b_2^t}}{1-b_1^t}\,
            \frac{m_t}{\sqrt{v_t + \epsilon_{root}} + \hat\epsilon}

    With `nesterov`, :math:`\hat m_t = b_1 m_t / (1-b_1^{t+1}) + (1-b_1) g_t / (1-b_1^t)`.

    With ``nu_per="row"`` the elements of a row, along the last axis of a parameter of two axes or
    more, share one second moment (FBGEMM's partial row-wise Adam): :math:`|g_t|^2` is replaced by
    its mean over the row.

    Args:
      b1, b2: decay rates in [0, 1). Python floats are the most accurate. The bias correction of a
        schedule ``count -> value`` is one minus the running product of its values
        (`ScheduledDecayState`). The bias correction of an array is ``1 - b**t`` with its value.
      eps: added to the root, >= 0.
      eps_root: added inside the root, >= 0.
      mu_dtype: dtype of mu; None for the parameter's.
      nesterov: use Nesterov momentum.
      eps_hat: epsilon as in the formula just before Section 2.1 of the paper.
      nu_dtype: dtype of nu; None for the parameter's real dtype, but at least float32, because a
        bfloat16 nu stops changing at b2 = 0.999.
      nu_per: "element" or "row".

    Returns:
      A transformation with `optax.ScaleByAdamState`: count int32 (), mu and nu like the parameters;
      with ``nu_per="row"`` the last axis of nu has length 1.
      The dtype of an update is the promotion of the gradient's and the parameter's; the dtypes of
      the state do not change. Where a gradient is None, so is the update; the slots are unchanged.

    Raises:
      ValueError: a rate or epsilon out of range; in update, a shape or structure that differs.
      TypeError: an argument of the wrong type; a parameter or a gradient neither floating nor
        complex.

    References:
      Kingma & Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015; Dozat, `Incorporating Nesterov
      Momentum into Adam <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_adam()
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> updates, state = tx.update({"w": jnp.array([10.0, -0.1])}, tx.init(params), params)
    >>> updates["w"].round(4).tolist()  # the first step is the gradient's sign
    [1.0, -1.0]
    """
    return _moment_transformation(
        Hyperparameters(
            b1, b2, eps, eps_root, mu_dtype, nu_dtype, eps_hat, nesterov=nesterov, nu_per=nu_per
        )
    )


def scale_by_amsgrad(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    mu_dtype: DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    eps_hat: bool = False,
    nu_dtype: DTypeLike | None = None,
    max_of: Literal["raw", "corrected"] = "corrected",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by the AMSGrad rule: Adam with the running maximum of second moments.

    The moments m and v are those of `scale_by_adam`. ``max_of="corrected"`` is Optax's rule,

    .. math::
      \bar v_t = \max(\bar v_{t-1},\, v_t / (1-b_2^t)), \qquad
      u_t = \hat m_t / (\sqrt{\bar v_t + \epsilon_{root}} + \epsilon)

    and ``max_of="raw"`` the rule of Keras and PyTorch, which correct the bias of the maximum:

    .. math::
      \bar v_t = \max(\bar v_{t-1},\, v_t), \qquad
      u_t = \hat m_t / (\sqrt{\bar v_t / (1-b_2^t) + \epsilon_{root}} + \epsilon)

    Args:
      b1, b2, eps, eps_root, mu_dtype, eps_hat, nu_dtype: as in `scale_by_adam`. `eps_hat` needs
        ``max_of="raw"``: no system combines it with "corrected".
      bias_correction_mu, bias_correction_nu: False omits that correction, as the AMSGrad paper
        does.
      max_of: "corrected" or "raw".

    Returns:
      A transformation with `optax.ScaleByAmsgradState`: count int32 (), mu, nu and nu_max like the
      parameters; nu_max is :math:`\bar v`, in the dtype of nu.

    Raises:
      ValueError, TypeError: as `scale_by_adam`.

    References:
      Reddi et al., `On the Convergence of Adam and Beyond
      <https://arxiv.org/abs/1904.09237>`_, 2018.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_amsgrad(b1=0.0, b2=0.5, max_of="raw")
    >>> params = jnp.array([1.0])
    >>> _, state = tx.update(jnp.array([4.0]), tx.init(params), params)
    >>> _, state = tx.update(jnp.array([0.0]), state, params)
    >>> state.nu.tolist(), state.nu_max.tolist()
    ([4.0], [8.0])
    """
    arguments.choice("max_of", max_of, ("corrected", "raw"))
    return _moment_transformation(
        Hyperparameters(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            nu_dtype,
            eps_hat,
            max_of=max_of,
            bias_correction_mu=bias_correction_mu,
            bias_correction_nu=bias_correction_nu,
        )
    )


def _moment_transformation(hp: Hyperparameters) -> optax.GradientTransformationExtraArgs:
    """`scale_by_adam` or `scale_by_amsgrad`."""
    hp = hp.checked()
    scheduled = callable(hp.b1) or callable(hp.b2)
    kind: Any = optax.ScaleByAdamState if hp.max_of is None else optax.ScaleByAmsgradState

    def init(params: Params) -> State:
        state = init_state(hp, params)
        if not scheduled:
            return state
        dtype = dtypes.scalar_dtype()
        return ScheduledDecayState((jnp.zeros((), dtype), jnp.zeros((), dtype)), state)

    def update(
        updates: Updates, state: State, params: Params | None = None, **_: Any
    ) -> tuple[Updates, State]:
        if not scheduled:
            if type(state) is not kind:
                raise wrong_state(init, updates, state, params)
            return update_leaves(hp, coefficients_of(hp, state.count), updates, state, params)
        if type(state) is not ScheduledDecayState or type(state.inner_state) is not kind:
            raise wrong_state(init, updates, state, params)
        inner = state.inner_state
        b1, b2 = (numerics.at_count(b, inner.count) for b in (hp.b1, hp.b2))
        corrections = [
            numerics.moving_average(c, 1.0, b)
            for c, b in zip(state.corrections, (b1, b2), strict=True)
        ]
        wide = [dtypes.as_scalar(c) for c in corrections]
        coefficients = coefficients_of(hp, inner.count, b1, b2, wide)
        updates, inner = update_leaves(hp, coefficients, updates, inner, params)
        return updates, ScheduledDecayState((corrections[0], corrections[1]), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def init_state(hp: Hyperparameters, params: Params) -> State:
    """Optax's state of Adam or AMSGrad before the first step."""

    def zero_mu(keys: Any, p: Any) -> jax.Array:
        dtype = jnp.result_type(p)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{trees.path_str(keys)!r} is {dtype}, but Adam's parameters are floating or "
                "complex: take it out of the parameters, or leave it out with optax.masked"
            )
        return jnp.zeros_like(p, hp.mu_dtype or dtype)

    def zero_nu(p: Any) -> jax.Array:
        dtype = hp.nu_dtype or dtypes.nu_dtype(jnp.result_type(p))
        if hp.nu_per == "row" and _has_rows(p.shape):
            return trees.zero_column(p, dtype)
        return jnp.zeros_like(p, dtype)

    count = jnp.zeros((), jnp.int32)
    mu, nu = jax.tree_util.tree_map_with_path(zero_mu, params), jax.tree.map(zero_nu, params)
    if hp.max_of is None:
        return optax.ScaleByAdamState(count, mu, nu)
    return optax.ScaleByAmsgradState(count, mu, nu, jax.tree.map(zero_nu, params))


def coefficients_of(
    hp: Hyperparameters,
    count: jax.Array,
    b1: Any = None,
    b2: Any = None,
    corrections: Sequence[jax.Array] | None = None,
) -> Coefficients:
    """The scalars of the step after `count` steps, with the bias corrections folded in.

    Args:
      b1, b2, corrections: if the decay rates are schedules, their values at this step and the bias
        corrections of mu and nu; None for constant rates.
    """
    eps, eps_root = numerics.scalar_at(hp.eps, count), numerics.scalar_at(hp.eps_root, count)
    after = numerics.increment(count)
    if corrections is None:
        b1, b2 = hp.b1, hp.b2
        corrections = [numerics.bias_correction(b, after) for b in (b1, b2)]
    mu_correction = corrections[0] if hp.bias_correction_mu else 1.0
    nu_correction = corrections[1] if hp.bias_correction_nu else 1.0

    nesterov = None
    mu_factor = 1.0 / mu_correction
    if hp.nesterov:
        b1_next = numerics.at_count(hp.b1, count + 1)
        next_correction = numerics.moving_average(corrections[0], 1.0, b1_next)
        nesterov = (
            dtypes.as_scalar(b1_next) / next_correction,
            (1.0 - dtypes.as_scalar(b1)) / mu_correction,
        )
        mu_factor = 1.0

    if hp.max_of == "corrected":
        return Coefficients(after, b1, b2, mu_factor, eps, eps_root, nesterov, nu_correction)
    # sqrt(v / c + root) + eps is (sqrt(v + root * c) + eps * sqrt(c)) / sqrt(c).
    root_correction = jnp.sqrt(nu_correction)
    if not hp.eps_hat:
        eps = eps * root_correction
        if not (isinstance(eps_root, float) and eps_root == 0.0):
            eps_root = eps_root * nu_correction
    alpha = mu_factor * root_correction
    return Coefficients(after, b1, b2, alpha, eps, eps_root, nesterov, None)


def update_leaves(
    hp: Hyperparameters,
    c: Coefficients,
    updates: Updates,
    state: State,
    params: Params | None,
) -> tuple[Updates, State]:
    """Updates the moments and rescales the gradients, leaf by leaf."""
    slots = {name: slot for name, slot in state._asdict().items() if name != "count"}
    # Only the dtype of a parameter matters. Without parameters it is taken from mu.
    params = slots["mu"] if params is None else params
    if hp.nu_per == "row":
        slots["nu"] = _filled_rows(slots["nu"], slots["mu"])
    updates, *new_slots = trees.map_leaves(
        functools.partial(update_leaf, hp, c),
        updates,
        *slots.values(),
        params,
        names=(*(f"the state's {name}" for name in slots), "the parameters"),
        outputs=1 + len(slots),
    )
    if hp.nu_per == "row":
        new_slots[1] = jax.tree.map(lambda x: x[..., :1] if _has_rows(x.shape) else x, new_slots[1])
    return updates, type(state)(c.count, *new_slots)


def _has_rows(shape: tuple[int, ...]) -> bool:
    """Whether ``nu_per="row"`` applies."""
    return len(shape) > 1 and shape[-1] > 0


def _filled_rows(nu: Any, mu: Any) -> Any:
    """Each row's second moment for all of its elements."""

    def fill(keys: Any, mu: Any, nu: Any) -> jax.Array:
        shape = (*mu.shape[:-1], 1) if _has_rows(mu.shape) else mu.shape
        if nu.shape != shape:
            raise ValueError(
                f"the nu of {trees.path_str(keys)!r} has shape {list(nu.shape)}, but "
                f'{list(shape)} is that of nu_per="row"'
            )
        return jnp.broadcast_to(nu, mu.shape)

    return jax.tree_util.tree_map_with_path(fill, mu, nu)


def update_leaf(
    hp: Hyperparameters, c: Coefficients, path: Path, g: jax.Array, *slots_and_param: jax.Array
) -> tuple[jax.Array, ...]:
    """The update of one leaf and its new slots, in the dtypes of the old slots."""
    old_mu, old_nu, *old_nu_max, param = slots_and_param
    dtype = dtypes.compute_dtype(g.dtype, old_mu.dtype)
    real = dtypes.real_dtype(dtype)
    out_dtype = dtypes.promote(g.dtype, jnp.result_type(param))

    g = g.astype(dtype)
    nu = dtypes.real(old_nu).astype(real)
    mu = numerics.moving_average(old_mu.astype(dtype), g, c.b1)
    if hp.nu_per == "row" and _has_rows(g.shape):
        mean_square = jnp.mean(dtypes.abs_sq(g), axis=-1, keepdims=True)
        nu = numerics.moving_average(nu, mean_square, c.b2)
    else:
        nu = numerics.average_of_squares(nu, g, c.b2)
    v = nu
    if old_nu_max:
        if c.nu_correction is not None:
            v = nu / dtypes.as_scalar(c.nu_correction, real)
        v = jnp.maximum(dtypes.real(old_nu_max[0]).astype(real), v)
    if c.nesterov is None:
        u = direction(mu, v, c)
    else:
        mu_factor, g_factor = (dtypes.as_scalar(x, real) for x in c.nesterov)
        # Not the sum of the two first: it may overflow.
        u = dtypes.scale(direction(mu, v, c), mu_factor)
        u = u + dtypes.scale(direction(g, v, c), g_factor)
    new, old = (
        (dtypes.saturate(mu, old_mu.dtype), nu, v)[: 2 + len(old_nu_max)],
        (old_mu, old_nu, *old_nu_max),
    )
    u = u.astype(out_dtype)
    return u, *(dtypes.store(path, x, y.dtype) for x, y in zip(new, old, strict=True))
