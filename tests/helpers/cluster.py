"""A Ray cluster of several nodes on this one machine, in a process of its own: `python -m tests.machines CPUS CPUS …`.

A node may also claim GPUs, `CPUS:GPUS`, which Ray believes. It prints its address, and then obeys lines: `lose 0` kills
the first of these nodes without a farewell. When its input ends, so does it.
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

from tests.helpers.files import ROOT

SETTINGS = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


class Machines:
    """A cluster that is up: the environment for those who use it, and the power to lose a node."""

    def __init__(self, process: subprocess.Popen[str], environment: dict[str, str]) -> None:
        self._process, self.environment = process, environment

    def lose(self, number: int) -> None:
        """Kill a node and everything on it; returns when it is dead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"lose {number}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().strip() == "lost"


@contextmanager
def machines(*nodes: int | str, pythonpath: str = str(ROOT), folder: Path) -> Iterator[Machines]:
    """Nodes with so many processors each (and GPUs: `"2:1"`), beside a head that has none."""
    settings = {**SETTINGS, "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": pythonpath}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | settings
    log = open(folder / "machines.log", "w")  # noqa: SIM115
    with log, subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.cluster", *map(str, nodes)],
        cwd=ROOT, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            told = json.loads(process.stdout.readline())
            yield Machines(process, {**environment, "RAY_ADDRESS": told["address"]})
        finally:
            process.stdin.close()
            process.wait(60)


def main(offers: list[list[int]]) -> None:
    """Start the nodes, tell where they are, and obey."""
    from ray.cluster_utils import Cluster

    own: Any = {"include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **own})
    kinds = [dict(zip(("num_cpus", "num_gpus"), offer, strict=False)) for offer in offers]
    nodes = [cluster.add_node(object_store_memory=100 << 20, **kind) for kind in kinds]
    cluster.wait_for_nodes()
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        _, number = line.split()
        cluster.remove_node(nodes[int(number)], allow_graceful=False)
        print("lost", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main([[int(number) for number in argument.split(":")] for argument in sys.argv[1:]])
