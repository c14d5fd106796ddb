# SPDX-License-Identifier: Apache-2.0
"""Two Ray nodes on this machine, with a CPU each for work; stopped with all that runs on them."""

import os
import socket

import pytest

STORE = 80 * 2**20  # bytes, the least that Ray takes is 75 MiB


@pytest.fixture(scope="module")
def nodes():
    """The address of a cluster."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_agent_register_timeout_ms"] = "120000"  # a busy machine needs more than 30 s
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": STORE, "include_log_monitor": False}
    both = Cluster()
    try:
        started(lambda: both.add_node(**node, include_dashboard=False, no_monitor=True))
        started(lambda: both.add_node(**node))
        yield both.address
    finally:
        both.shutdown()


@pytest.fixture(scope="module")
def cluster(nodes):
    """This process is the driver of a cluster."""
    import ray

    ray.init(address=nodes, log_to_driver=False, logging_level="ERROR")
    yield nodes
    ray.shutdown()


def started(start):
    """Start a node; Ray gives one 30 s, which a busy machine may not keep."""
    for left in (2, 1, 0):
        try:
            return start()
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
