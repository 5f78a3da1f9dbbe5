"""A Ray cluster to run on: one that is there, or one of this machine that only this machine can reach."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...kernels.errors import AfnextError

_GPU_DEVICES = ("auto", "cuda")


@contextmanager
def connected(address: str | None, cpus: int, *, logs: bool) -> Iterator[None]:
    """Connect this process to a cluster for the length of the block.

    address: as Ray takes it ("auto", "10.0.0.1:6379"), or None to start one that ends with this process and has at
    least `cpus` places for actors, however many cores there are. It has no dashboard. logs: print here what the actors
    print. Raises AfnextError without Ray, and if there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # each line counts
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on Linux, too: every process listens on the loopback
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
    """The GPUs that each replica asks Ray for: as given, otherwise one per rank if the cluster has any."""
    import ray

    if given is not None:
        return given
    wanted = device.partition(":")[0] in _GPU_DEVICES and ray.cluster_resources().get("GPU", 0) > 0
    return float(ranks) if wanted else 0.0
