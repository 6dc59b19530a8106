"""Options made from a configuration class: values of every type, and all errors in one message."""

from __future__ import annotations

import argparse

import pytest

from megatron_share4v.config.base import Bool, NonNegativeFloat, PositiveInt, config
from megatron_share4v.config.options import add_config_options, build_config
from megatron_share4v.errors import ConfigError


@config
class Limits:
    name: str = "share4v"
    key: str | None = None
    requests: PositiveInt = 16
    positions: PositiveInt | None = None
    pause_s: NonNegativeFloat = 1.0
    cache: Bool = True
    domains: tuple[str, ...] | None = None


def limits(*words: str) -> Limits:
    parser = argparse.ArgumentParser()
    add_config_options(parser.add_argument_group("limits"), Limits)
    return build_config(Limits, parser.parse_args(words))


def test_options_of_a_configuration_class() -> None:
    assert limits() == Limits()
    given = ["--name", "4", "--key", "007", "--requests", "2", "--positions", "300", "--pause-s", "1e-1"]
    assert limits(*given, "--cache", "false", "--domains", "a.org", "b.org") == Limits(
        name="4", key="007", requests=2, positions=300, pause_s=0.1, cache=False, domains=("a.org", "b.org")
    )
    assert limits("--positions", "null", "--domains") == Limits(positions=None, domains=())
    assert limits("--pause-s", "3").pause_s == 3.0 and limits("--cache", "True").cache


def test_refused_options_of_a_configuration_class_are_named_together() -> None:
    with pytest.raises(ConfigError) as error:
        limits("--requests", "0", "--positions", "many", "--pause-s", "nan", "--cache", "maybe")
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == [
        "--requests",
        "--positions",
        "--pause-s",
        "--cache",
    ]
    assert 'got "many"' in str(error.value) and 'got "maybe"' in str(error.value)
