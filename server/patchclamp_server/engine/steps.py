"""One step: what the scheduler chooses is run and delivered, and who is hurt by a failure is told.

    schedule → run → sample → emit → a slice of analysis that is no request (exclusive.py)

Rows of analysis requests and slices at the exclusive door take turns, so that no step has both: who comes meanwhile
waits for one of them.
"""

import logging
import time

import torch

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.delivery import Delivery, OnLogits
from patchclamp_server.engine.exclusive import ExclusiveDoor
from patchclamp_server.engine.faults import fault_of, is_device_lost, is_out_of_memory
from patchclamp_server.engine.intake import Intake
from patchclamp_server.engine.live import LiveRequests
from patchclamp_server.engine.runner import Runner
from patchclamp_server.engine.scheduler import Scheduler, Work
from patchclamp_server.engine.step_rows import counted_tokens, rows_of
from patchclamp_server.errors import RequestError
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.overflow import refusal

log = logging.getLogger(__name__)


class Steps:
    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        *,
        intake: Intake,
        scheduler: Scheduler,
        live: LiveRequests,
        runner: Runner,
        delivery: Delivery,
        exclusive: ExclusiveDoor,
    ) -> None:
        self._model, self._config = model, config
        self._intake, self._scheduler, self._live = intake, scheduler, live
        self._runner, self._delivery, self._exclusive = runner, delivery, exclusive
        self.n = self.prefill_tokens = self.recomputed_tokens = self.failed = 0
        self._failed_in_a_row = 0
        # This is true when requests of analysis had the last turn, and the door has the next one.
        self._door_is_next = False

    def run(self, on_logits: OnLogits | None) -> bool:
        """Runs a step, and a slice of what is at the exclusive door when it is time for one. Returns False when nothing
        can run."""
        scheduler, live = self._scheduler, self._live
        preemptions = scheduler.preemptions
        work = scheduler.schedule(with_analysis=not (self._exclusive.busy and self._door_is_next))
        for _ in range(scheduler.preemptions - preemptions):
            live.observer.on_preemption()
        for sequence in scheduler.late:
            if (late := self._intake.late(sequence)) is not None:
                live.fail(sequence, live.refused(late))
        live.started(list(scheduler.started))
        if work:
            rows = rows_of(work)
            self._step(work, on_logits)
            if rows.analysis:
                self._door_is_next = True
                return True
        return self._run_slice(serves=bool(work)) or bool(work)

    def _run_slice(self, *, serves: bool) -> bool:
        """Runs a slice; returns False when none ran. `serves`: the step before it had something more urgent."""
        share = self._scheduler.share
        if not self._exclusive.busy or (serves and not share.is_due):
            return False
        seconds = self._exclusive.run(share.turn_seconds if self._scheduler.serving else share.alone_seconds)
        if serves:
            share.analysed(seconds)
        elif not self._scheduler.serving:
            share.analysed_alone(seconds)
        self._door_is_next = False
        return True

    def _step(self, work: list[Work], on_logits: OnLogits | None) -> None:
        try:
            self._run(work, on_logits)
        except Exception as error:
            # After out of memory, or a defect, the requests of this step are lost, but the engine is not.
            log.exception("a step of %d sequences failed", len(work))
            self._failed_in_a_row += 1
            self.failed += 1
            if is_device_lost(error) or self._failed_in_a_row >= self._config.max_failed_steps:
                raise
            self._give_up(work, fault_of(error))
            emptied = is_out_of_memory(error)
        else:
            self._failed_in_a_row = 0
            return
        if emptied and self._model.decoder.device.type == "cuda":
            # This comes after the `except`, whose traceback holds the tensors of the step.
            torch.cuda.empty_cache()

    def _give_up(self, work: list[Work], failure: RequestError) -> None:
        """Fails the sequences of a step that was not finished."""
        size = self._config.kv_block_size
        # The step may have written what is not finite.
        self._runner.cache.scrub([b for w in work for b in w.sequence.blocks[w.sequence.computed // size :]])
        for item in work:
            self._live.fail_id(item.sequence.id, failure)

    def _run(self, work: list[Work], on_logits: OnLogits | None) -> None:
        started = time.monotonic()
        # This comes before the step, which moves what has been reached.
        prompt_tokens, recomputed = counted_tokens(work)
        result = self._runner.run(work)
        for item, position in result.broken:
            self._break(item, position)
        self._scheduler.finish_step([w for w in work if w.sequence.id in self._live.sequences])
        self.n += 1
        self.prefill_tokens += prompt_tokens
        self.recomputed_tokens += recomputed
        generated = self._delivery.generated_tokens
        self._delivery.deliver(work, result, on_logits)
        seconds = time.monotonic() - started
        rows = rows_of(work)
        self._scheduler.took(rows, seconds)
        generated = self._delivery.generated_tokens - generated
        self._live.observer.on_step(seconds=seconds, rows=sum(rows), generated=generated)

    def _break(self, item: Work, position: int) -> None:
        """Fails a sequence whose activations overflowed, and cleans the blocks it wrote."""
        sequence, size = item.sequence, self._config.kv_block_size
        try:
            found = self._runner.locate(item)
        except Exception:
            # The others of the step must not be lost for a message.
            log.exception("where the activations of a request overflowed was not found")
            found = None
        self._runner.cache.scrub(sequence.blocks[sequence.computed // size :])
        self._live.fail_id(sequence.id, refusal(found, self._model.decoder.dtype, position))
