"""Convert checkpoints to and from Hugging Face layouts; verify, inspect, average and prune checkpoints.

import   --from DIR --to CKPT        llava-hf, ShareGPT4V/LLaVA, or parts (--tower, --projector, --base);
                                     --from may be a peft adapter or delta weights
export   --from CKPT --to DIR --layout llava-hf|share4v
verify   --hf DIR --checkpoint CKPT  names and bits of every tensor, and with --logits the outputs of both models
inspect  CKPT                        tensors, hashes, configuration, position in the data
average  --from CKPT ... --to CKPT   mean of the weights; of one checkpoint, its weights without optimizer state
prune    DIR --keep-last N           remove old checkpoints of a run
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_share4v.config.arguments import above_zero, natural, positive
from megatron_share4v.errors import ConversionError, exit_on_closed_output, exit_on_user_error
from megatron_share4v.logging import configure
from megatron_share4v.text.tokenizer_config import RULES

if TYPE_CHECKING:
    from megatron_share4v.checkpoint.hf.source.model import HfSource

DTYPES = ("fp32", "bf16", "fp16")


def main() -> None:
    arguments = parse()
    # Set before torch is imported: huge pages make large allocations faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    configure(rank=0)
    with exit_on_user_error():
        arguments.run(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    importing = add_command(commands, "import", import_)
    importing.add_argument(
        "--from", dest="source", type=Path, required=True, help="directory of a model, a peft adapter, or delta weights"
    )
    importing.add_argument("--to", type=Path, required=True, help="the checkpoint to write")
    importing.add_argument("--dtype", choices=DTYPES, help="round all weights to this dtype (default: keep each)")
    importing.add_argument(
        "--template", help="conversation template (default: that of the model's files, or else vicuna_v1, and says so)"
    )
    importing.add_argument(
        "--image-orientation",
        choices=("stored", "exif"),
        default="stored",
        help="exif: whatever runs the checkpoint turns photographs upright by their EXIF tag (default: stored)",
    )
    importing.add_argument("--seed", type=int, default=42, help="seed of a projector that no part has")
    add_source_options(importing)
    exporting = add_command(commands, "export", export_)
    exporting.add_argument(
        "--from", dest="source", type=Path, required=True, help="a checkpoint, or a run directory for its newest"
    )
    exporting.add_argument("--to", type=Path, required=True, help="the directory to write")
    exporting.add_argument("--layout", choices=("llava-hf", "share4v"), required=True)
    exporting.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    exporting.add_argument(
        "--tower-name",
        metavar="PATH_OR_HUB_ID",
        help="share4v: what config.json names as the vision tower (default: the absolute path of the export's own)",
    )
    exporting.add_argument("--shard-gb", type=above_zero, default=5.0, help="largest file in GB")
    verifying = add_command(commands, "verify", verify_)
    verifying.add_argument("--hf", dest="source", type=Path, required=True)
    verifying.add_argument("--checkpoint", type=Path, required=True)
    verifying.add_argument(
        "--logits",
        action="store_true",
        help="compare both models on generated images and prompts (llava-hf; needs transformers)",
    )
    add_source_options(verifying)
    inspecting = add_command(commands, "inspect", inspect_)
    inspecting.add_argument("checkpoint", type=Path)
    inspecting.add_argument("--hashes", action="store_true", help="hash the components even if that reads all weights")
    inspecting.add_argument("--every-layer", action="store_true")
    averaging = add_command(commands, "average", average_)
    averaging.add_argument("--from", dest="sources", type=Path, nargs="+", required=True)
    averaging.add_argument("--to", type=Path, required=True)
    pruning = add_command(commands, "prune", prune_)
    pruning.add_argument(
        "directory", type=Path, help="a run directory, or its checkpoints/; no process may be training in it"
    )
    pruning.add_argument("--keep-last", type=positive, required=True)
    pruning.add_argument("--keep-every-steps", type=natural, default=0)
    return parser.parse_args()


def add_command(commands, name: str, run) -> argparse.ArgumentParser:
    command = commands.add_parser(name)
    command.set_defaults(run=run)
    return command


def add_source_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", type=Path, help="the model that the adapter, delta or projector belongs to")
    command.add_argument("--delta", action="store_true", help="the directory holds delta weights")
    command.add_argument(
        "--tower", type=Path, help="directory of the vision tower, when it is neither inside nor beside the model"
    )
    command.add_argument(
        "--use-tower", choices=("inside", "folder"), help="which one, when there is one among the weights and another"
    )
    command.add_argument("--projector", type=Path, help="mm_projector.bin, or a directory that has it")
    command.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer.model or tokenizer.json, or its directory, if not beside the weights",
    )
    command.add_argument(
        "--tokenizer-rule",
        choices=RULES,
        help="how text after a special token is tokenised (default: as tokenizer_config.json says; docs/data.md)",
    )
    command.add_argument(
        "--any-tower", action="store_true", help="accept a tower other than the one that the model names"
    )


def source_of(arguments: argparse.Namespace) -> HfSource:
    from megatron_share4v.checkpoint.hf.source.model import HfSource

    options = ("base", "delta", "tower", "use_tower", "projector", "tokenizer", "tokenizer_rule", "any_tower")
    return HfSource(directory=arguments.source, **{name: getattr(arguments, name) for name in options}).resolve()


def import_(arguments: argparse.Namespace) -> None:
    from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model

    names = ("dtype", "template", "image_orientation", "seed")
    options = ImportOptions(**{name: getattr(arguments, name) for name in names})
    import_model(source_of(arguments), arguments.to, options=options)


def export_(arguments: argparse.Namespace) -> None:
    from megatron_share4v.checkpoint.hf.exporter import export_model

    shard_bytes = int(arguments.shard_gb * 1e9)
    export_model(
        arguments.source,
        arguments.to,
        layout=arguments.layout,
        dtype=arguments.dtype,
        shard_bytes=shard_bytes,
        tower=arguments.tower_name,
    )


def verify_(arguments: argparse.Namespace) -> None:
    from megatron_share4v.checkpoint.hf.verify import verify_conversion

    source = source_of(arguments)
    # Flushed, because an error exits without flushing buffers.
    print(verify_conversion(source, arguments.checkpoint), flush=True)
    if arguments.logits:
        from megatron_share4v.checkpoint.hf.importer import PROVENANCE
        from megatron_share4v.evaluate.agreement import compare_single_process, generated_questions

        found = compare_single_process(arguments.checkpoint, source.directory, questions=generated_questions())
        # A published model may have another chat template; an export of this package has the checkpoint's.
        exported = (source.directory / PROVENANCE).is_file()
        if not (found.holds_with_text if exported else found.holds):
            raise ConversionError(f"{arguments.source}: {found}")
        print(found)


def inspect_(arguments: argparse.Namespace) -> None:
    from megatron_share4v.checkpoint.inspect import describe_checkpoint

    for line in describe_checkpoint(arguments.checkpoint, hashes=arguments.hashes, every_layer=arguments.every_layer):
        print(line)


def average_(arguments: argparse.Namespace) -> None:
    from megatron_share4v.checkpoint.hf.average import average_checkpoints

    average_checkpoints(arguments.sources, arguments.to)


def prune_(arguments: argparse.Namespace) -> None:
    from megatron_share4v.checkpoint.retention import prune_checkpoints

    for path in prune_checkpoints(
        arguments.directory, keep_last=arguments.keep_last, keep_every_steps=arguments.keep_every_steps
    ):
        print(f"removed {path}")


if __name__ == "__main__":
    with exit_on_closed_output():
        main()
