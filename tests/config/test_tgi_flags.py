from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.config.adapters import InvalidAdapters
from chunkwise.config.flags import InvalidFlags
from chunkwise.config.policy import InvalidPolicy
from chunkwise.config.settings import AdapterSource, LogSettings, ParallelSettings
from chunkwise.config.tgi_flags import TgiDownloadSettings, TgiServeSettings, tgi_settings

# What TGI's launcher sets for every shard.
LAUNCHER = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "CUDA_MEMORY_FRACTION": "1",
    "ATTENTION": "paged",
    "PREFIX_CACHING": "0",
    "MAX_TOTAL_TOKENS": "512",
    "MAX_BATCH_SIZE": "4",
    "DISABLE_CUSTOM_KERNELS": "True",
}


def serve(*flags: str, **env: str) -> TgiServeSettings:
    settings = tgi_settings(["serve", "org/model", *flags], env)
    assert isinstance(settings, TgiServeSettings)
    return settings


def test_the_launchers_own_command_line() -> None:
    flags = (
        "--uds-path /tmp/x --logger-level WARN --json-output --trust-remote-code --sharded --dtype float16 "
        "--revision main --otlp-service-name text-generation-inference.router --max-input-tokens 400"
    )
    assert serve(*flags.split(), **LAUNCHER) == TgiServeSettings(
        model_id="org/model",
        revision="main",
        uds_path="/tmp/x",
        parallel=ParallelSettings(1, 2, "localhost", 29500),
        dtype="float16",
        log=LogSettings("WARN", True),
    )


PIECES = (
    ("--uds-path", "/tmp/x"),
    ("--logger-level", "OFF"),
    ("--json-output",),
    ("--trust-remote-code",),
    ("--sharded",),
    ("--speculate", "0"),
    ("--dtype", "bfloat16"),
    ("--revision", "r"),
    ("--otlp-endpoint=http://localhost:4317",),
    ("--otlp-service-name", "s"),
    ("--max-input-tokens", "7"),
)


@given(st.permutations(PIECES), st.integers(0, len(PIECES)))
def test_flags_come_in_any_order_around_the_model(pieces: list[tuple[str, ...]], place: int) -> None:
    pieces.insert(place, ("org/model",))
    expected = tgi_settings(["serve", "org/model", *itertools.chain(*PIECES)], LAUNCHER)
    assert tgi_settings(["serve", *itertools.chain(*pieces)], LAUNCHER) == expected


def test_a_shard_alone_is_rank_0_whatever_the_environment_says() -> None:
    assert serve(**LAUNCHER).parallel == ParallelSettings()
    assert serve().parallel == ParallelSettings()
    assert serve().uds_path == "/tmp/text-generation-server"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_sharded_rank_needs_its_place(name: str) -> None:
    env = {**LAUNCHER}
    del env[name]
    with pytest.raises(InvalidFlags, match=f"--sharded needs {name} in the environment"):
        serve("--sharded", **env)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "2"}, r"RANK is 2 and WORLD_SIZE 2; the rank must lie in 0\.\.1"),
        ({"RANK": "-1"}, "RANK is -1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; it must be an integer"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_a_place_that_cannot_be(changes: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidFlags, match=words):
        serve("--sharded", **{**LAUNCHER, **changes})


@pytest.mark.parametrize("level", ["TRACE", "DEBUG", "INFO", "WARN", "ERROR", "OFF", "info"])
def test_log_levels(level: str) -> None:
    assert serve("--logger-level", level).log == LogSettings(level.upper(), False)


@pytest.mark.parametrize("kind", ["exl2", "gptq", "awq", "fp8", "compressed-tensors"])
def test_formats_that_are_not_there_are_refused(kind: str) -> None:
    with pytest.raises(InvalidFlags, match=f"--quantize is '{kind}'; of TGI's formats there are bitsandbytes, eetq, "):
        serve("--quantize", kind)


@pytest.mark.parametrize("kind", ["bitsandbytes-nf4", "bitsandbytes-fp4"])
def test_formats_of_4_bits_are_ours(kind: str) -> None:
    assert serve("--quantize", kind, "--dtype", "float16").quantize == "int4"


@pytest.mark.parametrize("kind", ["bitsandbytes", "eetq"])
def test_formats_of_8_bits_are_ours(kind: str) -> None:
    settings = serve("--quantize", kind, "--dtype", "float16")
    assert settings.quantize == "int8" and settings.dtype is None
    assert serve().quantize is None


@pytest.mark.parametrize(
    "flags",
    [
        ["--quantize", "nonsense"],
        ["--dtype", "float64"],
        ["--logger-level", "LOUD"],
        ["--no-such-flag"],
        ["--speculate", "many"],
    ],
)
def test_what_the_reference_does_not_know_either(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        serve(*flags)
    assert ended.value.code == 2


def test_what_is_not_done_is_noted() -> None:
    flags = "--speculate 2 --kv-cache-dtype fp8_e5m2 --otlp-endpoint http://x"
    settings = serve(
        *flags.split(),
        CUDA_MEMORY_FRACTION="0.5",
        WEIGHTS_CACHE_OVERRIDE="/w",
    )
    words = (
        "--speculate 2",
        "--kv-cache-dtype fp8_e5m2",
        "--otlp-endpoint",
        "CUDA_MEMORY_FRACTION=0.5",
        "WEIGHTS_CACHE",
    )
    assert len(settings.notes) == len(words)
    assert all(note.startswith(word) for note, word in zip(settings.notes, words, strict=True))
    assert serve("--speculate", "0", **LAUNCHER).notes == ()


def test_rope_scaling_is_honoured_only_where_it_does_nothing() -> None:
    assert serve(ROPE_SCALING="linear", ROPE_FACTOR="1") == serve(ROPE_SCALING="dynamic", ROPE_FACTOR="1.0") == serve()
    with pytest.raises(InvalidFlags, match=r"ROPE_SCALING=dynamic with ROPE_FACTOR=2 is not implemented"):
        serve(ROPE_SCALING="dynamic", ROPE_FACTOR="2")
    with pytest.raises(InvalidFlags, match="'twice'; it must be a number"):
        serve(ROPE_FACTOR="twice")


def test_adapters_come_from_the_environment() -> None:
    settings = serve(LORA_ADAPTERS="org/a, b@r1, c=/x,d=/y@r2")
    assert settings.adapters == (
        AdapterSource("org/a", "org/a"),
        AdapterSource("b", "b", "r1"),
        AdapterSource("c", "/x"),
        AdapterSource("d", "/y", "r2"),
    )
    for bad in ("a=b=c", "a@b@c"):
        with pytest.raises(InvalidAdapters, match="more than one"):
            serve(LORA_ADAPTERS=bad)


@pytest.mark.parametrize(("value", "on"), [("1", True), ("true", True), ("True", True), ("0", False), ("", False)])
def test_switches_of_the_environment(value: str, on: bool) -> None:
    settings = serve(CHUNKWISE_PLAIN_SHARDS=value, REQUEST_LOGPROBS=value)
    assert (settings.plain, settings.prefill_logprobs) == (on, on)
    assert serve("--plain-shards").plain


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("4,2", 4), ("0", None), ("many", None), ("", None)])
def test_threads_are_openmps(value: str, threads: int | None) -> None:
    assert serve(OMP_NUM_THREADS=value).threads == threads


def test_the_policy_file_is_checked_before_anything_starts(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("[rank]\nmin_rank = 4\n")
    bad.write_text("[rank]\nmin_rank = 0\n")
    assert serve(CHUNKWISE_POLICY=str(good)).policy == good
    assert serve(CHUNKWISE_POLICY="").policy is None
    for path in (bad, tmp_path / "missing.toml"):
        with pytest.raises(InvalidPolicy):
            serve(CHUNKWISE_POLICY=str(path))


def test_download_weights() -> None:
    flags = "--extension .safetensors --logger-level INFO --json-output --merge-lora --revision r --trust-remote-code"
    assert tgi_settings(["download-weights", "org/model", *flags.split()], {}) == TgiDownloadSettings(
        "org/model", "r", ".safetensors", base_model=True, log=LogSettings("INFO", True)
    )
    assert tgi_settings(["download-weights", "org/a"], {}) == TgiDownloadSettings("org/a", None)
