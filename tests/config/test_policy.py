from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.config.policy import (
    ChunkerPolicy,
    EstimatorPolicy,
    InvalidPolicy,
    KvPolicy,
    RankPolicy,
    SignalPolicy,
    SteeringPolicy,
    load_policy,
    parse_policy,
)
from chunkwise.core import ChunkwiseError


def to_toml(value: Any, path: str = "") -> str:
    """Every field of a policy written out as TOML; None, which TOML lacks, is left out."""
    plain, tables = [f"[{path}]"] if path else [], []
    for f in fields(value):
        current = getattr(value, f.name)
        if f.name == "adapters":
            continue
        if is_dataclass(current):
            tables.append(to_toml(current, f"{path}.{f.name}" if path else f.name))
        elif current is not None:
            plain.append(f'{f.name} = "{current}"' if isinstance(current, str) else f"{f.name} = {current!r}")
    return "\n".join([*plain, *tables])


POSITIVE = st.floats(1e-6, 1e6)
SIGNALS = st.builds(SignalPolicy, weight=st.floats(-5.0, 5.0), mean=st.floats(-5.0, 5.0), std=POSITIVE)
POLICIES = st.builds(
    SteeringPolicy,
    estimator=st.builds(
        EstimatorPolicy,
        entropy=SIGNALS,
        novelty=SIGNALS,
        attention=SIGNALS,
        position=SIGNALS,
        inertia=POSITIVE,
        clip=POSITIVE,
        gain=POSITIVE,
        ngram=st.integers(1, 8),
        decay_tokens=POSITIVE,
        floor=st.floats(0.0, 1.0),
    ),
    chunker=st.builds(
        lambda low, more, threshold, smoothing: ChunkerPolicy(low, low + more, threshold, smoothing),
        st.integers(1, 50),
        st.integers(0, 50),
        POSITIVE,
        st.floats(1.0, 100.0),
    ),
    rank=st.builds(
        lambda source, rungs, low, more, skip, exponent, window: RankPolicy(
            source, *rungs, low, None if more is None else low + more, skip, exponent, window
        ),
        st.sampled_from(["roles", "complexity"]),
        st.tuples(*[st.none() | st.integers(0, 64) | st.floats(0.0, 64.0)] * 2),
        st.integers(1, 64),
        st.none() | st.integers(0, 64),
        st.floats(0.0, 1.0),
        st.floats(0.0, 1.0),
        st.integers(0, 16),
    ),
    kv=st.builds(
        lambda bounds, **others: KvPolicy(easy_below=min(bounds), hard_above=max(bounds), **others),
        st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
        kind=st.sampled_from(["full", "int8", "int4", "keep", "window", "complexity"]),
        when=st.sampled_from(["pressure", "always"]),
        easy_format=st.sampled_from(["full", "int8", "int4"]),
        easy_drop_percent=st.integers(0, 100),
        middle_format=st.sampled_from(["full", "int8", "int4"]),
        keep_percent=st.integers(0, 100),
        kept_format=st.sampled_from(["full", "int8", "int4"]),
        scorer=st.sampled_from(["key_norm", "key_diversity"]),
        window_tokens=st.integers(0, 5000),
        block_tokens=st.integers(1, 5000),
        sink_tokens=st.integers(0, 64),
        recent_tokens=st.integers(0, 64),
    ),
)


@given(POLICIES)
def test_a_policy_written_out_reads_back_the_same(policy: SteeringPolicy) -> None:
    assert parse_policy(to_toml(policy)) == policy


def test_what_is_left_out_keeps_its_default() -> None:
    assert parse_policy("") == SteeringPolicy()
    policy = parse_policy("[chunker]\nmin_length = 8\n[estimator]\ngain = 2\n[estimator.entropy]\nweight = 0")
    default = EstimatorPolicy()
    entropy = SignalPolicy(weight=0.0, mean=default.entropy.mean, std=default.entropy.std)
    assert policy == SteeringPolicy(
        chunker=ChunkerPolicy(min_length=8), estimator=EstimatorPolicy(gain=2.0, entropy=entropy)
    )
    assert isinstance(policy.estimator.gain, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunker = [", "not valid TOML"),
        ("[chunks]", r"unknown keys \['chunks'\]; known are \['adapters', 'chunker'"),
        ("[rank]\nmin = 1", r"policy.rank has unknown keys \['min'\]"),
        ("[estimator.entropy]\nwheight = 1", r"policy.estimator.entropy has unknown keys"),
        ("rank = 4", "policy.rank is 4; a table is expected"),
        ("[estimator]\nentropy = 0.5", "policy.estimator.entropy is 0.5; a table is expected"),
        ("[chunker.threshold]\nvalue = 1", "policy.chunker.threshold is .* type float"),
        ("[chunker]\nmin_length = 1.5", "policy.chunker.min_length is 1.5; a value of type int"),
        ("[chunker]\nmin_length = true", "policy.chunker.min_length is True"),
        ("[chunker]\nthreshold = '0.1'", "policy.chunker.threshold is '0.1'; a value of type float"),
        ("[rank]\nmax_rank = '8'", r"policy.rank.max_rank is '8'; a value of type int \| None"),
        ("[kv]\neasy_format = 8", "policy.kv.easy_format is 8"),
    ],
)
def test_a_text_that_is_no_policy_says_where_and_why(text: str, message: str) -> None:
    with pytest.raises(InvalidPolicy, match=message):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[estimator.novelty]\nstd = 0", "signal std is 0.0"),
        ("[estimator.novelty]\nstd = inf", "signal std is inf"),
        ("[estimator.novelty]\nweight = nan", "signal weight is nan"),
        ("[estimator.novelty]\nmean = -inf", "signal mean is -inf"),
        ("[estimator]\ninertia = 0", "estimator.inertia is 0.0"),
        ("[estimator]\ninertia = inf", "estimator.inertia is inf"),
        ("[estimator]\ngain = nan", "estimator.gain is nan"),
        ("[estimator]\nclip = -1", "estimator.clip is -1.0"),
        ("[estimator]\nngram = 0", "estimator.ngram is 0"),
        ("[estimator]\ndecay_tokens = 0", "estimator.decay_tokens is 0.0"),
        ("[estimator]\nfloor = 1.1", "estimator.floor is 1.1"),
        ("[chunker]\nmin_length = 0", r"lengths are 0\.\."),
        ("[chunker]\nmin_length = 9\nmax_length = 8", r"lengths are 9\.\.8"),
        ("[chunker]\nthreshold = 0", "chunker.threshold is 0.0"),
        ("[chunker]\nsmoothing_tokens = 0.5", "chunker.smoothing_tokens is 0.5"),
        ("[rank]\nsource = 'entropy'", "rank.source is 'entropy'"),
        ("[rank]\nprompt_rung = -0.5", "rank.prompt_rung is -0.5"),
        ("[rank]\nanswer_rung = inf", "rank.answer_rung is inf"),
        ("[rank]\nmin_rank = 0", "rank.min_rank is 0"),
        ("[rank]\nmin_rank = 8\nmax_rank = 4", "rank.max_rank is 4"),
        ("[rank]\nenergy_exponent = 1.5", "rank.energy_exponent is 1.5"),
        ("[rank]\ncrossfade = -1", "rank.crossfade is -1"),
        ("[kv]\neasy_format = 'int3'", "kv.easy_format is 'int3'"),
        ("[kv]\neasy_below = -0.1", "kv.easy_below is -0.1"),
        ("[kv]\neasy_below = 0.9", "kv.easy_below is 0.9 and kv.hard_above 0.6; need 0 <= easy_below <= hard_above"),
        ("[kv]\nhard_above = 1.1", "kv.hard_above 1.1"),
        ("[kv]\nkind = 'half'", "kv.kind is 'half'; use one of full, int8, int4, keep, window, complexity"),
        ("[kv]\nwhen = 'never'", "kv.when is 'never'; use one of pressure, always"),
        ("[kv]\nscorer = 'luck'", "kv.scorer is 'luck'"),
        ("[kv]\nkeep_percent = 101", "kv.keep_percent is 101; it must lie in 0..100"),
        ("[kv]\neasy_drop_percent = -1", "kv.easy_drop_percent is -1"),
        ("[kv]\nwindow_tokens = -1", "kv.window_tokens is -1"),
        ("[kv]\nblock_tokens = 0", "kv.block_tokens is 0"),
        ("[kv]\nsink_tokens = -1", "kv.sink_tokens is -1"),
        ("[kv]\nrecent_tokens = -1", "kv.recent_tokens is -1"),
    ],
)
def test_a_value_out_of_range_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidPolicy, match=message):
        parse_policy(text)


def test_an_invalid_policy_is_one_of_our_errors() -> None:
    assert issubclass(InvalidPolicy, ChunkwiseError)


def test_a_file_is_read_and_one_that_cannot_be_is_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[rank]\nmin_rank = 3\n", encoding="utf-8")
    assert load_policy(path).rank.min_rank == 3
    with pytest.raises(InvalidPolicy, match=r"missing\.toml cannot be read: No such file"):
        load_policy(tmp_path / "missing.toml")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidPolicy, match="not UTF-8"):
        load_policy(path)
