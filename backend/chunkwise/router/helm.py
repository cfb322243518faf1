"""The steering of live requests: decisions on their way to the shards, signals on their way back.

It keeps the lag of exactly one step, and makes plain full-rank serving (no controller) look the same to its callers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from chunkwise.config.policy import SteeringPolicy
from chunkwise.core import AdapterInfo, GenerationRequest, KvFormat, ShardInfo, SteeringUpdate, StepResult
from chunkwise.router.metrics import Metrics
from chunkwise.router.shard_group import Shards
from chunkwise.steering import ChunkReport, SteeringController, SteeringReport, check_sections

StepCall = Callable[[int, int], Coroutine[Any, Any, StepResult]]
"""The RPC of a step, given the number of its barrier and the number of the step."""

# Turns of the event loop from the making of an RPC's task to its request's being sent: the task's own first turn, then
# that of the task which grpc.aio makes for the call.
_LAUNCH_TURNS = 2

_log = logging.getLogger(__name__)


def plain_report(adapter: AdapterInfo | None, length: int) -> SteeringReport:
    """The report of ``length`` tokens that were not steered: one chunk at the trained rank (0: no adapter)."""
    rank = float(adapter.trained_rank) if adapter is not None else 0.0
    rung = adapter.rungs[-1] if adapter is not None and adapter.rungs else None
    chunk = ChunkReport(0, length, rung, rank, scale=1.0, crossfade=0, complexity=0.0, kv=KvFormat.FULL)
    return SteeringReport((chunk,), rank)


def make_controller(policy: SteeringPolicy | None, shards: ShardInfo) -> SteeringController | None:
    """The controller of a router over such shards; None without a policy.

    Raises:
        InvalidPolicy: the policy's section for one of their adapters was made for other weights or another ladder.
    """
    if policy is None:
        return None
    for name in check_sections(policy, shards.adapters):
        _log.warning("the policy has a section for adapter %r, which is not served under this name", name)
    return SteeringController(policy, shards.page_size)


class Helm:
    """Steers one group of shards.

    The signals of step n are observed while step n + 1 runs, whenever they arrive, so they bear on step n + 2 and on
    nothing before it. With ``controller`` None the steering number and the step number are always 0, TGI's behaviour.
    """

    def __init__(
        self,
        shards: Shards,
        controller: SteeringController | None,
        adapters: Mapping[str, AdapterInfo],
        metrics: Metrics,
    ) -> None:
        self._shards = shards
        self._controller = controller
        self._adapters = adapters
        self._metrics = metrics
        self._step = 0
        self._launched: int | None = None
        self._due: int | None = None

    def admit(self, request: GenerationRequest) -> None:
        """Plans a request that is about to join the batch."""
        if self._controller is not None:
            self._controller.admit(request.id, request.prompt_ids or (), self._adapter(request))

    def extend(self, request_id: int, token_id: int) -> None:
        """Takes a generated token of a request that goes on."""
        if self._controller is not None:
            self._controller.extend(request_id, token_id)

    def pause(self, request_id: int) -> None:
        """A request leaves the batch, to come back later; the next flush makes the shards forget it."""
        if self._controller is not None:
            self._controller.pause(request_id)

    def resume(self, request_id: int) -> None:
        """A paused request is about to join the batch again."""
        if self._controller is not None:
            self._controller.resume(request_id)

    def compress(self) -> bool:
        """Memory is short: has one more request compressed. False if there is none."""
        return self._controller is not None and self._controller.compress_next()

    def release(self, request: GenerationRequest, length: int) -> SteeringReport:
        """Forgets a request, and tells what was done to its first ``length`` tokens."""
        if self._controller is None:
            return plain_report(self._adapter(request), length)
        report = self._controller.report(request.id, length)
        self._controller.release(request.id)
        return report

    async def flush(self, ahead: bool = False) -> SteeringUpdate | None:
        """Sends the shards what was decided since the last flush; None if that was nothing. For ``ahead`` see
        `SteeringController.flush`."""
        update = self._controller.flush(ahead) if self._controller is not None else None
        if update is not None:
            self._metrics.steering_update(update)
            await self._shards.steer(update)
        return update

    @property
    def seq(self) -> int:
        """Number of the last update sent, the barrier of the next RPC."""
        return self._controller.last_seq if self._controller is not None else 0

    async def launch(self, call: StepCall, *, ahead: bool = False) -> asyncio.Task[StepResult]:
        """Sends a step behind all that was decided, and returns its task as soon as it is on its way. A caller that
        does not wait for it cancels it.

        Args:
            ahead: the step before still runs; its signals must not have been waited for yet, those of the one before it
                must have been. The caller has only to wait now, and the step gets on its way meanwhile.
        """
        await self.flush(ahead)
        rpc = asyncio.create_task(call(self.seq, self._open_step()))
        try:
            for _ in range(0 if ahead else _LAUNCH_TURNS):
                await asyncio.sleep(0)
        except BaseException:
            rpc.cancel()
            raise
        return rpc

    async def observe(self) -> None:
        """Waits for the signals of the step before the last one that was launched, if they are due, and takes them.

        Raises:
            ShardLost: the shards must be started anew.
            SteeringViolation: the signals contradict what the shards were told.
        """
        due, self._due = self._due, None
        if due is not None and self._controller is not None:
            self._controller.observe(await self._shards.signals(due))

    async def step(self, call: StepCall) -> StepResult:
        """Runs one step, and meanwhile observes the signals of the step before.

        Raises:
            GenerationFailed: the step failed; call `abandon_step` before the next one.
            ShardLost, SteeringViolation: as `observe`.
        """
        rpc = await self.launch(call)
        try:
            await self.observe()
            return await rpc
        finally:
            rpc.cancel()

    def abandon_step(self) -> None:
        """The step that was launched failed: its signals may never come, and nobody waits for them."""
        self._launched = self._due = None

    def _open_step(self) -> int:
        """The number of the step that is launched now; from now on the signals of the one before are due."""
        if self._controller is None:
            return 0
        self._step += 1
        self._due, self._launched = self._launched, self._step
        return self._step

    def _adapter(self, request: GenerationRequest) -> AdapterInfo | None:
        """The request's adapter; None also for one that the shards do not hold and will refuse."""
        return self._adapters.get(request.adapter_id) if request.adapter_id is not None else None
