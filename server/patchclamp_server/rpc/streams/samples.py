"""Several samples of one prompt in one call. They are requests of their own that the prefix cache lets share the blocks
of the prompt: the others wait until the first has computed them (engine/prefixes.py)."""

from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import groupby

from patchclamp.v1 import generation_pb2 as pb
from patchclamp_server.engine.request import Event, Request
from patchclamp_server.rpc.call.calls import Prepared
from patchclamp_server.rpc.streams.stream import EventStream

SEEDS = 2**64


class Samples:
    """Makes the requests, which feed one stream, and responses of it, each with the number of its sample."""

    def __init__(
        self, prepared: Prepared, samples: int, stream: EventStream[tuple[int, Event]], deadline: float | None
    ) -> None:
        self._stream = stream
        self._builders = [prepared.builder() for _ in range(samples)]
        self.requests = [self._request(prepared, number, deadline) for number in range(samples)]

    def _request(self, prepared: Prepared, number: int, deadline: float | None) -> Request:
        stream, sampling = self._stream, prepared.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + number) % SEEDS)
        return prepared.to_request(
            lambda event: stream.put((number, event)), deadline, sampling=sampling, held=stream.is_full
        )

    async def responses(self) -> AsyncIterator[pb.GenerateResponse]:
        """Yields responses until every sample has finished. Raises the error of the first that fails."""
        unfinished = len(self._builders)
        while unfinished:
            for number, tagged in groupby(await self._stream.batch(), key=lambda pair: pair[0]):
                for response in self._builders[number].responses([event for _, event in tagged]):
                    response.sample = number
                    unfinished -= response.HasField("finished")
                    yield response
