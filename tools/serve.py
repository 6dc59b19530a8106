"""Serve a checkpoint, a run directory (its newest) or a Hugging Face export: OpenAI's API, and a page at /.

python tools/serve.py CKPT                         one process, http://127.0.0.1:8000/
torchrun --nproc-per-node 2 tools/serve.py CKPT    tensor parallel over two GPUs, at any training layout

Stop it with Ctrl-C.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from megatron_share4v.config.engine import EngineConfig
from megatron_share4v.config.load import from_options
from megatron_share4v.config.serve import ServeConfig
from megatron_share4v.errors import exit_on_user_error
from megatron_share4v.logging import configure
from megatron_share4v.parallel.launch import World


def main() -> None:
    arguments = vars(parse())
    world = World.from_environment()
    configure(rank=world.rank)
    with exit_on_user_error(rank=world.rank, ranks=world.size):
        server = from_options(ServeConfig, _options_of(ServeConfig, arguments))
        engine = from_options(EngineConfig, _options_of(EngineConfig, arguments))
        from megatron_share4v.serve.launch import serve_checkpoint  # after the checks above: this imports megatron-core

        serve_checkpoint(arguments["checkpoint"], world, config=server, engine=engine, dtype=arguments["dtype"])


def _fields(cls: type) -> dict[str, Any]:
    return vars(cls)["__pydantic_fields__"]


def _options_of(cls: type, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in _fields(cls) if name in arguments}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="what it computes in (default: as in training)")
    for title, cls in (("server", ServeConfig), ("engine", EngineConfig)):
        group = parser.add_argument_group(title)
        for name, field in _fields(cls).items():
            group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **_kind(name, field))
    return parser.parse_args()


def _kind(name: str, field: Any) -> dict[str, Any]:
    text = f"{(field.description or '').replace('%', '%%')} (default: {field.default})".strip()
    if name == "allow_image_urls":
        return {"nargs": "*", "metavar": "DOMAIN", "help": text}
    return {"type": str if "str" in str(field.annotation) else yaml.safe_load, "metavar": "VALUE", "help": text}


if __name__ == "__main__":
    main()
