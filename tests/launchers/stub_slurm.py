"""Stub of srun and scontrol for tests without Slurm; `install(folder)` writes both commands.

srun starts the command once per task with Slurm's variables, and kills all tasks --wait=SECONDS after the first has
ended. SIGUSR1 and SIGTERM are forwarded to the tasks and not to their children. scontrol lists hosts and records other
calls.
STUB_SLURM is the folder of `calls.txt` (one line per call) and `srun.pid`; STUB_SECOND is the length of a second of
--wait.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PYTHON = sys.executable


def install(folder: Path) -> None:
    """Write both commands into `folder`."""
    folder.mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        (folder / name).write_text(f'#!/usr/bin/env bash\nexec {PYTHON} {Path(__file__).resolve()} {name} "$@"\n')
        (folder / name).chmod(0o755)


def srun(arguments: list[str]) -> int:
    """Run all tasks; return the largest exit code, as srun does: 128 + signal for a killed task."""
    options = dict(argument.split("=") for argument in arguments if argument.startswith("--"))
    (Path(os.environ["STUB_SLURM"]) / "srun.pid").write_text(str(os.getpid()))
    command, deadline = arguments[len(options) :], float("inf")
    tasks, per_node = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % per_node)},
            start_new_session=True,
        )
        for task in range(tasks)
    ]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda received, frame: [process.send_signal(received) for process in processes])
    while any(process.poll() is None for process in processes):
        if any(process.poll() is not None for process in processes):
            deadline = min(deadline, time.monotonic() + float(options["--wait"]) * float(os.environ["STUB_SECOND"]))
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return max(code if code >= 0 else 128 - code for code in (process.returncode for process in processes))


def scontrol(arguments: list[str]) -> int:
    """Print the hosts of `show hostnames LIST` (comma-separated); other calls are only recorded."""
    if arguments[:2] == ["show", "hostnames"]:
        print(*arguments[2].split(","), sep="\n")
    return 0


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    with (Path(os.environ["STUB_SLURM"]) / "calls.txt").open("a") as calls:
        calls.write(" ".join([name, *rest]) + "\n")
    sys.exit({"srun": srun, "scontrol": scontrol}[name](rest))
