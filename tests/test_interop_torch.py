"""PyTorch's optimizer state in and out, with recorded runs continued from it."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_bits_equal, normal, types, x64
from recordings import Recording, differences
from test_parity import BUILDERS, flat, nested, variable

import adam_transforms as at
from adam_transforms.interop import torch

KEYS = {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "vhat"}


def make_state(shapes, *, step=7, amsgrad=False, dtype=np.float32, names=None) -> dict[str, Any]:
    """A `state_dict` of Adam as PyTorch makes it, with arrays for tensors."""
    keys = list(KEYS) if amsgrad else list(KEYS)[:2]
    state = {
        i: {"step": np.array(step, np.float32)}
        | {key: np.abs(normal(10 * i + k, *shape)).astype(dtype) for k, key in enumerate(keys)}
        for i, shape in enumerate(shapes)
    }
    group = {"lr": 0.1, "betas": (0.9, 0.999), "amsgrad": amsgrad, "params": [*range(len(shapes))]}
    return {"state": state, "param_groups": [group | ({"param_names": names} if names else {})]}


def zeros(*shapes, dtype=jnp.float32):
    return [jnp.zeros(shape, dtype) for shape in shapes]


SHAPES = [(2, 3), (3,)]
LINEAR = {"fc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
LINEAR_NAMES = ["fc.weight", "fc.bias"]


def from_flax(path: str) -> Any:
    """A Linear's names and axes for a Flax Dense's."""
    path = path.replace("/", ".")
    return (path.replace("kernel", "weight"), (1, 0)) if path.endswith("kernel") else path


@pytest.mark.parametrize(
    "case",
    [
        "torch_adam_custom",
        "torch_amsgrad_default",
        "torch_adamw_custom",
        "torch_adamw_amsgrad_custom",
        "torch_weight_decay_l2_custom",
        "torch_adam_maximize",
    ],
)
def test_a_recorded_run_goes_on_from_its_state(case):
    recording = Recording(case)
    tx, training = BUILDERS[recording.entry["class"]](recording)
    names = list(recording.start)
    for t in range(recording.steps):
        expected = training.step(recording.gradients(t))
    assert max(differences(expected, recording.params(-1)).values()) <= recording.tolerance

    entries = {
        i: {"step": np.float32(recording.steps)}
        | {key: recording.group(g)[name] for key, g in KEYS.items() if recording.group(g)}
        for i, name in enumerate(names)
    }
    state_dict = {"state": entries, "param_groups": [{"params": [*range(len(names))]}]}
    params = jax.tree.map(jnp.asarray, nested(recording.params(-1)))
    state = torch.state_from(state_dict, params, tx, [variable(name) for name in names])
    assert types(state) == types(tx.init(params))

    step = jax.jit(tx.update)
    for t in reversed(range(recording.steps)):
        expected = training.step(recording.gradients(t))
        updates, state = step(nested(recording.gradients(t)), state, params)
        params = at.apply_updates(params, updates)
    errors = differences(flat(params, names), expected)
    assert max(errors.values()) <= 2 * recording.tolerance


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_round_trip_changes_no_bit(amsgrad, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), LINEAR)
    names = LINEAR_NAMES
    tx = at.adam(amsgrad=amsgrad, mu_dtype=dtype, nu_dtype=dtype)
    state_dict = make_state([(2, 3), (2,)], amsgrad=amsgrad, dtype=dtype, names=names)
    state = torch.state_from(state_dict, params, tx, rename=from_flax)
    back = torch.state_to(state, params, rename=from_flax, param_groups=state_dict["param_groups"])
    assert_bits_equal(back, state_dict)
    again = torch.state_from(back, params, tx, rename=from_flax)
    assert_bits_equal(again, state)


def test_a_round_trip_changes_no_bit_in_float64():
    with x64():
        params = zeros(*SHAPES, dtype=jnp.float64)
        tx = optax.adam(0.1)
        state_dict = make_state(SHAPES, dtype=np.float64)
        state_dict["state"][0]["exp_avg"] += 1e-12
        state = torch.state_from(state_dict, params, tx)
        assert state[0].mu[0].dtype == jnp.float64
        groups = state_dict["param_groups"]
        assert_bits_equal(torch.state_to(state, params, param_groups=groups), state_dict)


def test_a_kernel_is_a_weight_transposed():
    state_dict = make_state([(2, 3), (2,)], names=LINEAR_NAMES)
    state = torch.state_from(state_dict, LINEAR, optax.adam(0.1), rename=from_flax)
    weight = state_dict["state"][0]["exp_avg"]
    np.testing.assert_array_equal(state[0].mu["fc"]["kernel"], weight.T)


def test_a_convolutions_axes_go_there_and_back():
    params = {"kernel": jnp.zeros((5, 6, 3, 4))}  # height, width, in, out
    state_dict = make_state([(4, 3, 5, 6)])
    rename = {"kernel": ("0", (2, 3, 1, 0))}.get
    state = torch.state_from(state_dict, params, optax.adam(0.1), rename=rename)
    theirs = state_dict["state"][0]["exp_avg"]
    assert state[0].mu["kernel"][1, 2, 0, 3] == theirs[3, 0, 1, 2]
    back = torch.state_to(state, params, rename=rename)
    np.testing.assert_array_equal(back["state"][0]["exp_avg"], theirs)


def test_sparse_adam_counts_in_integers():
    state_dict = make_state([(4, 2)], step=3)
    state_dict["state"][0]["step"] = 3
    state_dict["param_groups"] = [{"lr": 0.1, "betas": (0.9, 0.99), "maximize": False}]
    state_dict["param_groups"][0]["params"] = [0]
    params = zeros((4, 2))
    state = torch.state_from(state_dict, params, at.lazy_adam(eps_hat=True))
    back = torch.state_to(state, params, param_groups=state_dict["param_groups"])
    assert type(back["state"][0]["step"]) is int
    assert_bits_equal(back, state_dict)


def test_before_the_first_step_the_state_is_fresh():
    state_dict = {"state": {}, "param_groups": [{"params": [0, 1]}]}
    params = zeros(*SHAPES)
    tx = at.adam()
    assert_bits_equal(torch.state_from(state_dict, params, tx), tx.init(params))


def test_a_parameter_that_gets_no_gradients_there_may_be_masked_here():
    state_dict = make_state(SHAPES, names=["a", "frozen"])
    del state_dict["state"][1]
    params = dict(zip(("a", "frozen"), zeros(*SHAPES), strict=True))
    tx = at.by_path([("frozen", optax.set_to_zero())], default=at.adam())
    state = torch.state_from(state_dict, params, tx)
    back = torch.state_to(state, params, param_groups=state_dict["param_groups"])
    assert_bits_equal(back, state_dict)
    with pytest.raises(ValueError, match="'frozen' needs exp_avg of 'frozen', which is missing"):
        torch.state_from(state_dict, params, at.adam())


def test_groups_are_taken_in_their_order():
    state_dict = make_state(SHAPES)
    state_dict["param_groups"] = [{"params": [1], "amsgrad": False}, {"params": [0]}]
    params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
    state = torch.state_from(state_dict, params, at.adam(), ["b", "w"])
    np.testing.assert_array_equal(state[0].mu["b"], state_dict["state"][1]["exp_avg"])
    back = torch.state_to(state, params, ["b", "w"], param_groups=state_dict["param_groups"])
    np.testing.assert_array_equal(back["state"][1]["exp_avg"], state[0].mu["b"])


def test_names_go_out_with_a_group_of_their_own():
    state_dict = make_state(SHAPES, names=["w", "b"])
    params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
    state = torch.state_from(state_dict, params, at.adam())
    back = torch.state_to(state, params, ["w", "b"])
    assert back["param_groups"] == [{"params": [0, 1], "param_names": ["w", "b"]}]
    assert_bits_equal(torch.state_from(back, params, at.adam()), state)


def test_order_is_never_guessed():
    params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
    with pytest.raises(ValueError, match="pass names, in the order of the optimizer's parameters"):
        torch.state_to(at.adam().init(params), params)
    with pytest.raises(ValueError, match="'w' needs the parameter 'w', which is missing"):
        torch.state_from(make_state(SHAPES), params, at.adam())


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address at which JAX would keep NumPy's memory for its own."""
    buffer = np.empty(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_arrays_are_shared_neither_with_the_source_nor_with_what_goes_out():
    state_dict = make_state([(256, 256)])
    theirs = state_dict["state"][0]["exp_avg"] = aligned(state_dict["state"][0]["exp_avg"])
    params = jax.device_put(zeros((256, 256)), jax.devices()[0])  # committed, as sharded ones are
    state = torch.state_from(state_dict, params, at.adam())
    before = np.array(theirs)
    theirs += 1.0
    np.testing.assert_array_equal(state[0].mu[0], before)
    back = torch.state_to(state, params)["state"][0]["exp_avg"]
    back += 1.0
    np.testing.assert_array_equal(state[0].mu[0], before)


# Two optimizers of one model

PAIR = {"fc": {"kernel": jnp.zeros((2, 3))}, "table": jnp.zeros((4, 2))}
PAIR_NAMES = [["fc/kernel"], ["table"]]


def make_pair(*, steps=(7, 7)) -> list[Any]:
    """AdamW of the dense part and SparseAdam of the table."""
    dense, sparse = (make_state([s], step=t) for s, t in zip([(2, 3), (4, 2)], steps, strict=True))
    sparse["state"][0]["step"] = steps[1]
    sparse["param_groups"] = [{"lr": 0.1, "betas": (0.9, 0.99), "maximize": False, "params": [0]}]
    return [(dense, PAIR_NAMES[0]), (sparse, PAIR_NAMES[1])]


def test_several_optimizers_come_in_and_go_out_as_a_list():
    tx = at.lazy(at.by_path([("table", at.adam(eps_hat=True))], default=at.adamw()))
    pair = make_pair()
    state: Any = torch.state_from(pair, PAIR, tx)
    assert types(state) == types(tx.init(PAIR))
    assert {int(x) for x in jax.tree.leaves(state) if x.shape == ()} == {7}
    groups = [one["param_groups"] for one, _ in pair]
    back = torch.state_to(state, PAIR, PAIR_NAMES, param_groups=groups)
    assert_bits_equal(back, pair)
    assert type(back[1][0]["state"][0]["step"]) is int
    assert_bits_equal(torch.state_from(torch.state_to(state, PAIR, PAIR_NAMES), PAIR, tx), state)
    fresh = [({**one, "state": {}}, names) for one, names in pair]
    assert_bits_equal(torch.state_from(fresh, PAIR, tx), tx.init(PAIR))


def test_several_optimizers_that_do_not_fit_together_are_refused():
    tx, (dense, sparse) = at.adam(), make_pair()

    def refused(pairs, message, error=ValueError, **options):
        with pytest.raises(error, match=message):
            torch.state_from(pairs, PAIR, tx, **options)

    refused([dense, (sparse[0], ["fc/kernel"])], r"more than one of \['fc/kernel'\]")
    refused([dense], "'table' needs the parameter 'table', which is missing")
    refused(make_pair(steps=(7, 9)), r"\{'fc/kernel': 7, 'table': 9\}; set the step of all")
    refused([dense, sparse], "names must be None", names=["table"])
    refused([dense[0], sparse[0]], "for several optimizers, a list", TypeError)
    refused([(*dense, 3), sparse], "must be a list of pairs", TypeError)

    state = torch.state_from([dense, sparse], PAIR, tx)
    with pytest.raises(ValueError, match=r"names lack \['table'\]"):
        torch.state_to(state, PAIR, PAIR_NAMES[:1])
    with pytest.raises(ValueError, match=r"more than one of \['table'\]"):
        torch.state_to(state, PAIR, [*PAIR_NAMES, ["table"]])
    with pytest.raises(ValueError, match="param_groups must be 2 lists, as names, got 1"):
        torch.state_to(state, PAIR, PAIR_NAMES, param_groups=[dense[0]["param_groups"]])


# Refused


def test_all_that_does_not_match_is_listed_at_once():
    state_dict = make_state([(2, 3), (4,), (5,), (1,)], names=["fc.weight", "fc.bias", "x", "y"])
    params = LINEAR | {"gone": jnp.zeros(2), "y": jnp.zeros(1), "also": {"y": jnp.zeros(1)}}

    def rename(path):
        return {"also/y": "y", "fc/kernel": "fc.weight"}.get(path, path.replace("/", "."))

    with pytest.raises(ValueError) as error:
        torch.state_from(state_dict, params, at.adam(amsgrad=True), rename=rename)
    message = str(error.value)
    for part in (
        "exp_avg of 'fc.weight', for 'fc/kernel', has shape [2, 3], expected [3, 2]; if it is the",
        "exp_avg_sq of 'fc.bias', for 'fc/bias', has shape [4], expected [2]",
        "'gone' needs the parameter 'gone', which is missing",
        "'x' is left over",
        "'also/y' and 'y' all map to 'y'",
        "'fc/bias' needs max_exp_avg_sq of 'fc.bias', which is missing",
    ):
        assert part in message


def test_a_maximum_that_the_transformation_lacks_is_left_over():
    state_dict = make_state([(3,)], amsgrad=True)
    with pytest.raises(ValueError, match="exp_avg_sq of '0' is left over: '0' has no slot nu_max"):
        torch.state_from(state_dict, zeros((3,)), at.adam())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"momentum_buffer": np.ones(3)}, "is not Adam's"),
        ({"step": 1.0, "exp_avg": np.ones(3)}, "is not Adam's"),
        (
            {
                "step": 1.0,
                "exp_avg": np.ones(3),
                "exp_avg_sq": np.ones(3),
                "mu_product": np.ones(()),
            },
            "is not Adam's",
        ),
        ({"step": 1.5, "exp_avg": np.ones(3), "exp_avg_sq": np.ones(3)}, "step of '0' must be an"),
        ({"step": -1, "exp_avg": np.ones(3), "exp_avg_sq": np.ones(3)}, "step of '0' must be an"),
        ({"step": [1], "exp_avg": np.ones(3), "exp_avg_sq": np.ones(3)}, "must be a scalar"),
    ],
)
def test_what_is_not_adams_state_is_refused(entry, message):
    state_dict = {"state": {0: entry}, "param_groups": [{"params": [0]}]}
    with pytest.raises(ValueError, match=message):
        torch.state_from(state_dict, zeros((3,)), at.adam())


def test_different_numbers_of_steps_are_listed():
    state_dict = make_state(SHAPES)
    state_dict["state"][1]["step"] = np.float32(9)
    with pytest.raises(ValueError, match=re.escape("{'0': 7, '1': 9}")):
        torch.state_from(state_dict, zeros(*SHAPES), at.adam())


class Module:
    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    ("state_dict", "error", "message"),
    [
        (Module(), TypeError, "call its state_dict"),
        (3, TypeError, "must be a mapping, got 3"),
        ({"fc.weight": np.ones(3)}, ValueError, "must be the optimizer's, not the model's"),
        ({"state": [], "param_groups": []}, TypeError, "must map to mappings"),
        ({"state": {}, "param_groups": {}}, TypeError, "param_groups must be a list"),
        ({"state": {}, "param_groups": [{"lr": 1.0}]}, TypeError, "with 'params'"),
        ({"state": {}, "param_groups": [{"params": 3}]}, TypeError, "with 'params', a list"),
        ({"state": {5: {}}, "param_groups": [{"params": [0]}]}, ValueError, "no parameter group"),
    ],
)
def test_what_is_no_state_dict_is_refused(state_dict, error, message):
    with pytest.raises(error, match=message):
        torch.state_from(state_dict, zeros((3,)), at.adam())


@pytest.mark.parametrize(
    ("names", "error"),
    [("ab", TypeError), ([1, 2], TypeError), (["a"], ValueError), (3, TypeError)],
)
def test_wrong_names_are_refused(names, error):
    with pytest.raises(error, match="names must be"):
        torch.state_from(make_state(SHAPES), zeros(*SHAPES), at.adam(), names)


def test_one_name_for_two_is_refused():
    with pytest.raises(ValueError, match=r"more than one of \['a'\]"):
        torch.state_from(make_state(SHAPES), zeros(*SHAPES), at.adam(), ["a", "a"])


def test_groups_that_contradict_the_state_are_refused():
    params = zeros((3,))
    groups = make_state([(3,)], amsgrad=True)["param_groups"]
    with pytest.raises(ValueError, match="has amsgrad=True, but the state lacks a maximum"):
        torch.state_to(at.adam().init(params), params, param_groups=groups)
