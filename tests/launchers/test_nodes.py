"""torchrun scripts on two nodes: network namespaces connected by a veth pair."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import run_world
from launching import ROOT, lines

ADDRESSES = ("10.77.0.1", "10.77.0.2")
RANKS_PER_NODE, STEPS = 4, 3  # as in the configuration of conftest.py


@dataclass(frozen=True)
class Node:
    """Name of a network namespace, also its host name, and its address."""

    name: str
    address: str

    def start(self, script: str, *arguments: str, by: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
        """Start a script of examples/launch on this node. by: command that runs it."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        settings = {
            "PATH": path,
            "VIRTUAL_ENV": str(Path(sys.executable).parents[1]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.name,
        }
        set_host_name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        command = [
            "ip",
            "netns",
            "exec",
            self.name,
            *set_host_name,
            *by,
            "bash",
            f"examples/launch/{script}.sh",
            *arguments,
        ]
        return subprocess.Popen(
            command,
            env={**os.environ, **settings, **environment},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two connected nodes; skips without root or iproute2, and in most containers."""
    prefix = uuid.uuid4().hex[:6]
    made = [Node(f"s4v{prefix}{number}", address) for number, address in enumerate(ADDRESSES)]
    try:
        for node in made:
            _ip("netns", "add", node.name)
        _ip(
            "link",
            "add",
            made[0].name,
            "netns",
            made[0].name,
            "type",
            "veth",
            "peer",
            "name",
            made[1].name,
            "netns",
            made[1].name,
        )
        for node in made:
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.name)
            _ip("-n", node.name, "link", "set", node.name, "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
        yield made
    except (FileNotFoundError, PermissionError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for node in made:
            subprocess.run(["ip", "netns", "delete", node.name], capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def test_preflight_checks_run_on_both_nodes(nodes: list[Node], config: Path) -> None:
    """Use the launch script with static node ranks."""
    shared = {"NODES": "2", "MASTER_ADDR": ADDRESSES[0], "PROCESSES": "1"}
    arguments = (
        "multi_node_static",
        "tools/doctor.py",
        "env",
        str(config),
        "parallel.tensor=1",
        "parallel.pipeline=1",
        "parallel.sequence=false",
    )
    processes = [node.start(*arguments, **shared, NODE_RANK=str(number)) for number, node in enumerate(nodes)]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert (
        "2 ranks on" in outputs[0]
        and "all-reduce of 4 MB over 2 ranks" in outputs[0]
        and "2 ranks on" not in outputs[1]
    )


def train_on_rank(config: Path, directory: Path) -> None:
    """Train on one rank of a single node, in the process group of the harness."""
    from megatron_share4v.config.load import load_run
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.layout import Layout
    from megatron_share4v.train.build import build
    from megatron_share4v.train.loop import train

    run = load_run(config, [f"run.directory={directory}"])
    layout = Layout.for_world(run.parallel, world_size=2 * RANKS_PER_NODE)
    directory.mkdir(exist_ok=True)
    with open_mesh(layout, device=Device("cpu"), timeout_s=120) as mesh:
        train(build(run, mesh=mesh))


def test_two_nodes_equal_one_node(nodes: list[Node], config: Path) -> None:
    """Tensor 2 x pipeline 2 x data 2 with c10d rendezvous: losses and samples are bitwise those of one node."""
    both, one = config.parent / "both", config.parent / "one"
    shared = {"NODES": "2", "MASTER_ADDR": ADDRESSES[0], "PROCESSES": str(RANKS_PER_NODE), "RUN": "test"}
    processes = [
        node.start("multi_node_c10d", "tools/train.py", str(config), f"run.directory={both}",
                   **shared, LOCAL_ADDR=node.address, MEET_HERE=str(node is nodes[0]).lower())
        for node in nodes
    ]  # fmt: skip
    for process in processes:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
    run_world(2 * RANKS_PER_NODE, train_on_rank, config, one)
    names = ("step", "loss", "grad_norm", "consumed_samples", "trained_tokens")
    actual, reference = (
        [[line[name] for name in names] for line in lines(directory / "metrics.jsonl")] for directory in (both, one)
    )
    assert len(actual) == STEPS and actual == reference
    assert lines(both / "samples.jsonl") == lines(one / "samples.jsonl")
    assert len(list((both / "log").glob("rank*.txt"))) == 2 * RANKS_PER_NODE


def test_supervisors_of_both_nodes_restart(nodes: list[Node], config: Path) -> None:
    """The second node's rank is killed; its supervisor follows that of the first node, which records the reason."""
    directory, simple = (
        config.parent / "supervised",
        ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false"),
    )
    shared = {"NODES": "2", "MASTER_ADDR": ADDRESSES[0], "PROCESSES": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    fault, options = (
        f"kill_once:1:{STEPS}:{config.parent / 'killed'}",
        (f"run.directory={directory}", "checkpoint.every_steps=1", *simple),
    )
    processes = [
        node.start("multi_node_static", "tests/fault_injection.py", fault, str(config), *options,
                   by=("python", "tools/supervise.py", "--pause-s", "0", *role, "--"), **shared, NODE_RANK=str(number))
        for number, (node, role) in enumerate(zip(nodes, ((), ("--follow",))))
    ]  # fmt: skip
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [line["step"] for line in lines(directory / "metrics.jsonl")] == list(range(1, STEPS + 1))
    first, last = lines(directory / "restarts.jsonl")
    assert (
        f"killed without an error report (kill -9, out of memory): rank 1 ({nodes[1].name}, " in first["reason"]
        and first["step"] == STEPS
    ), first
    assert (first["newest_checkpoint"], first["again"], last["newest_checkpoint"], last["code"]) == (
        STEPS - 1,
        True,
        STEPS,
        0,
    )
    assert (
        all("Starting again in 0 s (1 of 3)" in output for output in outputs) and f"at step {STEPS - 1}" in outputs[0]
    )
