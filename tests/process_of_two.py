"""One of two processes that train tables sharded over the devices of both; run by
`test_processes`.

    python process_of_two.py RANK PORT RESULT RUNS

RUNS is a JSON object: names of `test_processes.RUNS`, each with a list of kinds of mesh.
"""

import json
import os
import sys

DEVICES = 4


def main(rank: int, port: int, result: str, runs: dict[str, list[str]]) -> None:
    flags = os.environ.get("XLA_FLAGS", "")  # the last of equal flags counts
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}"
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)

    import numpy as np
    import test_processes as test
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    assert jax.device_count() == 2 * DEVICES
    assert jax.local_device_count() == DEVICES
    arrays = {}
    for name, kinds in runs.items():
        tx, spec, axes = test.RUNS[name]
        for kind in map(AxisType.__getitem__, kinds):
            mesh = jax.make_mesh((2, DEVICES), ("host", "device"), axis_types=(kind, kind))

            def place(x, spec, mesh=mesh):
                sharding = NamedSharding(mesh, spec)
                return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

            with jax.set_mesh(mesh):
                read = P(axes, spec[1]) if kind == AxisType.Explicit else None
                params = {"table": place(test.start()["table"], spec)}
                params["w"] = place(test.start()["w"], P(spec[1]))
                state = jax.jit(tx.init)(params)
                step = jax.jit(test.make_step(tx, read))
                for ids, targets in zip(test.IDS, test.TARGETS, strict=True):
                    params, state = step(
                        params, state, place(ids, P(axes)), place(targets, P(axes, spec[1]))
                    )
                whole = multihost_utils.process_allgather(params, tiled=True)
            local = np.asarray(params["table"].addressable_shards[0].data)
            assert local.size * 2 * DEVICES == whole["table"].size, local.shape
            arrays |= {f"{kind.name}/{name}/{key}": x for key, x in whole.items()}
    if rank == 0:
        np.savez(result, **arrays)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
