from __future__ import annotations

import pytest

from chunkwise.config.flags import InvalidFlags, build_parser
from chunkwise.config.resolve import router_settings, serve_settings, shard_settings
from chunkwise.config.settings import ShardSettings, WatermarkSettings

MODEL = ("--model-id=/model", "--shard-urls=unix:///shard")


def shard(*flags: str, **env: str) -> ShardSettings:
    return shard_settings(build_parser(env).parse_args(["shard", *MODEL, *flags]))


def test_the_watermark_comes_from_flags_or_from_tgis_environment() -> None:
    assert shard().watermark == WatermarkSettings(0.5, 2.0)
    env = {"WATERMARK_GAMMA": "0.25", "WATERMARK_DELTA": "-1.5"}
    assert shard(**env).watermark == WatermarkSettings(0.25, -1.5)
    assert shard("--watermark-gamma=0.75", **env).watermark == WatermarkSettings(0.75, -1.5)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--watermark-gamma=0", r"--watermark-gamma is 0\.0; it must lie between 0 and 1"),
        ("--watermark-gamma=1", "--watermark-gamma"),
        ("--watermark-gamma=nan", "--watermark-gamma"),
        ("--watermark-delta=inf", "--watermark-delta is inf; it must be finite"),
    ],
)
def test_a_watermark_that_cannot_be_is_refused_by_shard_and_launcher(flag: str, message: str) -> None:
    with pytest.raises(InvalidFlags, match=message):
        shard(flag)
    with pytest.raises(InvalidFlags, match=message):
        serve_settings(build_parser({}).parse_args(["serve", "--model-id=/model", flag]))


@pytest.mark.parametrize(
    ("flags", "env", "off"),
    [([], {}, False), (["--disable-grammar-support"], {}, True), ([], {"DISABLE_GRAMMAR_SUPPORT": "true"}, True)],
)
def test_grammars_are_on_unless_switched_off(flags: list[str], env: dict[str, str], off: bool) -> None:
    settings = router_settings(build_parser(env).parse_args(["router", *MODEL, *flags]))
    assert settings.limits.disable_grammar_support is off
