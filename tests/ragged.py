"""Steps made up for `Llama`: random checkpoints and adapters, and a cache that holds keys already, so that a test may
put any span of any sequence at any position."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from chunkwise.core import ChunkDecision, KvFormat
from chunkwise.kv.cache import KvCache, plan_gather
from chunkwise.kv.pages import PageRef
from chunkwise.model.llama import Llama
from chunkwise.model.parallel import Group, SingleProcess
from chunkwise.model.spec import ModelSpec, parse_spec
from chunkwise.model.step import StepInput, StepOutput, StepSpan
from chunkwise_adapters.format import LoraPair, LoraWeights
from chunkwise_adapters.gate import GatedSpan, build_segments
from chunkwise_adapters.ops import GatedLora
from chunkwise_adapters.store import ResidentAdapter

CPU = torch.device("cpu")
MAX_POSITION = 512


def write_model(directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """A random checkpoint: nine query heads over three KV heads, nothing a multiple of a vector."""
    config = {
        "model_type": "llama",
        "vocab_size": 259,
        "hidden_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "intermediate_size": 101,
        "max_position_embeddings": MAX_POSITION,
        "tie_word_embeddings": True,
        **overrides,
    }
    spec, generator = parse_spec(config), torch.Generator().manual_seed(seed)

    def random(*shape: int, around: float = 0.0, by: float = 0.2) -> Tensor:
        return around + by * torch.randn(shape, generator=generator)

    tensors = {
        "model.embed_tokens.weight": random(spec.vocab, spec.hidden),
        "model.norm.weight": random(spec.hidden, around=1.0),
    }
    for (layer, target), (out, inp) in spec.target_shapes().items():
        attention = target in ("q_proj", "k_proj", "v_proj", "o_proj")
        name = f"model.layers.{layer}.{'self_attn' if attention else 'mlp'}.{target}"
        tensors[f"{name}.weight"] = random(out, inp)
        if spec.attention_bias if attention else spec.mlp_bias:
            tensors[f"{name}.bias"] = random(out)
    for layer in range(spec.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = random(spec.hidden, around=1.0)
    if not spec.tied_head:
        tensors["lm_head.weight"] = random(spec.vocab, spec.hidden)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def random_lora(
    spec: ModelSpec, name: str, rank: int | Mapping[tuple[int, str], int], seed: int, strength: float = 0.4
) -> LoraWeights:
    """Random factors of falling strength; a mapping of ranks adapts only the modules in it."""
    generator, shapes = torch.Generator().manual_seed(seed), spec.target_shapes()
    ranks = dict.fromkeys(shapes, rank) if isinstance(rank, int) else rank
    modules = {}
    for key, r in ranks.items():
        out, inp = shapes[key]
        a = torch.randn(r, inp, generator=generator) * torch.logspace(0, -1, r)[:, None]
        b = torch.randn(out, r, generator=generator) * torch.rand((), generator=generator)
        modules[key] = LoraPair(a, b, trained_rank=r, scale=strength / inp**0.5)
    return LoraWeights(name, f"{seed}-hash-of-{name}", modules)


@dataclass(eq=False)
class Line:
    """A sequence: its tokens, of which any part may be computed at any time, and how it is steered."""

    ids: list[int]
    pages: list[PageRef]
    adapter: ResidentAdapter | None = None
    chunks: list[ChunkDecision] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """``tokens`` tokens of a line from ``position`` on; with ``scored`` the next tokens' log-probabilities as well."""

    line: Line
    position: int
    tokens: int = 1
    scored: bool = False


def step_of(parts: Sequence[Part], page_size: int) -> StepInput:
    """The step that computes ``parts`` in this order."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    scored: list[tuple[int, int]] = []
    spans: list[StepSpan] = []
    gated: list[GatedSpan] = []
    for part in parts:
        line, first_row = part.line, len(ids)
        for position in range(part.position, part.position + part.tokens):
            if part.scored:
                scored.append((len(ids), line.ids[position + 1]))
            ids.append(line.ids[position])
            positions.append(position)
            slots.append(line.pages[position // page_size].number * page_size + position % page_size)
        spans.append(StepSpan(first_row, part.tokens, part.position + part.tokens, line.pages))
        if line.adapter is not None:
            gated.append(GatedSpan(first_row, part.tokens, part.position, line.adapter, line.chunks))
    return StepInput(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        last_rows=torch.tensor([span.first_row + span.tokens - 1 for span in spans]),
        scored_rows=torch.tensor([row for row, _ in scored], dtype=torch.int64),
        scored_ids=torch.tensor([id for _, id in scored], dtype=torch.int64),
        spans=tuple(spans),
        segments=build_segments(gated, CPU),
    )


class Rig:
    """A model and a cache full of random keys and values. Rigs of one seed hold the same ones in the same pages, so a
    step made for one of them can run on all."""

    def __init__(
        self,
        model_dir: Path,
        threads: int | None,
        *,
        storage: torch.dtype | None = None,
        lora: GatedLora | None = None,
        group: Group | None = None,
        page_size: int = 16,
        pages: int = 256,
        seed: int = 0,
    ) -> None:
        self.model = Llama(
            model_dir,
            group or SingleProcess(),
            torch.float32,
            CPU,
            storage=storage,
            lora=lora,
            kernel_threads=threads,
        )
        shape = self.model.kv_shape(page_size)
        self.cache = KvCache(shape, torch.float32, CPU, (pages + 1) * shape.page_bytes(torch.float32)[KvFormat.FULL])
        self._random = torch.Generator().manual_seed(seed)
        numbers = [self.cache.allocate(KvFormat.FULL) for _ in range(pages)]
        spec, heads = self.model.spec, self.model.plan.kv_heads
        slots = torch.arange(pages * page_size) + page_size
        for layer in range(shape.layers):
            # Every rank takes its heads of the same numbers.
            made = torch.randn(2, len(slots), spec.kv_heads, shape.head_dim, generator=self._random)
            self.cache.write(layer, slots, *made[:, :, heads].contiguous())
        order = torch.randperm(pages, generator=self._random).tolist()
        self._free = [numbers[i] for i in order]

    def line(
        self, length: int, adapter: ResidentAdapter | None = None, chunks: Sequence[ChunkDecision] = (), small: int = 0
    ) -> Line:
        """A new sequence with room for ``length`` tokens, in pages that do not follow each other; of its first
        ``small`` pages one third is in 8 bits and one in 4."""
        size = self.cache.shape.page_size
        pages = [self._free.pop() for _ in range(-(-length // size))]
        for first, kind in enumerate((KvFormat.INT8, KvFormat.INT4)):
            pages[first:small:3] = self.cache.compress(pages[first:small:3], kind)
        ids = torch.randint(self.model.spec.vocab, (length + 1,), generator=self._random).tolist()
        return Line(ids, pages, adapter, list(chunks))

    def run(self, parts: Sequence[Part]) -> StepOutput:
        """Computes ``parts`` as one step."""
        return self.model.forward(step_of(parts, self.cache.shape.page_size), self.cache)

    def kept(self, line: Line) -> Tensor:
        """Keys and values of a line's pages over all layers, ``[2, layers, positions, heads, head_dim]``."""
        plan = plan_gather(line.pages, CPU)
        layers = [torch.stack(self.cache.gather(layer, plan)) for layer in range(self.cache.shape.layers)]
        return torch.stack(layers, dim=1)


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a part of the largest number wanted; infinite where one of them is not finite."""
    assert got.shape == want.shape
    if got.numel() == 0:
        return 0.0
    if not (got.isfinite().all() and want.isfinite().all()):
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
