"""The decode steps of one shard as a stream. A call of its own for every step would cost both sides twice as much, on
cores that the model needs."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

import grpc
import grpc.aio

from chunkwise.core import GenerationFailed
from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import steering_pb2 as steer_pb
from chunkwise.router.shard_group import ShardLost

Call = grpc.aio.StreamStreamCall[pb.DecodeRequest, steer_pb.DecodeOutcome]


class DecodeStream:
    """Requests to the shard at ``url``, and outcomes back, in order. Several may be under way at once."""

    def __init__(self, url: str, call: Call) -> None:
        self._url = url
        self._call = call
        self._requests: asyncio.Queue[pb.DecodeRequest] = asyncio.Queue()
        self._waiting: deque[asyncio.Future[steer_pb.DecodeOutcome]] = deque()
        self._end: str | None = None
        self._reading = asyncio.create_task(self._read())
        self._writing = asyncio.create_task(self._write())

    async def decode(self, request: pb.DecodeRequest) -> steer_pb.DecodeOutcome:
        """Sends a step, within one turn of the event loop, and waits for its outcome. The step goes on if the caller
        stops waiting.

        Raises:
            GenerationFailed: the step failed.
            ShardLost: the stream has ended.
        """
        if self._end is not None:
            raise self._lost(self._end)
        outcome: asyncio.Future[steer_pb.DecodeOutcome] = asyncio.get_running_loop().create_future()
        self._waiting.append(outcome)
        # Not written here: to cancel a write, or a read, is to cancel the stream.
        self._requests.put_nowait(request)
        message = await outcome
        if not message.HasField("response"):
            raise GenerationFailed(f"shard {self._url}: {message.error}")
        return message

    def close(self) -> None:
        """Ends the stream."""
        self._reading.cancel()
        self._writing.cancel()
        self._call.cancel()

    async def _write(self) -> None:
        # gRPC takes one message at a time. Why one cannot be written, `_read` will be told.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._requests.get())

    async def _read(self) -> None:
        try:
            while isinstance(message := await self._call.read(), steer_pb.DecodeOutcome):
                outcome = self._waiting.popleft()
                if not outcome.done():
                    outcome.set_result(message)
            self._end = "the shard has closed it"
        except grpc.aio.AioRpcError as error:
            self._end = error.details() or str(error.code())
        except IndexError:
            self._end = "an outcome came that nobody had asked for"
        finally:
            self._end = self._end or "it was closed"
            for outcome in self._waiting:
                if not outcome.done():
                    outcome.set_exception(self._lost(self._end))

    def _lost(self, reason: str) -> ShardLost:
        return ShardLost(f"the stream of steps to shard {self._url} has ended: {reason}")
