"""Write the files of a Hugging Face directory other than weights: configuration, image processor, tokenizer, chat
template.

Two layouts: llava-hf (transformers' LlavaForConditionalGeneration, vLLM) and share4v (the official ShareGPT4V and LLaVA
code). All keys are written explicitly, in the spelling that both old and new readers know.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_share4v.checkpoint.hf.chat_template import to_jinja
from megatron_share4v.checkpoint.hf.families import CLIP_FAMILY, LLAMA_FAMILY, TOWER_FAMILIES
from megatron_share4v.checkpoint.hf.image_processor import to_image_processor
from megatron_share4v.checkpoint.hf.text_config import to_text_config
from megatron_share4v.checkpoint.hf.tokenizer import (
    ExportedTokenizer,
    export_tokenizer,
    slow_special_tokens_map,
    slow_tokenizer_config,
)
from megatron_share4v.checkpoint.hf.tokenizer_json import ExportedHfTokenizer, layout_token_ids
from megatron_share4v.checkpoint.hf.vision_config import to_vision_config
from megatron_share4v.checkpoint.hf.vocab import padded_llava_rows
from megatron_share4v.checkpoint.lazy_tensor import FLOATS
from megatron_share4v.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_share4v.errors import ConversionError
from megatron_share4v.text.sentencepiece_model import SentencePieceModel, read_sentencepiece_model
from megatron_share4v.text.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_share4v.text.template import IMAGE_PLACEHOLDER, get_template
from megatron_share4v.text.tokenizer import Tokenizer
from megatron_share4v.text.tokenizer_config import ADDED_TOKENS, TOKENIZER_CONFIG

_IMAGE_POLICIES = ("pad", "square")


def llava_vocab_rows(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """Return the vocabulary rows in llava-hf: the model's, <image> and <pad>, rounded up to a multiple of 64.

    <image> and <pad> are in the model's spare rows if it has more rows than the tokenizer has tokens.
    """
    last = max(model.language.vocab_size - 1, *layout_token_ids(tokenizer).values())
    return padded_llava_rows(last + 1)


def write_llava_hf_files(
    directory: Path,
    *,
    model: ModelConfig,
    tokenizer: Tokenizer,
    template: str,
    image_aspect_ratio: str,
    dtype: str,
    tower_dtype: str | None = None,
    tower_is_whole: bool = True,
) -> None:
    """Write all files of a llava-hf model except the weights into `directory`, which is created.

    tokenizer: of the checkpoint. template: conversation template for the chat template. dtype and tower_dtype: of
    the language model's and the tower's weights, "fp32", "bf16" or "fp16"; None for one dtype. tower_is_whole: whether
    the weights include the tower family's optional ones (SigLIP's pooling head). Raises ConversionError
    when the layout cannot express this model, tokenizer or template;
    DataError when the tokenizer cannot be read.
    """
    _check_image_policy(image_aspect_ratio)
    if model.projector.type != "mlp2x_gelu":
        raise ConversionError(
            f"the layout llava-hf has no projector of model.projector.type {model.projector.type}; "
            "use the layout share4v"
        )
    conversation = get_template(template)
    tokens = export_tokenizer(tokenizer, conversation, vocab_size=model.language.vocab_size)
    chat = to_jinja(conversation, bos=tokens.bos_id is not None)
    rows = llava_vocab_rows(model, tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(
        directory / "config.json",
        _llava_config(
            model,
            tokens,
            rows=rows,
            image_aspect_ratio=image_aspect_ratio,
            dtype=dtype,
            tower_dtype=tower_dtype or dtype,
            tower_is_whole=tower_is_whole,
        ),
    )
    _write_json(directory / "generation_config.json", _generation_config(tokens))
    pads = image_aspect_ratio == "pad"
    image = to_image_processor(model.vision, pads=pads)
    _write_json(directory / "preprocessor_config.json", {**image, "do_pad": pads, "processor_class": "LlavaProcessor"})
    _write_json(directory / "processor_config.json", _processor_config(model.vision))
    for name, content in tokens.files(max_length=model.language.max_position_embeddings).items():
        _write_json(directory / name, content)
    for path in tokens.copied:
        shutil.copyfile(path, directory / tokenizer.file_name)
    (directory / "chat_template.jinja").write_text(chat, encoding="utf-8")
    _write_json(directory / "chat_template.json", {"chat_template": chat})


def write_share4v_files(
    directory: Path,
    *,
    model: ModelConfig,
    tokenizer: Tokenizer,
    tower_folder: str,
    tower_name: str,
    image_aspect_ratio: str,
    dtype: str,
    tower_dtype: str | None = None,
) -> None:
    """Write all files of an official ShareGPT4V model except the weights into `directory`, which is created.

    tower_folder: name of the folder inside `directory` for the tower's files. tower_name: written unchanged to
    config.json as `mm_vision_tower`. config.json has the keys of ShareGPT4V-7B's. dtypes and errors: as for
    write_llava_hf_files.
    """
    _check_image_policy(image_aspect_ratio)
    _check_share4v_family(model)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise ConversionError(
            f"tokenizer {tokenizer.path}: the layout share4v has a sentencepiece tokenizer.model, this is a "
            f"{tokenizer.file_name}; use the layout llava-hf"
        )
    folder = directory / tower_folder
    tokens = read_sentencepiece_model(tokenizer.path)
    if tokenizer.vocab_size > model.language.vocab_size:
        raise ConversionError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces; the vocabulary is too small: "
            f"model.language.vocab_size is {model.language.vocab_size}. "
            "Give the tokenizer.model that the model was trained with"
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = _share4v_config(model, tokens, tower_name=tower_name, image_aspect_ratio=image_aspect_ratio, dtype=dtype)
    _write_json(directory / "config.json", config)
    ids = {"bos_token_id": tokens.bos_id, "eos_token_id": tokens.eos_id, "pad_token_id": tokens.unk_id}
    _write_json(directory / "generation_config.json", ids)
    shutil.copyfile(tokenizer.path, directory / "tokenizer.model")
    _write_json(
        directory / TOKENIZER_CONFIG,
        slow_tokenizer_config(tokenizer, tokens, max_length=model.language.max_position_embeddings),
    )
    _write_json(directory / "special_tokens_map.json", slow_special_tokens_map(tokenizer, tokens))
    if tokenizer.added:
        _write_json(directory / ADDED_TOKENS, {token.text: token.id for token in tokenizer.added})
    _write_json(
        folder / "config.json",
        {
            "architectures": [TOWER_FAMILIES[model.vision.model_type].architecture],
            **to_vision_config(model.vision),
            "torch_dtype": _torch_name(tower_dtype or dtype),
        },
    )
    _write_json(folder / "preprocessor_config.json", to_image_processor(model.vision, pads=False))


def _llava_config(
    model: ModelConfig,
    tokens: ExportedTokenizer | ExportedHfTokenizer,
    *,
    rows: int,
    image_aspect_ratio: str,
    dtype: str,
    tower_dtype: str,
    tower_is_whole: bool,
) -> dict[str, Any]:
    # transformers loads all parts in the dtype of the whole unless asked otherwise.
    own = {} if tower_dtype == dtype else {"torch_dtype": _torch_name(tower_dtype)}
    vision = model.vision
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": _torch_name(dtype),  # not `dtype`, which old readers ignore
        # transformers 4 reads the first, some engines the second.
        "image_token_index": tokens.image_id,
        "image_token_id": tokens.image_id,
        "image_seq_length": vision.num_features,
        "image_aspect_ratio": image_aspect_ratio,
        "pad_token_id": tokens.pad_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": _json_value(vision.feature_layer),
        "vision_feature_select_strategy": vision.feature_select,
        # Releases of transformers read it here, in text_config, or in both.
        "tie_word_embeddings": model.language.tie_word_embeddings,
        "text_config": _language_config(model, tokens, vocab_size=rows),
        "vision_config": {**to_vision_config(vision, has_optional=tower_is_whole), **own},
    }


def _share4v_config(
    model: ModelConfig, tokens: SentencePieceModel, *, tower_name: str, image_aspect_ratio: str, dtype: str
) -> dict[str, Any]:
    text = _language_config(model, tokens, vocab_size=model.language.vocab_size)
    del text["attention_bias"]  # transformers 4.31 does not know it
    return {
        **text,
        "architectures": ["Share4VLlamaForCausalLM"],
        "model_type": "share4v",
        "torch_dtype": _torch_name(dtype),
        "transformers_version": "4.31.0",
        "pad_token_id": tokens.unk_id,
        "pretraining_tp": 1,
        "image_aspect_ratio": image_aspect_ratio,
        "image_grid_pinpoints": None,
        "mm_vision_tower": tower_name,
        "mm_hidden_size": model.vision.feature_width,
        "mm_projector_type": model.projector.type,
        "mm_vision_select_layer": model.vision.feature_layer,
        "mm_vision_select_feature": "patch" if model.vision.feature_select == "default" else "cls_patch",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
        # Training switches that the official code reads when it continues training this model.
        "freeze_mm_mlp_adapter": False,
        "tune_entire_model": False,
        "tune_mm_mlp_adapter": False,
        "tune_vision_tower": False,
        "mm_projector_lr": None,
        "vision_tower_lr": None,
    }


def _language_config(
    model: ModelConfig, tokens: SentencePieceModel | ExportedTokenizer | ExportedHfTokenizer, *, vocab_size: int
) -> dict[str, Any]:
    text = to_text_config(model.language, vocab_size=vocab_size, init_std=model.init_std)
    return {**text, "bos_token_id": tokens.bos_id, "eos_token_id": tokens.eos_id}


def _generation_config(tokens: ExportedTokenizer | ExportedHfTokenizer) -> dict[str, int | list[int] | None]:
    """Return token ids only.

    Servers use a temperature written here as their default, and transformers refuses to save one without sampling.
    """
    ends = tokens.eos_ids
    eos = ends[0] if len(ends) == 1 else ends
    return {"bos_token_id": tokens.bos_id, "eos_token_id": eos, "pad_token_id": tokens.pad_id}


def _processor_config(vision: VisionConfig) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_PLACEHOLDER,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": vision.feature_select,
    }


def _json_value(layer: int | tuple[int, ...]) -> int | list[int]:
    return list(layer) if isinstance(layer, tuple) else layer


def _check_share4v_family(model: ModelConfig) -> None:
    """Refuse models that the official code, LLaMA of transformers 4.31 with a CLIP tower, cannot load."""
    vision, language, plain = model.vision, model.language, LanguageConfig()
    problems = []
    if vision.model_type != CLIP_FAMILY.model_type:
        problems.append(f"model.vision.model_type {vision.model_type}")
    if isinstance(vision.feature_layer, tuple):
        problems.append(f"model.vision.feature_layer {vision.feature_layer}")
    if language.model_type != LLAMA_FAMILY.model_type:
        problems.append(f"model.language.model_type {language.model_type}")
    else:
        for name in ("head_dim", "qkv_bias", "out_bias", "tie_word_embeddings", "rope_scaling"):
            if getattr(language, name) != getattr(plain, name):
                problems.append(f"model.language.{name} {getattr(language, name)}")
    if problems:
        raise ConversionError(
            f"the layout share4v cannot express {', '.join(problems)}: the official code loads a LLaMA with a CLIP "
            "tower; use the layout llava-hf"
        )


def _torch_name(dtype: str) -> str:
    assert dtype in FLOATS, f"dtype {dtype!r} is none of {', '.join(FLOATS)}"
    return str(FLOATS[dtype]).removeprefix("torch.")


def _check_image_policy(image_aspect_ratio: str) -> None:
    if image_aspect_ratio not in _IMAGE_POLICIES:
        raise ConversionError(
            f"image_aspect_ratio {image_aspect_ratio!r} cannot be exported; use {' or '.join(_IMAGE_POLICIES)}"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
