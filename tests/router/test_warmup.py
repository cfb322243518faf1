"""What limits become before the shards are asked for them."""

from __future__ import annotations

import pytest

from chunkwise.config.settings import Limits
from chunkwise.core import ShardInfo
from chunkwise.router.warmup import fit_limits, warmup_prompt


@pytest.mark.parametrize(
    ("device", "chosen", "longest", "expected"),
    [
        ("cpu", None, 8192, 512),
        ("cuda", None, 8192, 4096),
        ("cpu", 4096, 8192, 4096),
        ("cpu", None, 128, 128),
        ("cuda", 64, 0, 64),
    ],
)
def test_a_step_is_bounded_by_choice_or_device_and_by_the_model(
    device: str, chosen: int | None, longest: int, expected: int
) -> None:
    fitted = fit_limits(Limits(max_batch_prefill_tokens=chosen), ShardInfo("float32", device, 16, longest))
    assert fitted.step_tokens == expected
    assert warmup_prompt(fitted).truncate == expected
