"""Where arms are run: one model in memory, ladders made resident as they are needed, and a result file for every run,
so that an experiment that was interrupted, or shares runs with another in the same folder, does not repeat them."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from chunkwise.config.eval_settings import EngineChoice
from chunkwise.config.settings import AdapterSource, ShardSettings
from chunkwise.core import AdapterInfo, UnsupportedModel
from chunkwise.evaluation.calibration_text import CalibrationText
from chunkwise.evaluation.command import run_task
from chunkwise.evaluation.driver import Evaluator, make_engine
from chunkwise.evaluation.experiments.measures import Measure
from chunkwise.evaluation.fisher import measure_sensitivity
from chunkwise.evaluation.identity import model_hash, run_header
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.evaluation.moments import collect_moments
from chunkwise.evaluation.results import Record, ResultFile
from chunkwise.hub import locate
from chunkwise.model.identity import base_hash
from chunkwise.model.llama import target_slices
from chunkwise.model.parallel import SingleProcess
from chunkwise.shard.process import load_model
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.errors import AdapterError
from chunkwise_adapters.format import LoraWeights, load_adapter
from chunkwise_adapters.ladder import LadderKind, RankLadder, build_ladder
from chunkwise_adapters.ladder_file import find_ladder, load_ladder, save_ladder
from chunkwise_adapters.sensitivity import Sensitivity
from chunkwise_adapters.store import AdapterStore
from chunkwise_adapters.whitening import ShrinkMoments

_DIGITS = 12


class Lab:
    """Args:
    engine: the model and how it is run; its adapter is not used.
    out: where runs and fitted ladders are kept.

    Raises:
        UnsupportedModel: the checkpoint cannot be served.
    """

    def __init__(self, engine: EngineChoice, out: Path) -> None:
        settings = ShardSettings(engine.model_id, (), dtype=engine.dtype, threads=engine.threads)
        self._model_dir = locate(engine.model_id, None)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_model(settings, self._model_dir, SingleProcess(), device)
        self._adapters = AdapterStore(target_slices(self._model.spec, self._model.plan), self._model.dtype, device)
        serving, decisions = make_engine(self._model_dir, self._model, self._adapters, engine.batch_tokens)
        self.tokenizer = Tokenizer(self._model_dir)
        self._evaluator = Evaluator(serving, decisions, self.tokenizer, engine.batch_tokens, engine.step_tokens)
        self._model_hash = model_hash(self._model_dir)
        self._out = out

    def weights(self, source: AdapterSource) -> LoraWeights:
        """An adapter of the model. Raises UnsupportedModel."""
        try:
            directory = locate(source.source, source.revision)
            return load_adapter(directory, source.name, self._model.spec.target_shapes())
        except AdapterError as error:
            raise UnsupportedModel(f"adapter {source.name!r} cannot be served: {error}") from error

    def served(self, source: AdapterSource, weights: LoraWeights) -> RankLadder:
        """The ladder that a server runs the adapter with: the one saved in its directory, or the plain one with global
        ranks. Raises UnsupportedModel."""
        try:
            file = find_ladder(locate(source.source, source.revision), source.name)
            if file is None:
                return build_ladder(weights, allocation="global")
            return load_ladder(file, weights, base_hash(self._model_dir))
        except AdapterError as error:
            raise UnsupportedModel(f"adapter {source.name!r} cannot be served: {error}") from error

    def whitened(self, weights: LoraWeights, text: CalibrationText) -> RankLadder:
        """The whitened ladder of an adapter fitted to ``text``, kept in a file."""
        return self._kept("whitened", weights, text, lambda: self._moments(weights, text))

    def sensitive(self, weights: LoraWeights, text: CalibrationText) -> RankLadder:
        """The sensitive ladder of an adapter, measured on ``text`` and kept in a file. Raises MissingTransformers."""
        return self._kept("sensitive", weights, text, lambda: measure_sensitivity(self._model_dir, weights, text))

    def _moments(self, weights: LoraWeights, text: CalibrationText) -> ShrinkMoments:
        return collect_moments(self._model_dir, weights, text, self._model.dtype, self._model.device)

    def _kept(
        self,
        kind: LadderKind,
        weights: LoraWeights,
        text: CalibrationText,
        fit: Callable[[], ShrinkMoments | Sensitivity],
    ) -> RankLadder:
        base, folder = base_hash(self._model_dir), self._out / "ladders"
        name = f"{weights.name}-{kind}-{weights.content_hash[:_DIGITS]}-{text.text_hash[:_DIGITS]}.safetensors"
        if (folder / name).exists():
            return load_ladder(folder / name, weights, base)
        print(f"fitting the {kind} ladder of {weights.name} to {text.tokens} tokens", file=sys.stderr)
        ladder = build_ladder(weights, allocation="global", fitted=fit())
        folder.mkdir(parents=True, exist_ok=True)
        save_ladder(ladder, folder / name, base)
        return ladder

    @contextmanager
    def resident(self, *ladders: RankLadder) -> Iterator[dict[str, AdapterInfo]]:
        """Keeps ladders resident, each under its name, for as long as the context lasts; gives what steering knows of
        all that are."""
        for ladder in ladders:
            self._adapters.add(ladder)
        try:
            yield self._evaluator.adapters
        finally:
            for ladder in ladders:
                self._adapters.remove(ladder.name)

    def run(self, measure: Measure, mode: SteeringMode, arm: str) -> Sequence[Record]:
        """The records of a measure under a mode, of which only those that the result file lacks are computed.
        ``arm`` names the run for people.

        Raises:
            GenerationFailed: an item cannot be run.
            ForeignResults: the folder of runs holds something else under the run's name.
        """
        adapter = self._evaluator.adapters[mode.adapter] if mode.adapter is not None else None
        identity = measure.task.identity
        header = run_header(measure.settings, self._model_hash, self._evaluator.dtype, adapter, mode, identity)
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:_DIGITS]
        print(f"{measure.name}: {arm}", file=sys.stderr, flush=True)
        with ResultFile(self._out / "runs" / f"{_slug(f'{measure.name} {arm}')}-{digest}.jsonl", header) as results:
            run_task(self._evaluator, measure.task, mode, results)
            return results.records


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
