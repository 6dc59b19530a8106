"""Start a training command again until it is made: python tools/supervise.py [options] -- torchrun ... tools/train.py CONFIG.yaml [dotted.key=value ...]

Each start goes on from the newest whole checkpoint. Ends and their reasons stand in restarts.jsonl of the run directory; a step that has ended the
run twice is passed over. Not started again is a run that was asked to end (exit code 75) or whose user has to do something (2). SIGTERM, SIGUSR1
and SIGINT are handed to the ranks of this host, which save and end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_share4v.config.arguments import at_least_zero, natural
from megatron_share4v.errors import ConfigError, disk_errors_as_config_error, exit_on_user_error
from megatron_share4v.logging import configure
from megatron_share4v.resilience.supervisor import RestartPolicy, Supervisor, run_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--max-restarts", type=natural, default=3, help="one after another without a new checkpoint (default 3)"
    )
    parser.add_argument("--pause-s", type=at_least_zero, default=10.0, help="seconds before each (default 10)")
    parser.add_argument(
        "--run", type=Path, help="run directory; default: the one that the command's YAML file and overrides name"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="on all nodes but the first: start again, but leave files to the first node's supervisor",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: what starts the run")
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
    main()
