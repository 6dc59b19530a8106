"""srun and scontrol for tests without Slurm: `link(folder)` puts both there; each is this file, and does what the name it is called by says.

srun starts the command once per task with Slurm's variables; --wait=SECONDS after the first has ended, it ends all. SIGUSR1 and SIGTERM, which Slurm
sends to a step's tasks, reach exactly these processes and not their children. scontrol lists hosts and writes down what else it is asked.
STUB_SLURM names the folder where `calls.txt` (a line per call) and `srun.pid` are kept; STUB_SECOND is how long a second of --wait lasts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PYTHON = sys.executable


def link(folder: Path) -> None:
    """Make both commands in `folder`."""
    folder.mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        (folder / name).write_text(f'#!/usr/bin/env bash\nexec {PYTHON} {Path(__file__).resolve()} {name} "$@"\n')
        (folder / name).chmod(0o755)


def srun(arguments: list[str]) -> int:
    """Run every task of the step; the largest exit code, 128 + signal for one that was killed, as srun has it."""
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
    """`show hostnames LIST` with names separated by commas; anything else is only written down."""
    if arguments[:2] == ["show", "hostnames"]:
        print(*arguments[2].split(","), sep="\n")
    return 0


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    with (Path(os.environ["STUB_SLURM"]) / "calls.txt").open("a") as calls:
        calls.write(" ".join([name, *rest]) + "\n")
    sys.exit({"srun": srun, "scontrol": scontrol}[name](rest))
