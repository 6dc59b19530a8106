"""The exported directories without our weights, as transformers' Auto classes read them offline: ids, pixels, chat template, configuration."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
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

from examples.quickstart.tokenizer import train_tokenizer
from megatron_share4v.checkpoint.hf.chat_template import to_jinja
from megatron_share4v.checkpoint.hf.config import parse_model_config, parse_vision_config
from megatron_share4v.checkpoint.hf.metadata_files import llava_vocab_rows, write_llava_hf_files, write_share4v_files
from megatron_share4v.config.model import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_share4v.data.images.pil_decoder import decode
from megatron_share4v.data.images.policy import ImagePolicy, normalise
from megatron_share4v.errors import ConfigError, ConversionError
from megatron_share4v.text.mask import IMAGE_TOKEN_INDEX, encode_prompt
from megatron_share4v.text.template import TEMPLATES, Message, get_template, render_prompt
from megatron_share4v.text.tokenizer import Tokenizer

VICUNA = get_template("vicuna_v1")
CORPUS = [
    VICUNA.system, "USER: What animal is this? ASSISTANT: A cat. It is sleeping on the sofa.", "Two dogs run. How many are there?",
    "Short questions have  short answers.   Long ones    do not.", "日本語 é",
]  # fmt: skip
PIECES = 440
MODEL = ModelConfig(
    vision=VisionConfig(image_size=28, patch_size=14, hidden_size=32, intermediate_size=64, num_layers=3, num_attention_heads=4),
    language=LanguageConfig(
        vocab_size=PIECES, hidden_size=48, intermediate_size=80, num_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, rope_theta=5000.0, rms_norm_eps=1e-6,
    ),
)  # fmt: skip
PICTURE = Image.new("RGB", (50, 20), (10, 200, 30))
ALPHABET = [
    "A", " cat", " ", "  ", "\n", "\n\n", "\t", "é", "e\u0301", "日", "😀", "👩‍👩‍👧", "</s>", "<s>", "<unk>", "</s>USER", "<", "s>", "###", "ASSISTANT:",
    "0", "\u200d", "▁", "\0", "<0x0A>", "\r\n", "נ", "\ufeff", "<imag", "{{ x }}", "{% if %}", "'", '"', "\\n", "&lt;",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "model.model"
    train_tokenizer(CORPUS * 20, path, vocab_size=PIECES)
    return path


@pytest.fixture(scope="module")
def exported(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llava") / "export"
    write_llava_hf_files(
        directory, model=MODEL, tokenizer=tokenizer_path, template="vicuna_v1", image_aspect_ratio="pad", dtype="fp32"
    )
    return directory


@pytest.fixture(scope="module")
def processor(exported: Path):
    return AutoProcessor.from_pretrained(exported, local_files_only=True)


@pytest.fixture(scope="module")
def ours(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


def texts() -> list[str]:
    draw = random.Random(0)
    return [
        "",
        " ",
        "\n",
        "A cat.</s>USER",
        " long answers " * 200,
        *("".join(draw.choices(ALPHABET, k=draw.randrange(1, 20))) for _ in range(300)),
    ]


def expanded(ids: Sequence[int]) -> list[int]:
    """Our prompt with <image> in every position of the image."""
    return [j for i in ids for j in ([PIECES] * MODEL.vision.num_patches if i == IMAGE_TOKEN_INDEX else [i])]


def chat(turns: Sequence[Message]) -> list[dict]:
    """The same turns as messages with parts."""
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


def test_ids_of_any_text_are_ours(exported: Path, ours: Tokenizer):
    theirs = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    for text in texts():
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [ours.bos_id, *ids], repr(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), repr(text)


def test_prompts_of_any_text_with_an_image_are_ours(processor, ours: Tokenizer):
    pixels = {"images": [PICTURE]}
    for text in texts():
        turns = [Message("human", f"<image>\n{text}" if text else "<image>")]
        ids = encode_prompt(ours, VICUNA, turns, has_image=True)
        rendered = processor.apply_chat_template(chat(turns), add_generation_prompt=True, tokenize=False)
        assert rendered == "<s>" + render_prompt(VICUNA, turns, has_image=True)
        assert processor(text=rendered, add_special_tokens=False, **pixels)["input_ids"][0] == expanded(ids), repr(text)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_ours_with_one_bos(processor, ours: Tokenizer, name: str):
    turns = CONVERSATIONS[name]
    has_image = any("<image>" in turn.text for turn in turns)
    output = processor.apply_chat_template(
        chat(turns), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    [ids] = output["input_ids"].tolist()
    assert ids == expanded(encode_prompt(ours, VICUNA, turns, has_image=has_image))
    assert ids.count(ours.bos_id) == 1 and ids.count(PIECES) == MODEL.vision.num_patches * has_image


@pytest.mark.parametrize("name", [name for name in sorted(TEMPLATES) if not TEMPLATES[name].tags_image])
def test_every_template_renders_as_ours(processor, name: str):
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
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
    ]  # fmt: skip
    expected = "<s>Be brief. USER: What?\nWhy? ASSISTANT: So.</s>"
    assert [processor.tokenizer.apply_chat_template(messages, tokenize=False) for messages in (strings, lists)] == [
        expected
    ] * 2


def test_generation_marks_are_what_is_trained(processor, ours: Tokenizer):
    messages = chat([*CONVERSATIONS["text alone"], Message("gpt", "No.")])
    output = processor.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, kept in zip(output["input_ids"], output["assistant_masks"], strict=True) if kept]
    assert trained == [*ours.encode("Two.</s>"), *ours.encode("No.</s>")]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "one is by user"),
        ([{"role": "assistant", "content": "a"}], "one is by assistant"),
        ([{"role": "user", "content": [{"type": "video"}]}], "part of type video"),
    ],
)
def test_messages_that_the_model_was_not_trained_on_are_refused(processor, messages: list[dict], message: str):
    with pytest.raises(Exception, match=message):
        processor.tokenizer.apply_chat_template(messages, tokenize=False)


def test_both_template_files_say_the_same(exported: Path):
    source = (exported / "chat_template.jinja").read_text(encoding="utf-8")
    assert json.loads((exported / "chat_template.json").read_text(encoding="utf-8")) == {"chat_template": source}
    assert source.startswith("{{- bos_token -}}") and "{%- generation -%}" in source


@pytest.mark.parametrize("policy", ["pad", "square"])
def test_pixels_are_ours_bit_for_bit(tokenizer_path: Path, tmp_path: Path, policy: str):
    write_llava_hf_files(
        tmp_path, model=MODEL, tokenizer=tokenizer_path, template="vicuna_v1", image_aspect_ratio=policy, dtype="fp32"
    )
    write_share4v_files(
        tmp_path / "official",
        model=MODEL,
        tokenizer=tokenizer_path,
        tower_path="tower",
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
        for theirs in processors:
            assert torch.equal(
                theirs(image, return_tensors="pt")["pixel_values"], normalise(pixels[None], dtype=torch.float32)
            ), (mode, size)


def test_configuration_is_the_models(exported: Path, processor):
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
    assert len(tokenizer) == PIECES + 2 <= text.vocab_size == llava_vocab_rows(MODEL)
    written = json.loads((exported / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PIECES + 1}
    assert GenerationConfig.from_pretrained(exported).eos_token_id == 2


def test_published_sizes():
    assert llava_vocab_rows(ModelConfig()) == 32064


def test_our_reader_reads_the_model_back(exported: Path, tokenizer_path: Path, tmp_path: Path):
    llava = parse_model_config(json.loads((exported / "config.json").read_text()), where="export")
    assert (
        llava.model == replace(MODEL, language=replace(MODEL.language, vocab_size=448)) and llava.image_token == PIECES
    )
    write_share4v_files(
        tmp_path, model=MODEL, tokenizer=tokenizer_path, tower_path="tower", image_aspect_ratio="pad", dtype="bf16"
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


def test_a_model_of_this_configuration_loads_and_answers(exported: Path, processor):
    torch.manual_seed(0)
    random_model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(exported, local_files_only=True))
    hub = {
        "model.vision_tower.": "vision_tower.vision_model.", "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
    }  # fmt: skip
    weights = {}
    for name, tensor in random_model.state_dict().items():
        [prefix] = [prefix for prefix in hub if name.startswith(prefix)]
        weights[name.replace(prefix, hub[prefix], 1)] = tensor.contiguous()
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForImageTextToText.from_pretrained(exported, local_files_only=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.get_input_embeddings().num_embeddings == llava_vocab_rows(MODEL)
    chats = [chat(CONVERSATIONS[name]) for name in ("one turn", "three turns")]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **options)
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:]
    alone = [
        model.generate(**processor.apply_chat_template(one, **options), max_new_tokens=4, do_sample=False)[0, -4:]
        for one in chats
    ]
    assert torch.equal(together, torch.stack(alone))


def test_official_layout(tokenizer_path: Path, tmp_path: Path):
    tower = "released/vision_tower"
    write_share4v_files(
        tmp_path,
        model=ModelConfig(),
        tokenizer=tokenizer_path,
        tower_path=tower,
        image_aspect_ratio="pad",
        dtype="bf16",
    )
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        "config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json",
        "vision_tower/config.json", "vision_tower/preprocessor_config.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["Share4VLlamaForCausalLM"], "model_type": "share4v", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "freeze_mm_mlp_adapter": False, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "image_aspect_ratio": "pad", "image_grid_pinpoints": None, "initializer_range": 0.02,
        "max_position_embeddings": 4096, "mm_hidden_size": 1024, "mm_projector_lr": None, "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": tower, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.31.0", "tune_entire_model": False,
        "tune_mm_mlp_adapter": False, "tune_vision_tower": False, "use_cache": True, "use_mm_proj": True, "vision_tower_lr": None,
        "vocab_size": 32000,
    }  # fmt: skip
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["legacy"], config["padding_side"], config["pad_token"], config["tokenizer_class"]) == (
        True,
        "right",
        "<unk>",
        "LlamaTokenizer",
    )
    clip = AutoConfig.from_pretrained(tmp_path / "vision_tower", local_files_only=True)
    assert (clip.num_hidden_layers, clip.hidden_size, clip.image_size, clip.hidden_act) == (24, 1024, 336, "quick_gelu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image_aspect_ratio": "anyres"}, ConversionError, "image_aspect_ratio 'anyres'"),
        ({"template": "v1_mmtag"}, ConversionError, "'v1_mmtag'.*layout share4v"),
        ({"template": "vicuna_v2"}, ConfigError, "nearest is 'vicuna_v"),
        (
            {"model": replace(MODEL, projector=ProjectorConfig(type="linear"))},
            ConversionError,
            "model.projector.type linear",
        ),
        (
            {"model": replace(MODEL, language=replace(MODEL.language, vocab_size=400))},
            ConversionError,
            "440 pieces.*too small",
        ),
    ],
)
def test_what_llava_hf_cannot_say_is_refused_unwritten(
    tokenizer_path: Path, tmp_path: Path, changes: dict, error: type, message: str
):
    request = {
        "model": MODEL,
        "tokenizer": tokenizer_path,
        "template": "vicuna_v1",
        "image_aspect_ratio": "pad",
        "dtype": "fp32",
    } | changes
    with pytest.raises(error, match=message):
        write_llava_hf_files(tmp_path / "out", **request)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tower_path": ""}, "tower path ''"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ({"model": replace(MODEL, language=replace(MODEL.language, vocab_size=400))}, "440 pieces.*too small"),
    ],
)
def test_what_share4v_cannot_say_is_refused_unwritten(
    tokenizer_path: Path, tmp_path: Path, changes: dict, message: str
):
    request = {
        "model": MODEL,
        "tokenizer": tokenizer_path,
        "tower_path": "tower",
        "image_aspect_ratio": "pad",
        "dtype": "fp32",
    } | changes
    with pytest.raises(ConversionError, match=message):
        write_share4v_files(tmp_path / "out", **request)
    assert not (tmp_path / "out").exists()
