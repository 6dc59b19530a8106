"""Restart a training command until its run completes: python tools/supervise.py [options] -- torchrun ... CONFIG.yaml

Each start continues from the newest valid checkpoint. The reason of each end is appended to restarts.jsonl in the run
directory; a step that ended the run twice is skipped. A run that was stopped (exit code 75) or needs its user (2) is
not restarted. SIGTERM, SIGUSR1 and SIGINT are passed on to the ranks of this host, which save and end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_share4v.config.arguments import at_least_zero, natural
from megatron_share4v.errors import (
    ConfigError,
    disk_errors_as_config_error,
    exit_on_closed_output,
    exit_on_user_error,
)
from megatron_share4v.logging import configure
from megatron_share4v.resilience.supervisor import RestartPolicy, Supervisor, run_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--max-restarts", type=natural, default=3, help="restarts in a row without a new checkpoint (default 3)"
    )
    parser.add_argument("--pause-s", type=at_least_zero, default=10.0, help="seconds before each restart (default 10)")
    parser.add_argument(
        "--run", type=Path, help="run directory; default: the one that the command's YAML file and overrides name"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="on all nodes but the first: restart with the first node's supervisor, and write no files",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: the command that starts the run")
    arguments = parser.parse_args()
    with exit_on_user_error():
        command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
        if not command:
            raise ConfigError("no command; write it after --")
        configure(rank=0)
        run = arguments.run or run_directory(command)
        policy = RestartPolicy(
            max_restarts=arguments.max_restarts, pause_s=arguments.pause_s, leads=not arguments.follow
        )
        with disk_errors_as_config_error(run):
            code = Supervisor(command, run, policy).supervise()
        sys.exit(code)


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
