"""The request router that Ray Serve runs in each process that calls replicas.

Ray Serve copies this module by value into those processes, so it may hold nothing else. State that other modules read
is in `present`, which is imported by reference.
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from . import present


class NamedRouter(RequestRouter):  # type: ignore[misc]
    """Sends each call to the replica that its first argument names."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Store the present replicas."""
        super().update_replicas(replicas)
        present.names = tuple(sorted(replica.replica_id.unique_id for replica in replicas))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica that the call names. If it is gone, any replica, which then refuses the call."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # before the next attempt at the same request
        wanted = pending_request.args[0]
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        return [named or candidate_replicas]
