"""Analysis jobs that wait for each other: one at a time for the whole server, others wait in their order.

Two at once would take each other's time and memory. Jobs are requests of the engine with reducers. What is none is work
at the engine's exclusive door (engine/exclusive.py). Those with a pass of their own, and why:

    heads/circuits/runs.py           Mean ablation, activation patching and faithfulness: variants of a run in which
                                     heads are replaced begin at the first layer of these, from the residual stream of
                                     the run. Of single heads, that is (n_layers + 1) / 2 of the n_layers blocks which a
                                     request runs, on the mean. The values are others at every position, where an edit
                                     has one for all of its tokens: all heads of a prompt of n tokens would take
                                     n · n_layers edits. Path patching needs no further passes, but products of what was
                                     kept of these runs.
    heads/circuits/attribution.py    Gradients of a logit, backwards through kept activations of its last token.
    heads/attention_mass.py          Weights of chosen pairs of positions: requests read where attention has its peak,
                                     and no matrix of attention is kept. They come from all queries and keys of a layer.
    neurons/backward.py              Gradients of activations: a request keeps nothing to go back through. And
                                     interchange interventions, with gradients: passes that begin at a layer, with
                                     states of another run in it (subspaces/interchange.py).
    neurons/other_model.py           Activations of a second checkpoint, of which no engine runs requests.
    quantization.py                  What quantising costs: the dense model and the quantised one, of which no engine
                                     runs requests.
    sparsity/teal_allocation.py      One block alone, which every step of a search runs again, from kept inputs.

Without a pass: what reads weights alone (heads/scores/successor.py, ov_nuclear_norm.py,
steering/causal_inner_product.py, steering/concept_circuit/writes.py), and what calibration makes of the rows that
reducers kept (quantiles, errors of sketches, clusters: sparsity/calibrate.py, damage.py).
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from patchclamp_server.engine.call_observer import OBSERVER
from patchclamp_server.errors import RequestError

logger = logging.getLogger(__name__)

E = TypeVar("E")
_END: Any = object()


class ExclusiveJobs:
    """Queues the jobs of one server, for one event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def follow(self, job: AsyncGenerator[E, None]) -> AsyncGenerator[E, None]:
        """Yields the events of a job once it is its turn; raises what the job raises.

        The job goes on however slowly its events are taken, since others wait for its turn to end. Ending the iteration
        early, or cancelling the task, closes the job, and returns when that is done. Only then does the next job begin.
        """
        taken: asyncio.Queue[E] = asyncio.Queue()

        async def run() -> None:
            try:
                async with self._turn, aclosing(job) as events:
                    _tell_observer()
                    async for event in events:
                        taken.put_nowait(event)
            finally:
                taken.put_nowait(_END)

        running = asyncio.create_task(run())
        running.add_done_callback(_log_failure)
        try:
            while (event := await taken.get()) is not _END:
                yield event
            await running
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def result(self, work: Callable[[], Awaitable[E]]) -> E:
        """Returns the result of a job that has no events; otherwise it does what `follow` does."""

        async def job() -> AsyncGenerator[E, None]:
            yield await work()

        async with aclosing(self.follow(job())) as events:
            return await anext(events)


def _tell_observer() -> None:
    if (observer := OBSERVER.get()) is not None:
        observer.job_begins()


def _log_failure(job: "asyncio.Future[None]") -> None:
    """Logs a failure even if nobody waits for the job any more."""
    error = None if job.cancelled() else job.exception()
    if error is not None and not isinstance(error, RequestError):
        logger.error("an analysis job failed", exc_info=error)
