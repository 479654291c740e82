"""The table of state classes agrees with the states that `init` makes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import adam_transforms as at
from adam_transforms._core import slots, trees
from adam_transforms._core.state_layout import (
    TABLE,
    Role,
    find_fields,
    is_accumulation,
    is_adam,
    register,
    walk,
)

PARAMS = {"table": jnp.ones((7, 3)), "w": jnp.ones((2, 5))}
SHAPES = {x.shape for x in PARAMS.values()}

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

STATES: dict[str, Any] = {
    "Adam": at.scale_by_adam(),
    "AMSGrad": at.scale_by_amsgrad(),
    "scheduled": at.scale_by_adam(b1=optax.linear_schedule(0.5, 0.9, 5)),
    "everything": at.adam(
        optax.constant_schedule(0.1), ema=0.9, accumulate_every=2, loss_scale="dynamic"
    ),
    "static": at.static_loss_scale(at.adam(), 8.0),
    "skipping": at.skip_nonfinite(at.adam()),
    "skipping some": at.skip_nonfinite(at.adam(), max_consecutive=2),
    "variable cycles": at.accumulate(at.adam(), lambda cycles: 2 + cycles, weighted=True),
    "masters": at.master_weights(at.adam()),
    "rate": at.scale_by_learning_rate(optax.constant_schedule(0.1)),
    "rates": at.scale_by_path_learning_rate([("w", 0.1)], 0.2),
    "compressed": at.adam(state_bits=8),
    "compressed AMSGrad": at.adam(amsgrad=True, state_bits={"mu": 16, "nu": 8}),
    "lazy": at.lazy_adam(),
    "deferred": at.deferred_adam(0.1, tables="table"),
    "deferred, decayed": at.deferred_adam(0.1, tables="table", weight_decay=0.1, amsgrad=True),
    "frozen": at.freeze_rows(at.lazy_adam(), {"table": 0}),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "ApplyEvery": optax.apply_every(2),
    "injected": optax.inject_hyperparams(optax.adam)(0.1),
}


def test_every_state_class_of_this_package_is_tried() -> None:
    ours = {cls for cls in TABLE if cls.__module__.startswith("adam_transforms")}
    tried = {type(x) for tx in STATES.values() for _, x in walk(tx.init(PARAMS))}
    assert ours <= tried


@pytest.mark.parametrize("name", STATES)
def test_the_role_of_a_field_fits_what_it_holds(name: str) -> None:
    state = STATES[name].init(PARAMS)
    found = find_fields(state, *Role)
    assert found
    for owner, field, value in found:
        role, where = TABLE[type(owner)][field].role, f"{type(owner).__name__}.{field}"
        shapes = {jnp.shape(x) for x in jax.tree.leaves(value)}
        if role in (Role.SLOT, Role.AVERAGE, Role.BUFFER):
            assert shapes == (SHAPES if value is not None else set()), where
        elif role is Role.COPY:
            assert shapes <= SHAPES, where
        elif role in (Role.ROW_MASK, Role.LAST_STEP):
            assert shapes == {(7,)}, where
        elif role is Role.GROUP_RANGE:
            assert shapes == ({shape[:1] for shape in SHAPES} if value is not None else set()), (
                where
            )
        elif role is Role.AVERAGED_STEP:
            assert shapes == ({shape[:1] for shape in SHAPES} if value is not None else set()), (
                where
            )
        elif role is Role.SCALAR:
            assert shapes <= {()}, where
        elif role is Role.SHARED:
            assert not shapes & SHAPES, where


@pytest.mark.parametrize("name", STATES)
def test_slots_are_those_that_grow_with_their_table(name: str) -> None:
    """By path, as tools find them, and by shape, as `lazy` does."""
    state = STATES[name].init(PARAMS)
    leaves, treedef = jax.tree.flatten(PARAMS)
    grown, _ = slots.find_slots(
        STATES[name].init, state, treedef, leaves, {0: 1}, caller="the test"
    )
    by_shape = {leaf.path for leaf in grown if leaf.table == 0}
    by_path = {path for path, owner in slots.owners(PARAMS, state).items() if owner == "table"}
    assert by_shape == by_path


def test_a_state_knows_its_kind() -> None:
    states = {name: tx.init(PARAMS) for name, tx in STATES.items()}
    for name in ("Adam", "AMSGrad", "deferred"):
        assert is_adam(states[name])
    assert not is_adam(states["rates"])
    assert is_accumulation(states["MultiSteps"])
    assert is_accumulation(states["everything"].inner_state)
    assert not is_accumulation(states["ApplyEvery"])  # it has no inner transformation


def test_a_table_entry_names_every_field_and_no_other() -> None:
    class State(NamedTuple):
        velocity: Any
        steps: Any

    for fields in ({"velocity": Role.SLOT}, {"velcity": Role.SLOT, "steps": Role.SCALAR}):
        with pytest.raises(TypeError, match="the fields of State are velocity, steps"):
            register(**fields)(State)
    assert State not in TABLE


def test_a_new_state_class_is_one_entry() -> None:
    """Registered, it is known to everything that asks for slots."""

    class MomentumState(NamedTuple):
        velocity: Any
        steps: Any

    def init(params: Any) -> Any:
        return MomentumState(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, state.velocity, updates)
        return velocity, MomentumState(velocity, state.steps + 1)

    register(velocity=Role.SLOT, steps=Role.SCALAR)(MomentumState)
    try:
        tx = at.lazy(optax.GradientTransformation(init, update))
        rows = at.SparseRows(jnp.array([4]), jnp.ones((1, 3)), 7, synchronized=True)
        grads = {"table": rows, "w": PARAMS["w"]}
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        larger, state = at.resize(PARAMS, state, {"table": 9})
        assert trees.non_none(state.inner_state.velocity)[0][1].shape == (9, 3)
        assert "velocity: float32" in at.summary(larger, state)
    finally:
        del TABLE[MomentumState]
