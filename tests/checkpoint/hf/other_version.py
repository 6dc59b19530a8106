"""Compare ids, pixels, logits and greedy answers of exports under another transformers release than the tests use.

Run by hand, from the root, for each release that users are told about; it installs nothing:

python -m venv OTHER; OTHER/bin/pip install torch transformers==4.57.6 sentencepiece pillow
    python tests/checkpoint/hf/other_version.py OTHER/bin/python

This interpreter makes checkpoints, of CLIP with LLaMA in fp32 and bf16 and of pairs of other families, exports them and
answers; the other one loads each export through the Auto classes, offline, without this project in its path. Exit code
1 when something differs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TOLERANCE = 1e-4  # fp32 with logits of a few units: sums in another order
NEW_TOKENS = 16
PAIRS = ("clip x llama3", "siglip x qwen2 tied", "dinov2 x qwen2 untied", "siglip x qwen3", "dinov2 x mistral")


def main() -> None:
    if sys.argv[1] == "--load":
        sys.exit(load(Path(sys.argv[2])))
    root = Path(__file__).resolve().parents[3]
    sys.path[:0] = [str(root), str(root / "tests")]
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        for name in ("fp32", "bf16", *PAIRS):
            folder = Path(directory) / name
            answer(folder, name)
            done = subprocess.run([sys.argv[1], "-I", __file__, "--load", str(folder)])
            failed |= done.returncode != 0
    sys.exit(1 if failed else 0)


def answer(folder: Path, name: str) -> None:
    """Write FOLDER/export of a dtype or a pair, and FOLDER/results.pt with our results for some questions."""
    from hf_fixtures import write_llava_hf
    from hf_pairs import write_pair

    from megatron_share4v.checkpoint.hf.exporter import export_model
    from megatron_share4v.checkpoint.hf.importer import ImportOptions, import_model
    from megatron_share4v.checkpoint.hf.source.model import HfSource
    from megatron_share4v.data.images.pixels import normalise
    from megatron_share4v.data.loading.prompt import make_prompt
    from megatron_share4v.evaluate.agreement import compute_logits, generated_questions, to_messages
    from megatron_share4v.infer.session import Session
    from megatron_share4v.mcore.groups import open_mesh
    from megatron_share4v.parallel.device import Device
    from megatron_share4v.parallel.launch import World, process_group
    from megatron_share4v.parallel.layout import Layout

    if name in PAIRS:
        write_pair(folder / "hf", name)
    else:
        write_llava_hf(folder / "hf", dtype=name)
    import_model(HfSource(directory=folder / "hf"), folder / "checkpoint", options=ImportOptions(template="vicuna_v1"))
    export_model(folder / "checkpoint", folder / "export", layout="llava-hf")
    device, found = Device("cpu"), []
    with (
        process_group(World.single_process(), device, timeout_s=60),
        open_mesh(Layout(), device=device) as mesh,
    ):
        session = Session.open(folder / "checkpoint", mesh=mesh, dtype="fp32")
        vision = session.config.model.vision
        for question in generated_questions():
            prompt = make_prompt(
                session.encoder,
                question.turns,
                image=question.image,
                tokens_per_image=vision.num_features,
                name=question.name,
            )
            [answered] = session.answer_ids([question], max_new_tokens=NEW_TOKENS)
            found.append(
                {
                    "messages": to_messages(question),
                    "ids": prompt.token_ids.index_fill(0, prompt.image_slots, session.config.model.language.vocab_size),
                    "pixels": normalise(prompt.pixels, dtype=torch.float32, vision=vision),
                    "logits": compute_logits(session, prompt),
                    "answer": answered,
                }
            )
    torch.save(found, folder / "results.pt")


@torch.no_grad()
def load(folder: Path) -> int:
    """Compare in the other interpreter; return 0 when everything is equal, and print the findings as one JSON line."""
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder / "export", local_files_only=True)
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder / "export",
        local_files_only=True,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="sdpa",
    )
    model.eval()
    keys = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    equal = {"ids": True, "pixels": True, "greedy": True, "one_bos": True}
    largest = scale = 0.0
    questions = torch.load(folder / "results.pt", weights_only=False)
    for question in questions:
        inputs = processor.apply_chat_template(
            question["messages"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        given = inputs["input_ids"][0]
        equal["ids"] &= torch.equal(given, question["ids"])
        equal["one_bos"] &= int((given == model.config.text_config.bos_token_id).sum()) == 1
        if "pixel_values" in inputs:
            equal["pixels"] &= torch.equal(inputs["pixel_values"], question["pixels"])
        logits = model(**inputs).logits[0, :, : question["logits"].shape[1]]
        difference = float((logits - question["logits"]).abs().max())
        largest = max(largest, math.inf if math.isnan(difference) else difference)
        scale = max(scale, float(logits.abs().max()))
        new = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, given.numel() :].tolist()
        end = model.config.text_config.eos_token_id
        equal["greedy"] &= (new[: new.index(end)] if end in new else new) == question["answer"]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    found = {
        "export": folder.name,
        "questions": len(questions),
        **keys,
        **equal,
        "max_logit_diff": largest,
        "logit_scale": scale,
    }
    print(json.dumps({**versions, **found}))
    return 0 if not any(keys.values()) and all(equal.values()) and largest <= TOLERANCE else 1


if __name__ == "__main__":
    main()
