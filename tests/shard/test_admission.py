"""An adapter that one rank can read again and another cannot: both refuse the request, and neither waits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from chunkwise.core import WarmupLimits
from chunkwise.shard.admission import Admission
from chunkwise.shard.grammar import GrammarCompiler
from chunkwise.shard.watermark import Watermark
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.errors import AdapterError
from chunkwise_adapters.store import AdapterStore
from conftest import TinyWorld
from serving import request


class Adapters:
    """A store whose adapter comes back, or fails as a disk does."""

    def __init__(self, failure: Exception | None) -> None:
        self.failure = failure

    def names(self) -> tuple[str, ...]:
        return ("law",)

    def get(self, name: str) -> object:
        if self.failure is not None:
            raise self.failure
        return object()


class Ranks:
    """What ranks agree with: every call waits for that of the others."""

    def __init__(self, count: int) -> None:
        self._said: list[bool] = []
        self._lock = threading.Lock()
        self._meeting = threading.Barrier(count, timeout=20)

    def agree(self, fine: bool) -> bool:
        with self._lock:
            self._said.append(fine)
        self._meeting.wait()
        return all(self._said)


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), AdapterError("its content is another")])
def test_one_rank_s_failure_is_a_refusal_on_all(tiny: TinyWorld, failure: Exception) -> None:
    tokenizer, ranks = Tokenizer(tiny.model), Ranks(2)

    def admit(adapters: Adapters) -> str:
        store, unused = cast(AdapterStore, adapters), cast(Any, None)
        admission = Admission(
            tokenizer, store, 259, cast(GrammarCompiler, unused), cast(Watermark, unused), ranks.agree
        )
        with pytest.raises(AdapterError) as caught:
            admission.admit(request(1, adapter_id="law"), WarmupLimits(100, 200, 200))
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        here, there = pool.map(admit, [Adapters(failure), Adapters(None)])
    assert here == f"adapter 'law' cannot be read again: {failure}"
    assert there == "adapter 'law' could not be read by another shard; see its log"
