"""The router's side of steering, in process."""

from __future__ import annotations

from chunkwise.config.policy import SteeringPolicy
from chunkwise.core import AdapterInfo, Generation, GenerationRequest, StepSignals
from chunkwise.shard.decisions import DecisionTable
from chunkwise.steering import SteeringController


class LocalHelm:
    """What `router.helm` does over sockets: decisions go out before each step, and the signals of a step are observed
    once the next one has been started, here: has run, before its tokens are taken."""

    def __init__(self, decisions: DecisionTable, policy: SteeringPolicy | None, page_size: int) -> None:
        self._decisions = decisions
        self._session = decisions.start_session()
        self._controller = SteeringController(policy, page_size) if policy is not None else None
        self._trailing = StepSignals(0)

    def admit(self, request: GenerationRequest, adapter: AdapterInfo | None) -> None:
        """Plans a request that is about to join."""
        if self._controller is not None:
            self._controller.admit(request.id, request.prompt_ids or (), adapter)

    def flush(self) -> int:
        """Hands over what was decided; returns the number of the update that the next step may see."""
        if self._controller is None:
            return 0
        update = self._controller.flush()
        if update is not None:
            self._decisions.receive(self._session, update)
        return self._controller.last_seq

    def observe(self, signals: StepSignals) -> None:
        """Keeps the signals of the step that has just run and observes those of the step before."""
        if self._controller is not None:
            self._controller.observe(self._trailing)
            self._trailing = signals

    def take(self, generation: Generation) -> None:
        """Takes a token, or the end of a request."""
        if self._controller is None:
            return
        if generation.text is None:
            self._controller.extend(generation.request_id, generation.token.id)
        else:
            self._controller.release(generation.request_id)
