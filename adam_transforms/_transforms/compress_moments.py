"""Adam's moments kept in 8 or 16 bits an element."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_transforms._core import arguments, trees
from adam_transforms._core.state_check import HEADING, wrong_state
from adam_transforms._core.state_layout import COUNT, INJECTED, TABLE, Role, register, walk
from adam_transforms._core.types import Params, State, Updates
from adam_transforms._transforms import moment_codes
from adam_transforms._transforms.adam import ScheduledDecayState
from adam_transforms._transforms.loss_scaling import StaticLossScaleState
from adam_transforms._transforms.master_weights import MasterWeightsState
from adam_transforms._transforms.moment_codes import Noise
from adam_transforms._xla.jaxprs import change_outputs


@register(
    count=COUNT,
    moments=Role.SLOT,
    mu=Role.SLOT,
    nu=Role.SLOT,
    nu_max=Role.SLOT,
    nu_range=Role.GROUP_RANGE,
    nu_max_range=Role.GROUP_RANGE,
)
class CompressMomentsState(NamedTuple):
    """State of Adam or AMSGrad inside `compress_moments`.

    Attributes:
      count: int32 (), the number of steps.
      moments: like the parameters: uint16, mu and nu in one word; None unless both have 8 bits and
        the same shape.
      mu: like the parameters: int8, or at 16 bits the bits of a bfloat16 as uint16; None if
        `moments` contains it.
      nu, nu_max: like the parameters: uint8, or at 16 bits uint16 as for mu; nu is None if
        `moments` contains it, nu_max is None for Adam.
      nu_range, nu_max_range: int16 for each group of elements: the center and width of their
        8-bit codes; None at 16 bits.
    """

    count: jax.Array
    moments: Params
    mu: Params
    nu: Params
    nu_max: Params
    nu_range: Params
    nu_max_range: Params


# Until the codes of imported moments lie in the ranges that they would have in training.
_SETTLING_STEPS = 4
_MOMENTS = (optax.ScaleByAdamState, optax.ScaleByAmsgradState)
# States that contain others, and whose transformations neither hold back steps nor choose rows.
_INSIDE = (ScheduledDecayState, MasterWeightsState, StaticLossScaleState, *INJECTED)


def compress_moments(
    inner: optax.GradientTransformation,
    bits: int | Mapping[str, int] = 8,
    *,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps Adam's moments in 8 or 16 bits an element, rounded stochastically.

    A step decodes the moments to float32, `inner` updates them, and they are coded again, without
    an array of decoded moments. The updates are computed from the new moments as they are stored.
    All else in the state is untouched.

    ====================  ==========================  ===========  ===================
    bits                  code                        m and v      error of the update
    ====================  ==========================  ===========  ===================
    16                    bfloat16                    4 bytes      0.02
    {"mu": 8, "nu": 16}   m relative to sqrt(v)       3 bytes      0.04
    8                     and v logarithmic too       2 to 2.1     0.07, 0.10, 0.13
    ====================  ==========================  ===========  ===================

    The error is the root mean square of the update's error, divided by that of the update, after
    2,000 steps at the default decay rates. The elements of a row have gradients of different
    scales, drawn from exp(N(0, s)). The three errors at 8 bits are for s = 0, 1 and 2.5. There the
    largest error of an element was 0.7, and for s = 5, where a row spans 80 powers of two, it was
    1.1. With b1 = 0.99 the error at 8 bits is 0.3, because the first moment is then smaller and
    contains the rounding errors of ten times as many steps: keep mu in 16 bits. Bytes are per
    element, for rows of 20 elements or more; a row of one element takes 4 bytes at 8 bits.

    An 8-bit second moment is stored as a logarithm relative to a center. The gap between its codes
    grows with the distance from the center. An 8-bit first moment is stored relative to the root of
    the second moment of the same element, in codes whose gap grows with the ratio:

    .. math::
      \log_2 v \approx c \pm w\, x_k, \qquad m = \pm 2^{\mathrm{round}(\log_2 \sqrt v)}\, y_l

    The integers k and l have 9 and 7 bits where the two share a 16-bit word, else 8 bits. A group
    of elements shares the center c and the width w, together 2 bytes. A group is the last axis, or
    more of the last axes if that has fewer than 16 elements, but never the first axis of several.
    Center and width are computed from the codes of the step before: no step needs the largest value
    of a group.

    A second moment that is not zero is never decoded as zero, and a first moment is at most 16
    times the root of the second: no update explodes. A first moment above 7.8 times that root may
    be clipped. Uncompressed, the ratio :math:`|m| / \sqrt v` is at most
    :math:`(1-b_1) / \sqrt{(1-b_2)(1-b_1^2/b_2)}` if b1 < sqrt(b2), 7.3 at the default rates; for
    other rates it has no bound.

    Rounding is unbiased: a moment moves on average even if the change of a step is smaller than the
    gap between two codes. The random numbers are a hash of the seed, the count, the leaf and the
    position of the element. Equal seeds give equal trajectories, for any sharding, and a resumed
    run is bit-identical. Inside `lazy`, the position of a row is its position among the touched
    rows: its rounding depends on which other rows are touched.

    A step computes more and moves less memory than plain Adam. Measured on two CPU cores, as a
    ratio to plain Adam: a dense step of matrices takes 0.9 to 1.4 at 16 bits and 2.4 to 2.8 at 8
    bits; of leaves of one axis 1.7 and 3.5; a lazy step 0.9 and 1.0 to 1.2. On a CPU with registers
    of 512 bits, ``jax.jit(step, compiler_options={"xla_cpu_prefer_vector_width": 512})`` makes XLA
    use them: a dense step of matrices then takes 1.1 at 16 bits and 1.6 at 8 bits, relative to
    plain Adam with the same option.

    Args:
      inner: a chain with one or several states of `scale_by_adam`, `scale_by_amsgrad`, or Optax's
        transformations with the same state classes.
      bits: 8, 16, or ``{"mu": 8, "nu": 16}``; nu_max has the bits of nu.
      seed: an integer.

    Returns:
      A transformation with the state of `inner`, in which each state of Adam or AMSGrad is a
      `CompressMomentsState`.

    Raises:
      ValueError: other bits; `inner` has no moments, or contains a wrapper that belongs around
        `compress_moments`; update was given a state of other bits.
      TypeError: a parameter is complex.

    Put it directly around the chain, inside all wrappers that skip steps or select rows:
    ``accumulate(lazy(compress_moments(optax.chain(...))), 4)``. The presets do this for
    ``state_bits=8``.

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022, for the idea; the codes differ.

    >>> import jax, jax.numpy as jnp, optax
    >>> tx = compress_moments(optax.adam(0.1))
    >>> params = {"w": jnp.ones((64, 128))}
    >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    >>> state[0].moments["w"].dtype.name, state[0].nu_range["w"].shape
    ('uint16', (64,))
    """
    inner = arguments.transformation("inner", inner)
    mu_dtype, nu_dtype = _dtypes_of(bits)
    seed = arguments.static_number("seed", seed)
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, got {seed!r:.200}")

    def init(params: Params) -> State:
        state = inner.init(params)
        _refuse_wrappers(state)
        nodes, treedef = jax.tree.flatten(state, is_leaf=_has_moments)
        if not any(map(_has_moments, nodes)):
            raise ValueError(
                "compress_moments needs a chain with Adam's or AMSGrad's moments, such as "
                "scale_by_adam() or optax.adam(0.1); the state of `inner` has none"
            )
        return treedef.unflatten(
            [_zeros(x, mu_dtype, nu_dtype) if _has_moments(x) else x for x in nodes]
        )

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, State]:
        coded = trees.find_states(state, CompressMomentsState)
        if not coded:
            raise wrong_state(init, updates, state, params)
        _check_bits(coded, mu_dtype, nu_dtype)
        old = decoded(state)
        structure = jax.tree.structure(old)
        coding = _Coding(state, structure.unflatten(range(structure.num_leaves)), seed)

        def step(updates: Updates, old: State, params: Params | None) -> tuple[State, Updates]:
            updates, new = inner.update(updates, old, params, **extra_args)
            return new, updates

        # Nothing needs the old codes once the new ones are there: XLA overwrites them in place.
        new, updates = change_outputs(coding.code, step, (updates, old, params), coding.groups)
        return updates, coding.put_into(new)

    return optax.GradientTransformationExtraArgs(init, update)


def decoded(state: State) -> State:
    """`state` with Optax's states in place of each `CompressMomentsState`, moments in float32."""
    return jax.tree.map(lambda x: _decoded(x) if _is_coded(x) else x, state, is_leaf=_is_coded)


def encoded(new: State, like: State, *, seed: int = 0) -> State:
    """The inverse of `decoded`, for a state that no step has made.

    Args:
      new: a state with Optax's states.
      like: a state whose decoded form has the structure of `new`; it says which codes to use.
      seed: of the rounding.
    """
    coding = _Coding(like, new, seed)
    for i, moments in enumerate(coding.groups):
        for _ in range(_SETTLING_STEPS):
            coding.code(i, moments)
    return coding.put_into(new)


def _has_moments(x: Any) -> bool:
    return type(x) in _MOMENTS


def _is_coded(x: Any) -> bool:
    return isinstance(x, CompressMomentsState)


def _zeros(state: Any, mu_dtype: Any, nu_dtype: Any) -> CompressMomentsState:
    for path, mu in trees.non_none(state.mu):
        if jnp.iscomplexobj(mu):
            raise TypeError(
                f"{path!r} is complex: compress_moments codes the moments of real parameters; "
                "leave it out with optax.masked or by_path"
            )

    def codes(tree: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros_like(x, dtype), tree)

    def ranges(tree: Any) -> Any:
        if nu_dtype != moment_codes.NU_8:
            return None
        return jax.tree.map(
            lambda x: trees.zeros_per_row(x, jnp.int16, moment_codes.group_axes(x.shape)), tree
        )

    nu_max = getattr(state, "nu_max", None)
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (state.mu, state.nu)]
    both = (mu_dtype, nu_dtype) == (moment_codes.MU_8, moment_codes.NU_8) and shapes[0] == shapes[1]
    return CompressMomentsState(
        state.count,
        codes(state.mu, moment_codes.BOTH_8) if both else None,
        None if both else codes(state.mu, mu_dtype),
        None if both else codes(state.nu, nu_dtype),
        codes(nu_max, nu_dtype),
        ranges(state.nu),
        ranges(nu_max),
    )


class _Leaf(NamedTuple):
    """The fields of a `CompressMomentsState` for one parameter."""

    moments: Any
    mu: Any
    nu: Any
    nu_max: Any
    nu_range: Any
    nu_max_range: Any

    def codes(self) -> moment_codes.Codes:
        """Of mu and nu."""
        return moment_codes.Codes(self.moments, self.mu, self.nu, self.nu_range)

    def decoded(self) -> tuple[jax.Array, jax.Array]:
        """(mu, nu)."""
        return moment_codes.decode(self.codes())

    def decoded_max(self) -> jax.Array:
        """nu_max."""
        return moment_codes.decode_nu(self.nu_max, self.nu_max_range)

    def with_moments(self, m: jax.Array, v: jax.Array, noise: Noise) -> "_Leaf":
        codes = moment_codes.encode(self.codes(), m, v, noise)
        return self._replace(moments=codes.both, mu=codes.mu, nu=codes.nu, nu_range=codes.nu_range)

    def with_max(self, v: jax.Array, noise: Noise) -> "_Leaf":
        nu_max, nu_max_range = moment_codes.encode_nu(self.nu_max, self.nu_max_range, v, noise)
        return self._replace(nu_max=nu_max, nu_max_range=nu_max_range)


def _leaves(state: CompressMomentsState) -> tuple[list[_Leaf], Any]:
    """The fields of each parameter, and the structure of the parameters."""
    treedef = jax.tree.structure(state.mu if state.moments is None else state.moments)
    none = [None] * treedef.num_leaves
    columns = [none if x is None else jax.tree.leaves(x) for x in state[1:]]
    return [_Leaf(*leaf) for leaf in zip(*columns, strict=True)], treedef


def _decoded(state: CompressMomentsState) -> Any:
    leaves, treedef = _leaves(state)
    mu, nu = trees.unzip([leaf.decoded() for leaf in leaves], treedef, 2)
    if state.nu_max is None:
        return optax.ScaleByAdamState(state.count, mu, nu)
    nu_max = treedef.unflatten([leaf.decoded_max() for leaf in leaves])
    return optax.ScaleByAmsgradState(state.count, mu, nu, nu_max)


class _Coding:
    """The codes in a state, while new moments take the place of the old ones.

    Attributes:
      groups: the new moments that are coded together: mu and nu of a parameter, or its nu_max.
    """

    groups: list[list[Any]]

    def __init__(self, state: State, new: State, seed: int) -> None:
        """
        Args:
          state: with the old codes.
          new: of the structure of ``decoded(state)``: the new moments, or what stands for them.
          seed: of the rounding.
        """

        def keeps_moments(x: Any) -> bool:
            return _is_coded(x) or _has_moments(x)

        self._old = [*filter(keeps_moments, jax.tree.leaves(state, is_leaf=keeps_moments))]
        self._leaves = [_leaves(x)[0] if _is_coded(x) else [] for x in self._old]
        self.groups, self._places, number = [], [], 0
        nodes = filter(_has_moments, jax.tree.leaves(new, is_leaf=_has_moments))
        for was, leaves, node in zip(self._old, self._leaves, nodes, strict=True):
            columns = map(jax.tree.leaves, node[1:])
            for i, (m, v, *v_max) in enumerate(zip(*columns, strict=True)):
                for group in ([m, v], v_max):
                    if leaves and group:
                        self.groups.append(group)
                        self._places.append((leaves, i, Noise.of(seed, number, was.count)))
                    number += 1

    def code(self, i: int, moments: Sequence[jax.Array]) -> Sequence[jax.Array]:
        """Codes the moments of the i-th group, and returns what their codes stand for."""
        leaves, k, noise = self._places[i]
        if len(moments) == 2:
            leaves[k] = leaves[k].with_moments(*moments, noise)
            return leaves[k].decoded()
        leaves[k] = leaves[k].with_max(*moments, noise)
        return [leaves[k].decoded_max()]

    def put_into(self, state: State) -> State:
        """`state` with the codes in place of its moments."""
        nodes, treedef = jax.tree.flatten(state, is_leaf=_has_moments)
        pairs = iter(zip(self._old, self._leaves, strict=True))
        for i, node in enumerate(nodes):
            if _has_moments(node):
                was, leaves = next(pairs)
                nodes[i] = _with_leaves(was, leaves, node.count) if _is_coded(was) else node
        return treedef.unflatten(nodes)


def _with_leaves(
    state: CompressMomentsState, leaves: list[_Leaf], count: jax.Array
) -> CompressMomentsState:
    _, treedef = _leaves(state)
    fields = trees.unzip([*leaves], treedef, len(_Leaf._fields))
    kept = [x if old is not None else None for x, old in zip(fields, state[1:], strict=True)]
    return CompressMomentsState(count, *kept)


# ---- checks -------------------------------------------------------------------------------------


def _dtypes_of(bits: Any) -> tuple[Any, Any]:
    """The dtypes of the codes of mu and nu."""
    by_slot = bits if isinstance(bits, Mapping) else {"mu": bits, "nu": bits}
    is_int = all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) for n in by_slot.values()
    )
    if {*by_slot} != {"mu", "nu"} or not is_int or not {*by_slot.values()} <= {8, 16}:
        raise ValueError(
            'the bits of moments must be 8, 16, or a dictionary with one of them for "mu" and for '
            f'"nu", such as {{"mu": 8, "nu": 16}}, got {bits!r:.200}'
        )
    return (
        moment_codes.MU_8 if by_slot["mu"] == 8 else moment_codes.BITS_16,
        moment_codes.NU_8 if by_slot["nu"] == 8 else moment_codes.BITS_16,
    )


def _check_bits(coded: list[CompressMomentsState], mu_dtype: Any, nu_dtype: Any) -> None:
    """Refuses moments that are kept in other bits."""
    wanted = _bits(mu_dtype), _bits(nu_dtype)
    for state in coded:
        for path, x in trees.non_none(state.mu if state.moments is None else state.moments):
            nu = x if state.moments is not None else dict(trees.non_none(state.nu))[path]
            found = (8, 8) if state.moments is not None else (_bits(x.dtype), _bits(nu.dtype))
            if found != wanted:
                raise ValueError(
                    f"{HEADING}\n  mu and nu of {path!r} have {found[0]} and {found[1]} bits, this "
                    f"configuration keeps {wanted[0]} and {wanted[1]}\n"
                    "After a change of the configuration, transfer_state(state, old_tx, new_tx, "
                    "params) keeps what both have; init(params) starts afresh"
                )


def _bits(dtype: Any) -> int:
    return 8 * jnp.dtype(dtype).itemsize


def _refuse_wrappers(state: State) -> None:
    """Refuses transformations that belong around `compress_moments`."""
    for _, node in walk(state):
        fields = TABLE.get(type(node), {})
        holds_others = any(field.role is Role.INNER for field in fields.values())
        if not holds_others or isinstance(node, _INSIDE):
            continue
        kind = type(node).__name__
        if any(field.role is Role.SHARED or "idle" in name for name, field in fields.items()):
            raise ValueError(
                "compress_moments cannot hold deferred_adam, whose pending updates need exact "
                "moments: use lazy_adam(..., state_bits=8), or lazy(compress_moments(...))"
            )
        raise ValueError(
            f"compress_moments goes inside the transformation of {kind}, directly around the chain "
            "with the moments. Wrappers nest in this order: "
            "dynamic_loss_scale(accumulate(lazy(compress_moments("
            "optax.chain(clip, adam, decay, learning rate))), every)); the presets do so for "
            "state_bits=8"
        )
