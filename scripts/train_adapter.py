"""Trains a small LoRA adapter on a CPU within a time budget: the recipe of adapters/demo-squad-r8, and a template.

    python scripts/train_adapter.py --task squad --data ../shared/data/squad/train.jsonl --model DIR --out DIR
    python scripts/train_adapter.py --task text --data notes.txt --model DIR --out DIR
    python scripts/train_adapter.py --task translation --data pairs.jsonl --rank 64 --minutes 80 --model DIR --out DIR

`squad` reads JSON lines with `title`, `context`, `question` and `answers` and teaches short answers from the context,
or `unanswerable`; the loss is on the answer alone. `text` reads plain text and learns from every token. `translation`
reads JSON lines with `src` and `tgt`, English to French; the loss is on the translation alone. All hold back data that
is never trained on and report its loss before and after. The learning rate follows the clock, so the number
of steps, and with it the result, depends on the machine. Knows nothing of ChunkWise itself: the output is an ordinary
PEFT directory.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEED = 20
MISMATCHED = 0.3
UNANSWERABLE = "unanswerable"
BUCKET_BATCHES = 16
WARM_UP = 0.05


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one sequence and the number of leading ids that carry no loss."""

    ids: list[int]
    prompt: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Numbers of one training: `seconds` of budget, sequences per step, the peak learning rate of AdamW, and whether
    to multiply in bf16 (fp32 factors and loss either way)."""

    rank: int
    seconds: float
    batch: int
    rate: float
    bf16: bool


def read_squad(path: Path, tokenizer: PreTrainedTokenizerBase, longest: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; the latter are the file's last articles, no context of which is trained on."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    titles = list(dict.fromkeys(row["title"] for row in rows))
    held_titles = set(titles[-max(1, len(titles) // 10) :])
    train = [row for row in rows if row["title"] not in held_titles]
    held = [row for row in rows if row["title"] in held_titles]
    return squad_examples(train, tokenizer, longest), squad_examples(held, tokenizer, longest)


def squad_examples(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[Example]:
    """Examples of at most `longest` tokens; three in ten get another article's context and become unanswerable."""
    draw = random.Random(SEED)
    examples: list[Example] = []
    for row in rows:
        context, answer = row["context"], row["answers"][0] if row["answers"] else UNANSWERABLE
        others = [other for other in draw.choices(rows, k=8) if other["title"] != row["title"]]
        if others and draw.random() < MISMATCHED:
            context, answer = others[0]["context"], UNANSWERABLE
        prompt = tokenizer.encode(f"Context: {context}\nQuestion: {row['question']}\nAnswer:")
        ids = [*prompt, *tokenizer.encode(f" {answer}"), tokenizer.eos_token_id]
        if len(ids) <= longest:
            examples.append(Example(ids, len(prompt)))
    return examples


def read_text(path: Path, tokenizer: PreTrainedTokenizerBase, longest: int) -> tuple[list[Example], list[Example]]:
    """Consecutive windows of `longest` tokens; the last tenth of them is held out."""
    ids = tokenizer.encode(path.read_text(encoding="utf-8"), verbose=False)
    windows = [Example(ids[start : start + longest], 1) for start in range(0, len(ids) - 1, longest)]
    cut = len(windows) - max(1, len(windows) // 10)
    return windows[:cut], windows[cut:]


def translation_prompt(source: str) -> str:
    """What stands before ` translation<eos>`; evaluation has to ask in the same words."""
    return f"English: {source}\nFrench:"


def read_translation(
    path: Path, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[Example], list[Example]]:
    """Training and held-out pairs of at most `longest` tokens; the latter are the file's last tenth."""
    examples: list[Example] = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        prompt = tokenizer.encode(translation_prompt(row["src"]))
        ids = [*prompt, *tokenizer.encode(f" {row['tgt']}"), tokenizer.eos_token_id]
        if len(ids) <= longest:
            examples.append(Example(ids, len(prompt)))
    cut = len(examples) - max(1, len(examples) // 10)
    return examples[:cut], examples[cut:]


READERS = {"squad": read_squad, "text": read_text, "translation": read_translation}


def batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Endless shuffled batches; each is drawn from a bucket sorted by length, so that little is padding."""
    draw = random.Random(SEED)
    while True:
        order = draw.sample(examples, len(examples))
        for start in range(0, len(order), size * BUCKET_BATCHES):
            bucket = sorted(order[start : start + size * BUCKET_BATCHES], key=lambda example: len(example.ids))
            groups = [bucket[at : at + size] for at in range(0, len(bucket), size)]
            yield from draw.sample(groups, len(groups))


def token_losses(model: LlamaForCausalLM, batch: Sequence[Example]) -> torch.Tensor:
    """Negative log likelihoods in nats of every token after the prompts, [tokens].

    Padding stands on the right, where causal attention never sees it, so no mask is needed. Only the positions that
    carry loss pass through the vocabulary projection.
    """
    width = max(len(example.ids) for example in batch)
    ids = torch.tensor([example.ids + [0] * (width - len(example.ids)) for example in batch])
    counted = torch.tensor([[example.prompt <= at < len(example.ids) for at in range(width)] for example in batch])
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[counted[:, 1:]])
    return cross_entropy(logits.float(), ids[:, 1:][counted[:, 1:]], reduction="none")


def mean_loss(model: LlamaForCausalLM, examples: Sequence[Example], size: int) -> float:
    """Mean loss per token over `examples`, in nats."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    with torch.inference_mode():
        losses = [token_losses(model, ordered[at : at + size]) for at in range(0, len(ordered), size)]
    return torch.cat(losses).mean().item()


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The LoRA factors; PEFT has frozen everything else."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def train(model: LlamaForCausalLM, examples: Sequence[Example], recipe: Recipe) -> tuple[int, int]:
    """Trains the LoRA factors inside `model` until the budget is spent; returns the steps taken and the tokens read."""
    weights = trainable(model)
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=0.0)
    start = time.monotonic()
    steps = tokens = 0
    recent: list[float] = []
    for batch in batches(examples, recipe.batch):
        done = (time.monotonic() - start) / recipe.seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (done + 1e-3) / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            loss = token_losses(model, batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        tokens += sum(len(example.ids) for example in batch)
        recent.append(loss.item())
        if steps % 20 == 0:
            print(
                f"step {steps} at {done:.0%}: training loss {sum(recent) / len(recent):.3f}, {tokens} tokens",
                flush=True,
            )
            recent.clear()
    return steps, tokens


def save(model: PeftModel, out: Path, base_id: str) -> None:
    """Rounds the factors to bf16 and writes them; nothing in the directory names a path of this machine."""
    for weight in trainable(model):
        weight.data = weight.data.to(torch.bfloat16)
    model.save_pretrained(str(out), save_embedding_layers=False)
    # PEFT adds a model card with unfilled headings, and writes a set of names in the order of their hashes.
    (out / "README.md").unlink()
    path = out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_id
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Trains a LoRA adapter within a time budget.")
    parser.add_argument("--task", choices=sorted(READERS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines (squad) or plain text (text)")
    parser.add_argument("--model", type=Path, required=True, help="the base model's directory, see fetch_model.py")
    parser.add_argument("--base-id", default=BASE_ID, help="the base model's name as the adapter states it")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=12.0, help="training time, without evaluation")
    parser.add_argument("--batch", type=int, default=6, help="sequences per step")
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--bf16", action="store_true", help="faster on CPUs with AVX512-BF16 or AMX")
    parser.add_argument("--longest", type=int, default=288, help="tokens per sequence; longer questions are left out")
    parser.add_argument("--held-out", type=int, default=128, help="held-out examples to evaluate on")
    return parser.parse_args()


def main() -> None:
    """Reads, evaluates the base, trains, evaluates the adapter, saves; prints one line of JSON last."""
    arguments = parse_arguments()
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} exists; name a new directory with --out")
    torch.manual_seed(SEED)
    recipe = Recipe(arguments.rank, 60 * arguments.minutes, arguments.batch, arguments.rate, arguments.bf16)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)  # type: ignore[no-untyped-call]
    examples, held = READERS[arguments.task](arguments.data, tokenizer, arguments.longest)
    held = random.Random(SEED).sample(held, min(len(held), arguments.held_out))
    if not examples or not held:
        raise SystemExit(
            f"{arguments.data} gives {len(examples)} training and {len(held)} held-out examples of up to "
            f"{arguments.longest} tokens, at least one of each is needed; give more data or another --longest"
        )
    print(f"{len(examples)} training and {len(held)} held-out examples", flush=True)
    base = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    before = mean_loss(base, held, recipe.batch)
    print(f"held-out loss of the base model {before:.3f}", flush=True)
    lora = LoraConfig(task_type="CAUSAL_LM", r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=list(TARGETS))
    # PEFT puts the factors into `base` itself.
    model = get_peft_model(base, lora)
    steps, tokens = train(base, examples, recipe)
    save(model, arguments.out, arguments.base_id)
    # Evaluated with the factors as they were saved.
    base.float()
    after = mean_loss(base, held, recipe.batch)
    result = {"steps": steps, "tokens": tokens, "held_out": len(held), "before": before, "after": after, "seed": SEED}
    print(json.dumps(result | {"rank": recipe.rank, "minutes": arguments.minutes, "rate": recipe.rate}))


if __name__ == "__main__":
    main()
