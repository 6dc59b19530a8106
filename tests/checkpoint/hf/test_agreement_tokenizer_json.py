"""transformers and this project agree on an exported model with a tokenizer.json, text included."""

from __future__ import annotations

from pathlib import Path

import hf_pairs
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf_tokenizer import write_llama_3_like, write_qwen_like

from megatron_share4v.checkpoint.hf.exporter import export_model
from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
from megatron_share4v.checkpoint.hf.source.model import HfSource
from megatron_share4v.evaluate.agreement import compare, generated_questions
from megatron_share4v.mcore.groups import open_mesh
from megatron_share4v.parallel.device import Device
from megatron_share4v.parallel.launch import World, process_group
from megatron_share4v.parallel.layout import Layout


@pytest.mark.parametrize(("pair", "template"), [("clip x qwen2 untied", "qwen_2.5"), ("clip x llama3", "llama_3")])
def test_an_export_computes_what_its_checkpoint_does(tmp_path: Path, pair: str, template: str) -> None:
    pieces = 283 if template == "qwen_2.5" else 294
    hf_pairs.write_pair(tmp_path / "hf", pair)
    _enlarge_spare_rows(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    write = write_qwen_like if template == "qwen_2.5" else write_llama_3_like
    write(tmp_path / "hf", pieces=pieces)
    import_model(HfSource(directory=tmp_path / "hf"), tmp_path / "checkpoint", options=ImportOptions(template=template))
    export_model(tmp_path / "checkpoint", tmp_path / "out", layout="llava-hf")
    device = Device("cpu")
    with process_group(World.single_process(), device, timeout_s=60), open_mesh(Layout(), device=device) as mesh:
        questions = generated_questions()
        found = compare(tmp_path / "checkpoint", tmp_path / "out", questions=questions, mesh=mesh, max_new_tokens=8)
    assert found.holds_with_text, found


def _enlarge_spare_rows(path: Path) -> None:
    """Let rows beyond the tokenizer's tokens have the largest logits, as those of an untrained model may have."""
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    tensors[name][hf_pairs.IMAGE_TOKEN :] = torch.randn_like(tensors[name][hf_pairs.IMAGE_TOKEN :]) * 10
    save_file(tensors, path, metadata={"format": "pt"})
