# Optax's types leave open what a tree is, and wrong arguments are passed on purpose.

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import x64

import adam_transforms as at
from adam_transforms._core import trees


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


def paths(tree):
    return [path for path, _ in trees.flatten_with_paths(tree)[0]]


# Paths


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (1.0, [""]),
        ({"b": 1.0, "a": {"c": 2.0}}, ["a/c", "b"]),
        ([1.0, (2.0, 3.0)], ["0", "1/0", "1/1"]),
        (Pair(1.0, [2.0]), ["first", "second/0"]),
        (Layer({"w": 1.0}, 2.0), ["kernel/w", "bias"]),
        (
            {"layer": Layer(Pair(1.0, 2.0), [3.0])},
            ["layer/kernel/first", "layer/kernel/second", "layer/bias/0"],
        ),
        ({1: 1.0, 2: 2.0}, ["1", "2"]),
        ({"a": None, "b": [None, 1.0]}, ["a", "b/0", "b/1"]),
        ({}, []),
        ({"a": []}, []),
        ({"value": 1.0}, ["value"]),  # a key, not the attribute of a variable
    ],
)
def test_paths_are_the_keys_joined_by_slashes(tree, expected):
    assert paths(tree) == expected


def test_the_value_of_an_nnx_variable_is_not_part_of_its_path():
    nnx = pytest.importorskip("flax.nnx")

    class Inner(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(jnp.ones(3))

    class Block(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(2))
            self.inner = Inner()

    state = nnx.state(Block())
    expected = ["inner/value", "scale"]
    assert paths(state) == expected
    assert paths(nnx.to_pure_dict(state)) == expected


def test_only_a_trailing_value_attribute_is_dropped():
    dict_key, attribute = jax.tree_util.DictKey, jax.tree_util.GetAttrKey
    assert at.path_str((attribute("value"), dict_key("kernel"))) == "value/kernel"
    assert at.path_str((dict_key("kernel"), attribute("value"))) == "kernel"
    assert at.path_str((dict_key("kernel"), dict_key("value"))) == "kernel/value"
    assert at.path_str(()) == ""


# Variables


class Variable(NamedTuple):
    value: Any


def test_variables_come_off_and_go_on_where_another_tree_has_them():
    rows = at.SparseRows(jnp.array([0]), jnp.ones((1, 2)), 3)
    plain = {"a": rows, "b": [1.0, None]}
    wrapped = {"a": Variable(rows), "b": [Variable(1.0), None]}
    assert trees.unwrap_variables(wrapped) == plain
    assert trees.unwrap_variables(wrapped, lambda x: x is rows) == wrapped | {"a": rows}
    for like in (plain, wrapped):
        for tree in (plain, wrapped):
            assert trees.wrap_like(like, tree) == like


def test_variables_are_no_help_where_more_differs():
    tree = {"a": 1.0}
    for like in ({"b": Variable(1.0)}, {"a": Variable(1.0), "b": 1.0}, Variable(1.0)):
        assert trees.wrap_like(like, tree) is tree


# Alignment


def test_align_lays_leaves_side_by_side_and_none_is_a_leaf():
    a = {"x": 1.0, "y": None, "z": [2.0]}
    b = {"x": None, "y": 3.0, "z": [4.0]}
    rows, treedef = trees.align(a, b, names=("a", "b"))
    assert rows == [("x", 1.0, None), ("y", None, 3.0), ("z/0", 2.0, 4.0)]
    assert treedef.unflatten([1, 2, 3]) == {"x": 1, "y": 2, "z": [3]}


@pytest.mark.parametrize(
    ("other", "where"),
    [
        ({"a": {"b": 1.0}}, r"'a/c' is only in the updates"),
        ({"a": {"b": 1.0, "c": 1.0, "d": 1.0}}, r"'a/d' is only in the parameters"),
        ({"a": 1.0}, r"'a/b' is only in the updates"),
        ({"z": {"b": 1.0, "c": 1.0}}, r"'a/b' is only in the updates"),
        ({}, r"'a/b' is only in the updates"),
        (None, r"'a/b' is only in the updates"),
    ],
)
def test_a_structure_that_differs_is_refused_by_path(other, where):
    message = f"^the structure of the parameters differs from that of the updates: ({where})"
    with pytest.raises(ValueError, match=message):
        trees.align({"a": {"b": 1.0, "c": 1.0}}, other, names=("the updates", "the parameters"))


@pytest.mark.parametrize(
    "subtree",
    [{"d": np.ones(2)}, [np.ones(()), np.ones(())], Pair(np.ones(()), np.ones(())), [], (), {}],
    ids=repr,
)
def test_a_subtree_in_the_place_of_a_leaf_is_refused_by_path(subtree):
    updates, params = {"a": {"b": np.ones(2)}}, {"a": {"b": subtree}}
    with pytest.raises(ValueError, match="'a/b'.* in the updates.* in the parameters"):
        trees.align(updates, params, names=("the updates", "the parameters"))
    with pytest.raises(ValueError, match="'a/b.* in the parameters|'a/b.* in the updates"):
        trees.align(params, updates, names=("the parameters", "the updates"))


def test_containers_that_differ_at_the_same_paths_are_refused():
    with pytest.raises(ValueError, match="^the structure of the parameters differs from that of"):
        trees.align([1.0, 2.0], (1.0, 2.0), names=("the updates", "the parameters"))


def test_a_shape_that_differs_is_refused_by_path():
    message = (
        r"^'layers/1/kernel' has shape \[2, 3\] in the updates, but \[3, 2\] in the parameters$"
    )
    updates = {"layers": [{"kernel": jnp.ones(1)}, {"kernel": jnp.ones((2, 3))}]}
    params = {"layers": [{"kernel": jnp.ones(1)}, {"kernel": jnp.ones((3, 2))}]}
    with pytest.raises(ValueError, match=message):
        trees.align(updates, params, names=("the updates", "the parameters"))


def test_a_scalar_is_not_taken_for_an_array_of_one():
    with pytest.raises(ValueError, match=r"'w' has shape \[\] in a, but \[1\] in b"):
        trees.align({"w": jnp.ones(())}, {"w": jnp.ones(1)}, names=("a", "b"))


# Leafwise maps


def test_map_leaves_passes_over_none_and_keeps_the_other_trees_there():
    updates = {"a": jnp.array([1.0]), "b": None}
    slots = {"a": jnp.array([10.0]), "b": jnp.array([20.0])}
    result, new_slots = trees.map_leaves(
        lambda path, g, s: (g + s, s * 2), updates, slots, names=("slots",), outputs=2
    )
    assert result["a"].tolist() == [11.0]
    assert result["b"] is None
    assert new_slots["a"].tolist() == [20.0]
    assert new_slots["b"] is slots["b"]


def test_map_leaves_tells_each_leaf_its_path():
    tree = {"a": jnp.ones(1), "b": [None, jnp.ones(1)]}
    seen = []
    trees.map_leaves(lambda path, g: (seen.append(path), g)[1], tree)
    assert seen == ["a", "b/1"]


def test_map_leaves_of_an_empty_tree_is_empty():
    assert trees.map_leaves(lambda path, g: g, {"a": ()}) == {"a": ()}
    assert trees.map_leaves(lambda *_: (), {}, {}, names=("slots",), outputs=2) == ({}, {})


@pytest.mark.parametrize(
    ("leaf", "came"),
    [
        (np.ones(2, np.int32), "int32"),
        (jnp.array(True), "bool"),
        (3, "int"),
        ("x", "str"),
        (np.zeros((), jax.dtypes.float0), "float0|\\[\\('float0'"),
    ],
)
def test_a_gradient_that_is_not_floating_is_refused_by_path(leaf, came):
    message = rf"^the update of 'a/b' must be a floating or complex array .*, got ({came})"
    with pytest.raises(TypeError, match=message):
        trees.as_gradients({"a": {"b": leaf}})


@pytest.mark.parametrize("leaf", [0.5, np.float32(0.5), np.array(0.5, np.float16), jnp.array(0.5j)])
def test_numpy_and_python_gradients_become_arrays(leaf):
    (result,) = trees.as_gradients([leaf])
    assert isinstance(result, jax.Array)
    assert result.dtype == jnp.result_type(leaf)
    assert complex(result) == complex(leaf)


@pytest.mark.parametrize(
    ("gradient", "param", "expected"),
    [
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float16", "float32"),
        ("float32", "complex64", "complex64"),
        ("float32", "float64", "float64"),
        ("bfloat16", None, "bfloat16"),
    ],
)
def test_updates_have_the_promotion_of_gradient_and_parameter(gradient, param, expected):
    with x64():
        updates, gradients = {"w": jnp.ones(2, "float32")}, {"w": jnp.ones(2, gradient)}
        params = None if param is None else {"w": jnp.ones(2, param)}
        assert trees.in_update_dtype(updates, gradients, params)["w"].dtype == expected


# States


def test_states_are_found_however_deep():
    state = ({"a": Pair(1, [2, Layer(3, 4)])}, (Pair(5, 6), 7), None)
    assert trees.find_states(state, Pair) == [Pair(1, [2, Layer(3, 4)]), Pair(5, 6)]
    assert trees.find_states(state, Layer) == [Layer(3, 4)]
    assert trees.find_states((1, None), Pair) == []


def test_containers_that_differ_are_named_by_path_and_class():
    flax_core = pytest.importorskip("flax.core")
    big = {f"layer{i}": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)} for i in range(12)}
    tx = at.adam()
    for params in (flax_core.freeze(big), {**big, "layer7": flax_core.freeze(big["layer7"])}):
        for arguments in (
            (tx.init(params), params),
            (tx.init(params), big),
            (tx.init(big), params),
        ):
            with pytest.raises(ValueError, match="is a dict in the updates, but a FrozenDict") as e:
                tx.update(big, *arguments)
            assert len(str(e.value)) < 200
        where = "'layer7'" if isinstance(params, dict) else "the tree"
        assert f"{where} is a dict" in str(e.value)
    with pytest.raises(ValueError, match="'a' is a dict of 1 in the updates, but a dict of 0"):
        trees.align({"a": {"b": {}}, "c": 1.0}, {"a": {}, "c": 1.0}, names=("the updates", "b"))
    for argument in ("learning_rate", "weight_decay_mask", "b1"):
        with pytest.raises((TypeError, ValueError), match=argument) as e:
            at.adam(**{"weight_decay": 0.1, argument: big})
        assert len(str(e.value)) < 500


EQUAL_PATHS = {"a/b": jnp.ones((2, 1)), "a": {"b": jnp.ones((3, 1))}, "c": jnp.ones((2, 1))}
SELECTING = {
    "deferred_adam": lambda: at.deferred_adam(0.1, tables="a/b").init(EQUAL_PATHS),
    "by_path": lambda: at.by_path([("a", at.adam())], at.adam()).init(EQUAL_PATHS),
    "rates": lambda: at.scale_by_path_learning_rate([("b$", 1.0)], 0.1).init(EQUAL_PATHS),
    "path_mask": lambda: at.path_mask("a/b")(EQUAL_PATHS),
    "freeze_rows": lambda: at.freeze_rows(at.adam(), {"a/b": 0}).init(EQUAL_PATHS),
    "resize": lambda: at.resize(EQUAL_PATHS, at.adam().init(EQUAL_PATHS), {"a/b": 4}),
    "value_and_grad": lambda: at.grad(lambda p: jnp.sum(p["a/b"][0]), tables="a/b")(EQUAL_PATHS),
    "predicate": lambda: at.grad(
        lambda p: jnp.sum(p["a/b"][0]), tables=lambda path, leaf: leaf.shape[0] == 3
    )(EQUAL_PATHS),
    "flush": lambda: at.flush(EQUAL_PATHS, masked_state()),
    "owed": lambda: at.owed(EQUAL_PATHS, masked_state()),
    "catch_up": lambda: at.catch_up(EQUAL_PATHS, masked_state(), {"a/b": jnp.arange(2)}),
    "interop": lambda: at.interop.torch.state_to(at.adam().init(EQUAL_PATHS), EQUAL_PATHS),
    "compat": lambda: at.compat.tf1.AdamOptimizer().compute_gradients(
        lambda p: jnp.sum(p["a/b"]), EQUAL_PATHS
    ),
}


def masked_state():
    """A deferred state that knows one of the two."""
    mask = {"a/b": True, "a": {"b": False}, "c": False}
    return optax.masked(at.deferred_adam(0.1, tables="a/b"), mask).init(EQUAL_PATHS)


@pytest.mark.every_case
@pytest.mark.parametrize("name", SELECTING)
def test_a_path_of_two_leaves_selects_neither(name):
    with pytest.raises(ValueError, match="two .*'a/b'"):
        SELECTING[name]()


def test_two_leaves_of_one_path_are_updated_where_no_path_selects_them():
    tx = optax.chain(
        at.by_path([("c", at.scale_by_adam())], at.scale_by_adam()),
        at.scale_by_path_learning_rate([("c", 0.1)], 0.2),
    )
    updates, _ = tx.update(EQUAL_PATHS, tx.init(EQUAL_PATHS), EQUAL_PATHS)
    for path, leaf in trees.flatten_with_paths(updates)[0]:
        np.testing.assert_allclose(leaf, -0.1 if path == "c" else -0.2, rtol=1e-5)
    at.deferred_adam(0.1, tables="c").init(EQUAL_PATHS)
    both = at.grad(lambda p, q: jnp.sum(p["t"][0] + q["t"][1]), argnums=(0, 1), tables="t")
    rows = both({"t": jnp.ones((2, 1))}, {"t": jnp.ones((2, 1))})
    assert all(isinstance(x["t"], at.SparseRows) for x in rows)
