"""Serve a checkpoint, a run directory (its newest) or a Hugging Face export: OpenAI's API, and a page at /.

python tools/serve.py CKPT                         one process, http://127.0.0.1:8000/
torchrun --nproc-per-node 2 tools/serve.py CKPT    tensor parallel over two GPUs, at any training layout

Stop it with Ctrl-C.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_share4v.config.arguments import model_directory
from megatron_share4v.config.engine import EngineConfig
from megatron_share4v.config.options import add_config_options, build_config
from megatron_share4v.config.serve import ServeConfig, find_api_key
from megatron_share4v.errors import exit_on_closed_output, exit_on_user_error
from megatron_share4v.logging import configure
from megatron_share4v.parallel.launch import World


def main() -> None:
    arguments = parse()
    world = World.from_environment()
    configure(rank=world.rank)
    with exit_on_user_error(rank=world.rank, ranks=world.size):
        key = find_api_key(option=getattr(arguments, "api_key", None), file=arguments.api_key_file)
        if key is not None:
            arguments.api_key = key
        server, engine = build_config(ServeConfig, arguments), build_config(EngineConfig, arguments)
        from megatron_share4v.serve.launch import serve_checkpoint  # after the checks above: this imports megatron-core

        serve_checkpoint(arguments.checkpoint, world, config=server, engine=engine, dtype=arguments.dtype)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=model_directory)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="what it computes in (default: as in training)")
    group = parser.add_argument_group("server")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="file that holds the API key and nothing else")
    add_config_options(group, ServeConfig)
    add_config_options(parser.add_argument_group("engine"), EngineConfig)
    return parser.parse_args()


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
