"""Exported metadata files read by transformers' Auto classes offline: ids, pixels, chat template, configuration."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exported_model import MODEL, PIECES, VICUNA
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

from megatron_share4v.checkpoint.hf.chat_template import to_jinja
from megatron_share4v.checkpoint.hf.config import parse_model_config
from megatron_share4v.checkpoint.hf.metadata_files import llava_vocab_rows, write_llava_hf_files, write_share4v_files
from megatron_share4v.checkpoint.hf.tokenizer_json import layout_token_ids
from megatron_share4v.checkpoint.hf.vision_config import parse_vision_config
from megatron_share4v.config.model import ModelConfig, VisionConfig
from megatron_share4v.data.images.pil_decoder import decode
from megatron_share4v.data.images.pixels import normalise
from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.text.mask import IMAGE_TOKEN_INDEX, encode_prompt
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import TEMPLATES, Message, get_template, render_prompt
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import LEGACY_RULE, PUBLISHED_RULE, RULES, TokenizerSettings

PICTURE = Image.new("RGB", (50, 20), (10, 200, 30))
ALPHABET = [
    "A",
    " cat",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "é",
    "e\u0301",
    "日",
    "😀",
    "👩‍👩‍👧",
    "</s>",
    "<s>",
    "<unk>",
    "</s>USER",
    "<",
    "s>",
    "###",
    "ASSISTANT:",
    "0",
    "\u200d",
    "▁",
    "\0",
    "<0x0A>",
    "\r\n",
    "נ",
    "\ufeff",
    "<imag",
    "{{ x }}",
    "{% if %}",
    "'",
    '"',
    "\\n",
    "&lt;",
]


@pytest.fixture(scope="module", params=RULES)
def own(request: pytest.FixtureRequest, tokenizer_path: Path) -> Tokenizer:
    """This project's tokenizer under each rule for text after a special token."""
    return SentencePieceTokenizer(tokenizer_path, settings=TokenizerSettings(rule=request.param))


@pytest.fixture(scope="module")
def exported(own: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llava") / "export"
    write_llava_hf_files(
        directory, model=MODEL, tokenizer=own, template="vicuna_v1", image_aspect_ratio="pad", dtype="fp32"
    )
    return directory


@pytest.fixture(scope="module")
def processor(exported: Path):
    return AutoProcessor.from_pretrained(exported, local_files_only=True)


def texts(own: Tokenizer) -> list[str]:
    """Random texts; with the rule transformers-4.31 only a template's text or a space follows a special token.

    A <s> at the start is that of the prompt in an export.
    """
    draw = random.Random(0)
    found = [
        "",
        " ",
        "\n",
        "A cat.</s>USER",
        " long answers " * 200,
        "A cat.</s>USER: What</s> b",
        *("".join(draw.choices(ALPHABET, k=draw.randrange(1, 20))) for _ in range(300)),
    ]
    if own.rule == PUBLISHED_RULE:
        found = [re.sub("(</s>|<s>|<unk>)(?!USER: )", r"\1 ", text) for text in found]
    return found if own.rule == LEGACY_RULE else [text for text in found if not text.startswith("<s>")]


def expanded(ids: Sequence[int]) -> list[int]:
    """Expand the image token to <image> at every position of the image."""
    return [j for i in ids for j in ([PIECES] * MODEL.vision.num_patches if i == IMAGE_TOKEN_INDEX else [i])]


def chat(turns: Sequence[Message]) -> list[dict]:
    """Convert turns to messages with parts."""
    messages = []
    for turn in turns:
        text = turn.text.removeprefix("<image>").removeprefix("\n") if turn.text.startswith("<image>") else turn.text
        image = [{"type": "image", "image": PICTURE}] if turn.text.startswith("<image>") else []
        messages.append(
            {
                "role": "user" if turn.role == "human" else "assistant",
                "content": [{"type": "text", "text": text}, *image],
            }
        )
    return messages


CONVERSATIONS = {
    "one turn": [Message("human", "<image>\nWhat animal is this?")],
    "image alone": [Message("human", "<image>")],
    "three turns": [Message("human", "<image>\nWhat?"), Message("gpt", "A cat."), Message("human", " How many?\n")],
    "late image": [Message("human", "What?"), Message("gpt", "A </s> cat."), Message("human", "<image>\nAnd  this?")],
    "text alone": [Message("human", "How many?"), Message("gpt", "Two."), Message("human", "'Why' \"so\"?")],
}


def test_token_ids_equal_this_projects(exported: Path, own: Tokenizer):
    hf = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    for text in texts(own):
        ids = own.encode(text)
        assert hf(text)["input_ids"] == [own.bos_id, *ids], repr(text)
        assert hf(text, add_special_tokens=False)["input_ids"] == ids, repr(text)
        assert hf.decode(ids, skip_special_tokens=True) == own.decode(ids), repr(text)


def test_prompts_with_an_image_equal_this_projects(processor, own: Tokenizer):
    pixels = {"images": [PICTURE]}
    for text in texts(own):
        turns = [Message("human", f"<image>\n{text}" if text else "<image>")]
        ids = encode_prompt(own, VICUNA, turns, has_image=True)
        rendered = processor.apply_chat_template(chat(turns), add_generation_prompt=True, tokenize=False)
        assert rendered == "<s>" + render_prompt(VICUNA, turns, has_image=True)
        assert processor(text=rendered, add_special_tokens=False, **pixels)["input_ids"][0] == expanded(ids), repr(text)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_equal_this_projects_with_one_bos(processor, own: Tokenizer, name: str):
    turns = CONVERSATIONS[name]
    has_image = any("<image>" in turn.text for turn in turns)
    output = processor.apply_chat_template(
        chat(turns), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    [ids] = output["input_ids"].tolist()
    assert ids == expanded(encode_prompt(own, VICUNA, turns, has_image=has_image))
    assert ids.count(own.bos_id) == 1 and ids.count(PIECES) == MODEL.vision.num_patches * has_image


@pytest.mark.parametrize("name", [name for name in sorted(TEMPLATES) if not TEMPLATES[name].tags_image])
def test_every_template_renders_equally(processor, name: str):
    template = get_template(name)
    source = to_jinja(template)
    for turns in CONVERSATIONS.values():
        has_image = any("<image>" in turn.text for turn in turns)
        if template.caption_only and (len(turns) > 1 or not has_image):
            continue
        for system in (None, "Be brief.", ""):
            prompt = render_prompt(
                template if system is None else replace(template, system=system), turns, has_image=has_image
            )
            messages = [] if system is None else [{"role": "system", "content": system}]
            rendered = processor.tokenizer.apply_chat_template(
                messages + chat(turns), chat_template=source, add_generation_prompt=True, tokenize=False
            )
            assert rendered == "<s>" + prompt


def test_plain_strings_and_lists_of_text_render_alike(processor):
    content = [{"type": "text", "text": "What?"}, {"type": "text", "text": "Why?"}]
    strings = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?\nWhy?"},
        {"role": "assistant", "content": "So."},
    ]
    lists = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
    ]
    expected = "<s>Be brief. USER: What?\nWhy? ASSISTANT: So.</s>"
    assert [processor.tokenizer.apply_chat_template(messages, tokenize=False) for messages in (strings, lists)] == [
        expected
    ] * 2


def test_generation_marks_cover_trained_tokens(processor, own: Tokenizer):
    messages = chat([*CONVERSATIONS["text alone"], Message("gpt", "No.")])
    output = processor.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, kept in zip(output["input_ids"], output["assistant_masks"], strict=True) if kept]
    assert trained == [*own.encode("Two.</s>"), *own.encode("No.</s>")]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "one is by user"),
        ([{"role": "assistant", "content": "a"}], "one is by assistant"),
        ([{"role": "user", "content": [{"type": "video"}]}], "part of type video"),
    ],
)
def test_untrained_message_orders_are_refused(processor, messages: list[dict], message: str):
    with pytest.raises(Exception, match=message):
        processor.tokenizer.apply_chat_template(messages, tokenize=False)


def test_both_template_files_are_equal(exported: Path):
    source = (exported / "chat_template.jinja").read_text(encoding="utf-8")
    assert json.loads((exported / "chat_template.json").read_text(encoding="utf-8")) == {"chat_template": source}
    assert source.startswith("{{- bos_token -}}") and "{%- generation -%}" in source


@pytest.mark.parametrize("policy", ["pad", "square"])
def test_pixels_are_equal_bit_for_bit(tokenizer_path: Path, tmp_path: Path, policy: str):
    write_llava_hf_files(
        tmp_path,
        model=MODEL,
        tokenizer=SentencePieceTokenizer(tokenizer_path),
        template="vicuna_v1",
        image_aspect_ratio=policy,
        dtype="fp32",
    )
    write_share4v_files(
        tmp_path / "official",
        model=MODEL,
        tokenizer=SentencePieceTokenizer(tokenizer_path),
        tower_folder="tower",
        tower_name="tower",
        image_aspect_ratio=policy,
        dtype="fp32",
    )
    processors = [AutoProcessor.from_pretrained(tmp_path, local_files_only=True).image_processor]
    if policy == "square":
        processors.append(AutoImageProcessor.from_pretrained(tmp_path / "official" / "tower", local_files_only=True))
    draw = random.Random(0)
    modes = {
        (50, 20): "RGB",
        (20, 51): "RGB",
        (28, 28): "RGB",
        (113, 57): "RGB",
        (31, 200): "L",
        (90, 61): "RGBA",
        (9, 14): "P",
    }
    for size, mode in modes.items():
        image = Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).convert(mode)
        content = io.BytesIO()
        image.save(content, format="PNG")
        pixels = torch.from_numpy(decode(content.getvalue(), ImagePolicy(image_size=28, aspect_ratio=policy)).copy())
        for hf in processors:
            assert torch.equal(
                hf(image, return_tensors="pt")["pixel_values"],
                normalise(pixels[None], dtype=torch.float32, vision=VisionConfig()),
            ), (mode, size)


def test_configuration_equals_the_model(exported: Path, processor, own: Tokenizer):
    config = AutoConfig.from_pretrained(exported, local_files_only=True)
    text, tower = config.text_config, config.vision_config
    assert type(config).__name__ == "LlavaConfig" and config.architectures == ["LlavaForConditionalGeneration"]
    assert (config.image_token_id, config.pad_token_id, config.image_seq_length) == (PIECES, PIECES + 1, 4)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy, config.image_aspect_ratio) == (
        -2,
        "default",
        "pad",
    )
    assert (text.vocab_size, text.rope_parameters["rope_theta"], text.rms_norm_eps, text.num_key_value_heads) == (
        448,
        5000.0,
        1e-6,
        2,
    )
    assert (text.bos_token_id, text.eos_token_id, text.hidden_act, text.tie_word_embeddings) == (1, 2, "silu", False)
    assert (tower.num_hidden_layers, tower.hidden_act, tower.layer_norm_eps, tower.image_size) == (
        3,
        "quick_gelu",
        1e-5,
        28,
    )
    assert config.dtype == torch.float32
    tokenizer = processor.tokenizer
    assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.model_max_length) == ("left", PIECES + 1, 512)
    assert len(tokenizer) == PIECES + 2 <= text.vocab_size == llava_vocab_rows(MODEL, own)
    written = json.loads((exported / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PIECES + 1}
    assert GenerationConfig.from_pretrained(exported).eos_token_id == 2


@pytest.mark.parametrize(
    ("tokens", "rows", "pad_id", "written"),
    [(32000, 32000, 0, 32064), (128256, 128256, None, 128320), (151665, 151936, 151643, 151936)],
    ids=["Vicuna", "Llama 3", "Qwen2.5: in spare rows"],
)
def test_published_sizes(tokens: int, rows: int, pad_id: int | None, written: int):
    unk = 0 if pad_id == 0 else None
    tokenizer = SimpleNamespace(vocab_size=tokens, pad_id=pad_id, unk_id=unk, token_id=lambda name: None)
    model = replace(ModelConfig(), language=replace(ModelConfig().language, vocab_size=rows))
    assert llava_vocab_rows(model, tokenizer) == written
    assert layout_token_ids(tokenizer)["<image>"] == tokens


def test_our_reader_reads_the_model_back(exported: Path, tokenizer_path: Path, tmp_path: Path):
    llava = parse_model_config(json.loads((exported / "config.json").read_text()), where="export")
    assert (
        llava.model == replace(MODEL, language=replace(MODEL.language, vocab_size=448)) and llava.image_token == PIECES
    )
    write_share4v_files(
        tmp_path,
        model=MODEL,
        tokenizer=SentencePieceTokenizer(tokenizer_path),
        tower_folder="tower",
        tower_name="tower",
        image_aspect_ratio="pad",
        dtype="bf16",
    )
    official = parse_model_config(json.loads((tmp_path / "config.json").read_text()), where="export")
    assert (official.model.language, official.model.projector, official.tower) == (
        MODEL.language,
        MODEL.projector,
        "tower",
    )
    assert (
        parse_vision_config(
            json.loads((tmp_path / "tower" / "config.json").read_text()), feature_layer=-2, where="tower"
        )
        == MODEL.vision
    )


def test_a_model_of_this_configuration_loads_and_generates(exported: Path, processor, own: Tokenizer):
    torch.manual_seed(0)
    random_model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(exported, local_files_only=True))
    hub = {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    weights = {}
    for name, tensor in random_model.state_dict().items():
        [prefix] = [prefix for prefix in hub if name.startswith(prefix)]
        weights[name.replace(prefix, hub[prefix], 1)] = tensor.contiguous()
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForImageTextToText.from_pretrained(exported, local_files_only=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.get_input_embeddings().num_embeddings == llava_vocab_rows(MODEL, own)
    chats = [chat(CONVERSATIONS[name]) for name in ("one turn", "three turns")]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **options)
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:]
    alone = [
        model.generate(**processor.apply_chat_template(one, **options), max_new_tokens=4, do_sample=False)[0, -4:]
        for one in chats
    ]
    assert torch.equal(together, torch.stack(alone))
