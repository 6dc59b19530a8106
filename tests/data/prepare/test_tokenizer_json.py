"""A data set prepared with a tokenizer.json and a language model's template, its labels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_hf_tokenizer import write_llama_3_like, write_qwen_like

from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.loading.encode import Encoder, count_trained_positions
from megatron_share4v.data.prepare.options import PrepareOptions
from megatron_share4v.data.prepare.writer import prepare
from megatron_share4v.data.store.index import Index
from megatron_share4v.data.store.sample_reader import SampleReader
from megatron_share4v.errors import DataError
from megatron_share4v.text.load_tokenizer import load_tokenizer
from megatron_share4v.text.template import get_template
from megatron_share4v.text.template_format import TrainedMarkers


def prepare_with(prepared, output: Path, tokenizer: Path, markers: TrainedMarkers, template: str) -> Index:
    prepare(
        PrepareOptions(
            annotations=prepared.annotations,
            images=prepared.images,
            output=output,
            tokenizer=tokenizer,
            template=template,
            trained_markers=markers,
            max_text_length=512,
        )
    )
    return Index.open(output)


@pytest.mark.parametrize("markers", ["answer_only", "official"])
def test_counts_are_those_of_the_encoder(prepared, tmp_path: Path, markers: TrainedMarkers) -> None:
    path = write_qwen_like(tmp_path / "tokenizer")
    index, tokenizer = prepare_with(prepared, tmp_path / "out", path, markers, "qwen_1_5"), load_tokenizer(path)
    template = get_template("qwen_1_5", markers)
    encoder = Encoder(tokenizer=tokenizer, template=template, max_text_length=512, images=ImagePolicy(28))
    reader = SampleReader(index)
    for row, counted in enumerate(index.rows):
        example = encoder.encode(reader.read(row, with_image=False), with_pixels=False)
        assert (counted["n_tok"], counted["n_lab"]) == (len(example.input_ids), count_trained_positions(example.labels))
    reader.close()
    info = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert (info["template"], info["trained_markers"], info["tokenizer_rule"]) == ("qwen_2", markers, None)
    index.check(tokenizer=tokenizer, template=template, max_text_length=512)
    other: TrainedMarkers = "official" if markers == "answer_only" else "answer_only"
    with pytest.raises(DataError, match=f"trained_markers is {other}, prepared with {markers}"):
        index.check(tokenizer=tokenizer, template=get_template("qwen_1_5", other), max_text_length=512)


def test_a_template_of_another_language_model_is_refused(prepared, tmp_path: Path) -> None:
    path = write_llama_3_like(tmp_path / "tokenizer")
    for template in ("vicuna_v1", "qwen_2.5"):
        with pytest.raises(DataError, match=r"an answer would have no end.*tokens of llama_3, llava_llama_3"):
            prepare_with(prepared, tmp_path / "out", path, "answer_only", template)
    assert not (tmp_path / "out").exists()
