"""Trains for some steps, saving a checkpoint every other one; goes on from the last, if there is
one. It prints a line for where it starts and for each step, and keeps its result in a file.

`test_checkpoints.py` runs it as a process of its own, and kills it.

    python training_process.py DIRECTORY STEPS
"""

import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import adam_transforms as at

USERS, ITEMS, WIDTH, BATCH = 60, 40, 4, 8


def loss(params: Any, batch: Any) -> Any:
    """Of two towers: a user and an item fit as well as their rows agree."""
    users, items, clicks = batch
    fit = jnp.sum(params["user"][users] * params["item"][items] * params["w"], axis=-1)
    return jnp.mean((fit - clicks) ** 2)


def scaled_loss(params: Any, state: Any, batch: Any) -> Any:
    return at.scale_loss(loss(params, batch), state)


def batch_of(step: int) -> Any:
    rng = np.random.default_rng(step)
    users, items = rng.zipf(1.5, BATCH) % USERS, rng.zipf(1.5, BATCH) % ITEMS
    return users.astype(np.int32), items.astype(np.int32), rng.random(BATCH, np.float32)


def make_params() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"user": (USERS, WIDTH), "item": (ITEMS, WIDTH), "w": (WIDTH,)}
    return {k: jnp.asarray(rng.standard_normal(s).astype(np.float32)) for k, s in shapes.items()}


def make_transformation(params: Any) -> optax.GradientTransformationExtraArgs:
    """Deferred and lazy tables and an average, accumulated, with a loss scale that overflows."""
    deferred = at.deferred_adam(0.05, tables="user", eps_hat=True, max_idle=250)
    average = optax.masked(at.params_ema(0.9), at.path_mask("^w$"))
    inner = optax.chain(at.by_path([("user", deferred)], at.lazy_adam(0.05)), average)
    rows = at.SparseRows(jnp.zeros(BATCH, jnp.int32), jnp.zeros((BATCH, WIDTH)), USERS)
    like = {**params, "user": rows, "item": at.SparseRows(rows.indices, rows.values, ITEMS)}
    accumulated = at.accumulate(inner, every=3, like=like)
    return at.dynamic_loss_scale(accumulated, 2.0**126, growth_interval=5, max_scale=2.0**126)


def make_step(tx: Any) -> Any:
    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        grads = at.grad(scaled_loss, rows_from=state, tables="user|item")(params, state, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def arrays(tree: Any) -> dict[str, np.ndarray]:
    """Every leaf by its path, as NumPy keeps it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)

    def plain(x: Any) -> np.ndarray:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return {at.path_str(path): plain(x) for path, x in leaves}


def main(directory: Path, steps: int) -> None:
    params = make_params()
    tx = make_transformation(params)
    step = make_step(tx)
    options = ocp.CheckpointManagerOptions(save_interval_steps=2, max_to_keep=2)
    with ocp.CheckpointManager(
        directory / "checkpoints", options=options, item_handlers=ocp.StandardCheckpointHandler()
    ) as manager:
        done = manager.latest_step() or 0
        if done:
            like = jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})
            at.check_state(manager.item_metadata(done).tree, like=like)
            train = manager.restore(done, args=ocp.args.StandardRestore(like))
        else:
            train = {"params": params, "state": tx.init(params)}
        print("from", done, flush=True)
        for number in range(done + 1, steps + 1):
            train["params"], train["state"] = step(*train.values(), batch_of(number))
            manager.save(number, args=ocp.args.StandardSave(train))
            print("step", number, flush=True)
    np.savez(directory / "unfinished.npz", **arrays(train))
    os.replace(directory / "unfinished.npz", directory / "result.npz")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]))
