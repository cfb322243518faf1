"""Compares greedy answers of the running server with transformers + PEFT, token for token, and prints the result.

    .venv/bin/python scripts/parity.py --adapter ../shared/adapters/squad-r32 --prompts ../shared/data/prompts

For every world size the server runs without steering at full rank in fp32. Where the two differ, PEFT's own logits at
that token say how far apart its two best tokens lie; within 1e-3 the difference is rounding, is listed and accepted.
Then the server runs with steering, and chunks, ranks and mean rank are reported. Exit status 1 if a difference is not
accepted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fetch_model import cache_directory
from live import live_server, post

TIE = 1e-3


def read_prompts(folder: Path, count: int) -> list[str]:
    """The first prompts of each file in turn, the first turn of a conversation each."""
    files: list[list[str]] = []
    for path in sorted(folder.glob("*.jsonl")):
        texts = []
        for line in path.read_text(encoding="utf-8").splitlines()[:count]:
            record = json.loads(line)
            texts.append(record["turns"][0] if "turns" in record else record.get("instruction") or record["question"])
        files.append(texts)
    return [text for row in zip(*files, strict=False) for text in row][:count]


class Reference:
    """transformers + PEFT, not merged, fp32."""

    def __init__(self, model: Path, adapter: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)  # type: ignore[no-untyped-call]
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model = PeftModel.from_pretrained(base, str(adapter)).eval()

    def answer(self, prompt: str, new: int) -> list[int]:
        """Greedy token ids, the end-of-sequence token included."""
        inputs = self._tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = self._model.generate(  # type: ignore[no-untyped-call]
                **inputs, max_new_tokens=new, do_sample=False
            )
        answer: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return answer

    def margin(self, prompt: str, answer: Sequence[int]) -> float:
        """Distance of the two best logits after ``prompt`` and ``answer``."""
        ids = self._tokenizer(prompt)["input_ids"] + list(answer)
        with torch.inference_mode():
            best = self._model(torch.tensor([ids])).logits[0, -1].topk(2).values
        return float(best[0] - best[1])


def compare(url: str, prompts: Sequence[str], expected: Sequence[list[int]], reference: Reference, new: int) -> int:
    """Prints every difference; returns how many are not accepted."""
    refused = equal = 0
    for number, (prompt, want) in enumerate(zip(prompts, expected, strict=True)):
        parameters = {"max_new_tokens": new, "adapter_id": "adapter", "details": True}
        details = post(f"{url}/generate", {"inputs": prompt, "parameters": parameters})["details"]
        got = [token["id"] for token in details["tokens"]]
        if got == want:
            equal += 1
            continue
        at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
        margin = reference.margin(prompt, want[:at])
        accepted = margin <= TIE
        refused += not accepted
        print(f"  prompt {number}: differs at token {at}, margin {margin:.2e}, {'tie' if accepted else 'NOT ACCEPTED'}")
    print(f"  {equal} of {len(prompts)} answers equal token for token, {refused} differences not accepted")
    return refused


def steered(url: str, prompts: Sequence[str], new: int) -> dict[str, Any]:
    """Chunks and ranks of every answer with steering on."""
    means, rungs, lengths = [], dict[int, int](), []
    for number, prompt in enumerate(prompts):
        parameters = {"max_new_tokens": new, "adapter_id": "adapter", "chunk_details": True}
        details = post(f"{url}/generate", {"inputs": prompt, "parameters": parameters})["details"]
        chunks = details["chunks"]
        print(f"  prompt {number}: mean rank {details['mean_rank']:.1f}, chunks", end="")
        print(" " + " ".join(f"[{c['start']},{c['end']})@{c['rung']}" for c in chunks))
        means.append(details["mean_rank"])
        for chunk in chunks:
            tokens = chunk["end"] - chunk["start"]
            rungs[chunk["rung"]] = rungs.get(chunk["rung"], 0) + tokens
            lengths.append(tokens)
    return {
        "mean_rank": round(sum(means) / len(means), 2),
        "tokens_by_rung": dict(sorted(rungs.items())),
        "mean_chunk_tokens": round(sum(lengths) / len(lengths), 1),
    }


def main() -> None:
    """Runs the comparison; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=cache_directory(os.environ))
    parser.add_argument("--adapter", type=Path, default=Path("adapters/demo-squad-r8"))
    parser.add_argument("--prompts", type=Path, required=True, help="folder of JSON lines files")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    prompts = read_prompts(args.prompts, args.count)
    reference = Reference(args.model, args.adapter)
    expected = [reference.answer(prompt, args.new_tokens) for prompt in prompts]
    refused = {}
    for world in args.world_sizes:
        print(f"world size {world}, no steering, fp32, full rank:")
        with live_server(args.model, args.adapter, f"--num-shard={world}", "--no-steering", "--dtype=float32") as (
            url,
            _,
        ):
            refused[world] = compare(url, prompts, expected, reference, args.new_tokens)
    print("steering on, world size 2:")
    with live_server(args.model, args.adapter, "--num-shard=2", "--dtype=float32") as (url, _):
        report = steered(url, prompts, args.new_tokens)
    print(json.dumps({"prompts": len(prompts), "not_accepted": refused, "steered": report}))
    sys.exit(1 if any(refused.values()) else 0)


if __name__ == "__main__":
    main()
