"""Compare runs one prompt under the program and without it, and tells how far apart they are at each token."""

from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import groupby
from typing import TypeAlias

from patchclamp.v1 import generation_pb2 as pb
from patchclamp_server.engine.request import Divergence, Event
from patchclamp_server.engine.sampler import drawn_seed
from patchclamp_server.interventions.state import EMPTY_PROGRAM
from patchclamp_server.rpc.call.calls import Prepared
from patchclamp_server.rpc.streams.stream import EventStream

Side: TypeAlias = "pb.CompareSide.ValueType"
EDITED = pb.COMPARE_SIDE_EDITED
BASELINE = pb.COMPARE_SIDE_BASELINE


class Comparison:
    """Runs two requests that feed one stream, and makes responses of it.

    `edited` carries the program (and sparsity, where it is asked for) and brings a shadow sequence without it along its
    own tokens, which gives the divergences. `baseline` runs freely without the program, with the same seed, and gives
    the text to compare with.
    """

    def __init__(self, prepared: Prepared, stream: EventStream[tuple[Side, Event]], deadline: float | None) -> None:
        self._stream = stream
        self._piece = prepared.prompts.piece
        sampling = prepared.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=drawn_seed())
        self.edited = prepared.to_request(
            lambda event: stream.put((EDITED, event)),
            deadline,
            sampling=sampling,
            compare_baseline=True,
            held=stream.is_full,
        )
        self.baseline = prepared.to_request(
            lambda event: stream.put((BASELINE, event)),
            deadline,
            sampling=sampling,
            program=prepared.observed(EMPTY_PROGRAM),
            sparsity=None,
            prompt_logprobs=None,
            held=stream.is_full,
        )
        self._builders = {EDITED: prepared.builder(), BASELINE: prepared.builder(wait_for_readouts=False, edited=False)}
        self._divergences: list[Divergence] = []

    async def responses(self) -> AsyncIterator[pb.CompareResponse]:
        """Yields both texts as they grow, a divergence for each edited token, then the summary."""
        unfinished = set(self._builders)
        while unfinished:
            for side, tagged in groupby(await self._stream.batch(), key=lambda pair: pair[0]):
                events: list[Event] = []
                for _, event in tagged:
                    if isinstance(event, Divergence):
                        self._divergences.append(event)
                        yield self._divergence(event)
                    else:
                        events.append(event)
                for response in self._builders[side].responses(events):
                    if response.HasField("finished"):
                        unfinished.remove(side)
                    yield pb.CompareResponse(text=pb.CompareText(side=side, response=response))
        yield pb.CompareResponse(summary=summary(self._divergences))

    def _divergence(self, event: Divergence) -> pb.CompareResponse:
        text = self._piece(event.id)
        return pb.CompareResponse(
            divergence=pb.TokenDivergence(position=event.position, id=event.id, kl=event.kl, text=text)
        )


def summary(divergences: list[Divergence]) -> pb.CompareSummary:
    """Returns means over the edited tokens; zeros, and full agreement, where there is none."""
    n = len(divergences)
    return pb.CompareSummary(
        mean_kl=sum(d.kl for d in divergences) / n if n else 0.0,
        max_kl=max((d.kl for d in divergences), default=0.0),
        top1_agreement=sum(d.same_top1 for d in divergences) / n if n else 1.0,
        positions=n,
    )
