"""Connects to a Ray cluster: an existing one, or a new one that only this machine can reach."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...kernels.errors import AfnextError

_GPU_DEVICES = ("auto", "cuda")


@contextmanager
def connected(address: str | None, cpus: int, *, logs: bool) -> Iterator[None]:
    """Connect this process to a cluster during the block.

    address: Ray's address ("auto", "10.0.0.1:6379"), or None to start a cluster that ends with this process and has at
    least `cpus` CPU slots for actors, whatever the number of cores, and no dashboard. logs: print the actors' output
    here. Raises AfnextError without Ray, and if there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # print duplicate lines, too
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # so that all processes listen on the loopback
    try:
        import ray
    except ImportError:
        raise AfnextError("--ray needs Ray: run `pip install '.[ray]'` in a checkout of afnext.") from None
    quiet: Any = {"logging_level": "warning", "log_to_driver": logs}
    if address is None:
        places = max(cpus, os.cpu_count() or 1)
        ray.init("local", num_cpus=places, include_dashboard=False, **quiet)
    else:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise AfnextError(f"there is no Ray cluster at {address} ({error}); see `ray status`.") from None
    try:
        yield
    finally:
        ray.shutdown()


def gpus_of_a_replica(given: float | None, device: str, ranks: int) -> float:
    """GPUs that each replica requests from Ray: `given`, otherwise one per rank if the cluster has any."""
    import ray

    if given is not None:
        return given
    wanted = device.partition(":")[0] in _GPU_DEVICES and ray.cluster_resources().get("GPU", 0) > 0
    return float(ranks) if wanted else 0.0
