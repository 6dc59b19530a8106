"""Trains a run: torchrun --nproc-per-node N tools/train.py CONFIG.yaml [dotted.key=value ...]."""

from __future__ import annotations

import argparse

from megatron_share4v.config.load import load_run
from megatron_share4v.errors import exit_on_closed_output, exit_on_user_error
from megatron_share4v.parallel.launch import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a run's YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="values that replace those of the file"
    )
    arguments = parser.parse_args()
    with exit_on_user_error():
        world = World.from_environment()
    with exit_on_user_error(rank=world.rank, ranks=world.size):
        config = load_run(arguments.config, arguments.overrides)
        from megatron_share4v.train.loop import run  # after the checks above: this imports megatron-core

        run(config)


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
