"""The servers that the suite judges: ours at world sizes 1 and 2, or with ``--socket`` any that runs already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from conformance.player import Player
from conformance.ranks import Rank, serving
from conftest import TinyWorld
from tgi_router import TgiRouter

MAX_PREFILL_TOKENS = 256


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--socket", help="judge the generate.v3 server behind this socket, e.g. /tmp/x/s-0, not our own")


@dataclass(slots=True)
class Door:
    """A server and what is known of it. ``ranks`` are its processes, if they are ours."""

    uds_path: str
    base_names: list[str] = field(default_factory=list)
    eos_ids: list[int] = field(default_factory=list)
    ranks: list[Rank] = field(default_factory=list)
    _router: TgiRouter | None = None

    def player(self) -> Player:
        """A router with the usual limits that starts to count at 0, over an empty server."""
        if self._router is None:
            self._router = TgiRouter(self.uds_path, MAX_PREFILL_TOKENS)
        self._router.clear()
        return self._playing(self._router)

    @contextmanager
    def warmed(self, max_prefill_tokens: int = MAX_PREFILL_TOKENS, **limits: int) -> Iterator[Player]:
        """A router that has just come up with other limits."""
        self.close()
        with TgiRouter(self.uds_path, max_prefill_tokens, **limits) as router:
            yield self._playing(router)

    def close(self) -> None:
        """Disconnects; the next player comes up anew."""
        if self._router is not None:
            self._router.__exit__(None, None, None)
        self._router = None

    def _playing(self, router: TgiRouter) -> Player:
        names = [adapter.adapter_id for adapter in router.info.adapters]
        return Player(router, names, self.base_names, self.eos_ids)


@pytest.fixture(scope="session")
def model(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a chat model has it: a tokenizer that puts <bos> first, and two end-of-sequence ids."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny.model, directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 256]}))
    return directory


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "door" in metafunc.fixturenames:
        given = metafunc.config.getoption("--socket", None)
        worlds = [given] if given else [1, 2]
        metafunc.parametrize("door", worlds, indirect=True, scope="session", ids=lambda world: f"world-{world}")


@pytest.fixture(scope="session")
def door(
    request: pytest.FixtureRequest, tiny: TinyWorld, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    """One server for the whole run, with steering by the default policy."""
    with ExitStack() as stack:
        if isinstance(request.param, str):
            door = Door(request.param.removeprefix("unix://").removesuffix("-0"))
        else:
            place = tmp_path_factory.mktemp("uds")
            serves = serving(place, model, tiny.adapters, request.param, REQUEST_LOGPROBS="1")
            door = Door(f"{place}/s", [str(model), model.name], [257, 256], stack.enter_context(serves))
        stack.callback(door.close)
        yield door


@pytest.fixture
def player(door: Door) -> Iterator[Player]:
    """A router that has just come up; when it leaves, nothing may be held for it."""
    player = door.player()
    yield player
    player.router.clear()
    assert player.held() == 0


@pytest.fixture
def own_process(request: pytest.FixtureRequest) -> None:
    """Skips what needs processes of its own when a running server is judged."""
    if request.config.getoption("--socket", None):
        pytest.skip("--socket names a running server; this item starts processes")
