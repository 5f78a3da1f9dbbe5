"""Limits a one-machine cluster to the loopback interface."""

from typing import Any

import ray


def keep_to_loopback() -> None:
    """On a node whose address is a loopback address, make Ray Serve open its ports there only.

    Each replica has a port for calls between replicas, which Ray Serve opens on every interface. Call this in a
    replica's constructor. Raises AttributeError if Ray Serve's code for it differs from the tested version, so that no
    port is opened unnoticed.
    """
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    open_port = replica.add_port_to_grpc_server

    def open_on_loopback(server: Any, address: str) -> Any:
        return open_port(server, f"127.0.0.1:{address.rpartition(':')[2]}")

    replica.add_port_to_grpc_server = open_on_loopback
