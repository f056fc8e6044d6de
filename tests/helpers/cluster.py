"""A Ray cluster of several nodes on this machine, in its own process: `python -m tests.helpers.cluster CPUS CPUS ...`.

A node may also claim GPUs, `CPUS:GPUS`; Ray does not check them. The process prints the cluster's address and then
reads commands: `kill 0` kills the first of these nodes. It ends when its stdin is closed.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


class RunningCluster:
    """A running cluster.

    Attributes:
        environment: for processes that use the cluster.
    """

    def __init__(self, process: subprocess.Popen[str], environment: dict[str, str]) -> None:
        self._process, self.environment = process, environment

    def kill_node(self, number: int) -> None:
        """Kill a node and all its processes; returns when they are dead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"kill {number}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().strip() == "killed"


@contextmanager
def ray_cluster(*nodes: int | str, pythonpath: str = str(ROOT), folder: Path) -> Iterator[RunningCluster]:
    """A cluster of nodes with so many processors each (and GPUs: `"2:1"`), and a head node that has none."""
    settings = {**SETTINGS, "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": pythonpath}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | settings
    log = open(folder / "cluster.log", "w")  # noqa: SIM115
    with log, subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.cluster", *map(str, nodes)],
        cwd=ROOT, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            started = json.loads(process.stdout.readline())
            yield RunningCluster(process, {**environment, "RAY_ADDRESS": started["address"]})
        finally:
            process.stdin.close()
            process.wait(60)


def main(resources: list[list[int]]) -> None:
    """Start the nodes, print the address, and carry out commands."""
    from ray.cluster_utils import Cluster

    settings: Any = {"include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **settings})
    options = [dict(zip(("num_cpus", "num_gpus"), each, strict=False)) for each in resources]
    nodes = [cluster.add_node(object_store_memory=100 << 20, **each) for each in options]
    cluster.wait_for_nodes()
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        _, number = line.split()
        cluster.remove_node(nodes[int(number)], allow_graceful=False)
        print("killed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main([[int(number) for number in argument.split(":")] for argument in sys.argv[1:]])
