"""One mesh axis over all devices of all hosts. Batches are split along it; everything else is on every device."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"
PARALLEL = ("jit", "pmap")


def describe_devices(platform: str = "any") -> str:
    """Return the devices of JAX in a line, as "8 TPU v5 lite, processes: 1".

    Raises RuntimeError unless they are of the given platform: cpu, gpu, tpu or any.
    """
    devices = jax.devices()
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    found = f"{len(devices)} {kinds}, processes: {jax.process_count()}"
    if platform not in ("any", devices[0].platform):
        raise RuntimeError(
            f"{platform} was asked for and JAX {jax.__version__} found {found}; choose a runtime that has one, or "
            'install JAX for it: pip install -e ".[tpu]" or ".[cuda]"'
        )
    return found


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Return a 1-D mesh over `devices`, by default over all devices."""
    return Mesh(np.array(devices or jax.devices()), (AXIS,))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return the rows that this process has of a global batch as arrays split over the mesh, in process order."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def sum_rows(rows: np.ndarray, mesh: Mesh) -> int | jax.Array:
    """Return the sum over the rows that all processes have: of several processes, a sum that may still be computed."""
    if jax.process_count() == 1:
        return int(rows.sum())
    return jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(put_batch({"": rows}, mesh)[""])


def replicate(tree, mesh: Mesh):
    """Return the tree with its values on every device. All processes must have the same values."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # `device_put` would compare every leaf with the other processes, one collective operation each.
    place = jax.make_array_from_process_local_data
    return jax.tree.map(lambda leaf: place(sharding, np.asarray(leaf), np.shape(leaf)), tree)


def make_key(seed: int, mesh: Mesh) -> jax.Array:
    """Return the random key of a seed, on every device; each process makes its own copy."""
    return jax.jit(lambda: jax.random.key(seed), out_shardings=NamedSharding(mesh, PartitionSpec()))()


def shard_train_step(step: Callable, mesh: Mesh, parallel: str, *, taught: bool = False) -> Callable:
    """Jit (state, batch, key) -> (state, metrics) over the mesh; the state is donated.

    A `taught` step has a fourth argument, the variables of its teacher, which are not donated.

    With `jit` the step sees the global batch, so batch norm uses the statistics of all images. With `pmap` each device
    runs the step on its share, as under `jax.pmap`, and the step averages gradients over "data" itself.
    """
    everywhere, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(AXIS)))
    inputs = (everywhere, split, everywhere, everywhere) if taught else (everywhere, split, everywhere)
    if parallel == "pmap":
        specs = tuple(sharding.spec for sharding in inputs)
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec(), PartitionSpec()))
    else:
        step = _trace_on(mesh, step)
    return jax.jit(
        step,
        in_shardings=inputs,
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )


def _trace_on(mesh: Mesh, step: Callable) -> Callable:
    """Return the step with the mesh in its context, where layers find over how many devices a batch is split."""

    def step_on_mesh(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return step_on_mesh


def shard_eval_step(step: Callable, mesh: Mesh) -> Callable:
    """Jit (variables, batch) -> sums over the mesh, in the global view, also for runs that train with `pmap`."""
    everywhere, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(AXIS)))
    return jax.jit(_trace_on(mesh, step), in_shardings=(everywhere, split), out_shardings=everywhere)
