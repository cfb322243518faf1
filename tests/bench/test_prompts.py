"""Prompts have exactly the tokens asked for, as text and as ids, with and without special tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from chunkwise.bench.prompts import PromptImpossible, make_prompt
from chunkwise.tokenizer import Tokenizer
from tiny import make_tokenizer


@pytest.fixture(params=[False, True], ids=["plain", "with bos"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    make_tokenizer(tmp_path)
    if request.param:
        path = str(tmp_path / "tokenizer.json")
        fast = FastTokenizer.from_file(path)
        fast.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
        fast.save(path)
    return Tokenizer(tmp_path)


@pytest.mark.parametrize("tokens", [2, 128, 1024])
def test_a_prompt_has_exactly_its_tokens(tokenizer: Tokenizer, tokens: int) -> None:
    text, ids = make_prompt(tokenizer, tokens, seed=3)
    assert len(ids) == tokens
    assert tokenizer.encode(text) == ids


def test_another_seed_gives_another_prompt_and_the_same_seed_the_same(tokenizer: Tokenizer) -> None:
    texts = [make_prompt(tokenizer, 64, seed)[0] for seed in range(8)]
    assert len(set(texts)) == 8
    assert make_prompt(tokenizer, 64, 0)[0] == texts[0]


def test_a_tokenizer_that_adds_on_every_encoding_is_refused() -> None:
    class Growing:
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [1] * (len(text) + (0 if not text else 1))

        def decode(self, ids: list[int]) -> str:
            return "a" * len(ids)

    with pytest.raises(PromptImpossible, match="5 tokens"):
        make_prompt(Growing(), 5, 0)  # type: ignore[arg-type]
