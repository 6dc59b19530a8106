"""Data fingerprint in a checkpoint: each relevant change is reported, irrelevant settings are not included."""

import dataclasses

import pytest

from megatron_share4v.data.images.policy import ImagePolicy
from megatron_share4v.data.sampling.fingerprint import describe_data, fingerprint_differences
from megatron_share4v.data.sampling.packing import Packing
from megatron_share4v.data.sampling.sampler import Sampler
from megatron_share4v.text.template import get_template


def _plan(index, **changes: object) -> Sampler:
    settings = {
        "order": "random",
        "group_size": None,
        "seed": 11,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "tokens_per_image": 4,
        "pad_multiple": 8,
    }
    return Sampler(index, **(settings | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 12}, "seed: was 11, is 12"),
        (
            {"order": "block"},
            "order: was random, is block; block_size: was not set, is 64; block_window: was not set, is 32",
        ),
        (
            {"packing": Packing(160)},
            "pack_length: was not set, is 160; pack_window: was not set, is 2048; tokens_per_image: was not set, is 4",
        ),
        ({"global_batch_size": 16, "micro_batch_size": 1, "pad_multiple": 64}, ""),
    ],
)
def test_order(prepared, encoder, changes, named):
    saved, now = (describe_data(_plan(prepared.index, **settings), encoder) for settings in ({}, changes))
    assert "; ".join(fingerprint_differences(saved, now)) == named


def test_encoding(prepared, encoder):
    plan = _plan(prepared.index)
    saved = describe_data(plan, encoder)

    def named(**changes: object) -> str:
        return "; ".join(fingerprint_differences(saved, describe_data(plan, dataclasses.replace(encoder, **changes))))

    assert named() == ""
    assert named(template=get_template("plain")) == "template: was vicuna_v1, is plain"
    official = dataclasses.replace(encoder.template, trained_markers="official")
    assert named(template=official) == "trained_markers: was not set, is official"
    assert named(max_text_length=64) == "max_text_length: was 512, is 64"
    policy = ImagePolicy(image_size=56, aspect_ratio="square")
    assert (
        named(images=policy) == "image policy image_size: was 28, is 56; image policy aspect_ratio: was pad, is square"
    )


def test_orientation_counts_only_when_it_is_applied(prepared, encoder):
    """Checkpoints of before the option have no entry for it."""
    plan = _plan(prepared.index)
    saved = describe_data(plan, encoder)
    assert not [name for name in saved if "orientation" in name]
    turned = dataclasses.replace(encoder, images=dataclasses.replace(encoder.images, orientation="exif"))
    assert fingerprint_differences(saved, describe_data(plan, turned)) == [
        "image policy orientation: was not set, is exif"
    ]


def test_preprocessing_of_other_towers_is_in_it(prepared, encoder):
    """Checkpoints of before these fields have no entries for CLIP's values."""
    plan = _plan(prepared.index)
    saved = describe_data(plan, encoder)
    assert [name for name in saved if name.startswith("image policy")] == [
        "image policy image_size",
        "image policy aspect_ratio",
    ]
    policy = dataclasses.replace(
        encoder.images, resample="lanczos", resize="square", image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.5, 1.0)
    )
    now = describe_data(plan, dataclasses.replace(encoder, images=policy))
    assert fingerprint_differences(saved, now) == [
        "image policy resample: was not set, is lanczos",
        "image policy resize: was not set, is square",
        "image policy image_mean: was not set, is 0.5, 0.5, 0.5",
        "image policy image_std: was not set, is 0.25, 0.5, 1.0",
    ]


def test_long_hashes_are_shown_in_short():
    assert fingerprint_differences({"index": "a" * 64}, {"index": "b" * 64}) == [
        f"index: was {'a' * 12}, is {'b' * 12}"
    ]
