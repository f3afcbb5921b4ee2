"""Delivers what a step has computed to those who asked for it: readouts, aborts, scores and sampled tokens. Ends
sequences that have all they need."""

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from patchclamp_server.engine.latents import latent_predictions
from patchclamp_server.engine.live import LiveRequests
from patchclamp_server.engine.quality_guard import divergences
from patchclamp_server.engine.request import FinishReason
from patchclamp_server.engine.runner import Prediction, Runner, StepResult
from patchclamp_server.engine.sampler import NOT_FINITE, Sampled, sample
from patchclamp_server.engine.scheduler import Work
from patchclamp_server.engine.sequence import Sequence
from patchclamp_server.errors import Aborted, EngineFailure
from patchclamp_server.interventions.kinds.latents import LatentRows
from patchclamp_server.interventions.spans import StepOutcome
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.overflow import logits_refusal

log = logging.getLogger(__name__)

# It is called with every row of logits that is sampled from: request id, position it predicts, logits [vocab].
OnLogits = Callable[[int, int, Tensor], None]


class Delivery:
    def __init__(self, live: LiveRequests, runner: Runner, decoder: Decoder, context_length: int) -> None:
        self._live, self._runner, self._decoder = live, runner, decoder
        self._context_length = context_length
        # These count the tokens sampled, and those given their log-probability, since the start.
        self.generated_tokens = self.scored_tokens = 0

    def deliver(self, work: list[Work], result: StepResult, on_logits: OnLogits | None) -> None:
        self._sample_densely(result)
        self._tell_outcome(work, result.outcome)
        drawn = self._drawn(result)
        sampled: list[Sampled] = []
        if drawn:
            rows = [p.row for p in drawn]
            logits = result.logits if len(rows) == len(result.logits) else result.logits[rows]
            sampled = sample(logits, [p.sequence.sampling_row for p in drawn])
            self._look_at(drawn, sampled, logits, on_logits)
        if result.outcome.latents:
            self._tell_latents(result.outcome.latents, drawn, sampled)
        if drawn:
            self._accept(drawn, sampled)
        self._end_computed(work)

    def _sample_densely(self, result: StepResult) -> None:
        """Serves the quality guards: computes due tokens densely too, and ends sparse inference that has drifted."""
        due = [p for p in result.predictions if p.sequence.sparse is not None and self._guard_is_due(p)]
        if not due:
            return
        try:
            dense = self._runner.run_densely([p.sequence for p in due])
        except Exception as error:
            log.exception("dense samples of %d sequences failed", len(due))
            for prediction in due:
                failure = EngineFailure("", f"the quality guard failed: {type(error).__name__}")
                self._live.fail_id(prediction.sequence.id, failure)
            return
        found = divergences(dense, result.logits[[p.row for p in due]])
        for prediction, (divergence, same) in zip(due, found, strict=True):
            sparse = prediction.sequence.sparse
            assert sparse is not None
            assert sparse.guard is not None
            self._live.observer.on_guard_sample(sparse.asked.policy, divergence)
            if sparse.guard.add(divergence, same):
                sparse.dense_from = prediction.position + 1
                self._live.observer.on_sparse_fallback(sparse.asked.policy)

    def _guard_is_due(self, prediction: Prediction) -> bool:
        sequence, sparse = prediction.sequence, prediction.sequence.sparse
        if sparse is None or sparse.guard is None or not sparse.is_sparse(prediction.position):
            return False
        due = sparse.guard.is_due(prediction.position - sequence.prompt_length)
        return due and sequence.id in self._live.sequences

    def _tell_outcome(self, work: list[Work], outcome: StepOutcome) -> None:
        """Sends the readouts first, then ends the sequences whose abort conditions held."""
        live = self._live
        if outcome.readouts:
            for uid, value in outcome.readouts:
                if uid in live.sequences:
                    live.sequences[uid].output_or_fail().collect(value)
            for sequence in [w.sequence for w in work if w.sequence.output is not None and w.sequence.output.readouts]:
                if sequence.id in live.sequences:
                    with live.concerning(sequence):
                        sequence.output_or_fail().emit_readouts(sequence.request.on_event)
        for hit in outcome.aborts:
            where = f"condition {hit.name!r} held at position {hit.position}"
            live.abort(hit.uid, Aborted("program.abort_when", where))

    def _drawn(self, result: StepResult) -> list[Prediction]:
        """Returns the predictions that tokens are sampled from. The others are scored here, or compared with those that
        they are a baseline of."""
        live = self._live
        drawn = []
        for prediction in result.predictions:
            sequence = prediction.sequence
            if sequence.id not in live.sequences:
                continue
            request = sequence.request
            if sequence.leader is not None:
                with live.concerning(sequence.leader):
                    sequence.leader.compare(prediction.position, result.logits[prediction.row])
            elif request.score_from is not None:
                self.scored_tokens += 1
                with live.concerning(sequence):
                    if not sequence.score(prediction.position, result.logits[prediction.row]):
                        live.fail(sequence, logits_refusal(self._runner.dtype, prediction.position))
            elif prediction.position < sequence.prompt_length and request.prompt_logprobs is not None:
                self.scored_tokens += 1
                with live.concerning(sequence):
                    if not sequence.score_prompt(prediction.position, result.logits[prediction.row]):
                        live.fail(sequence, logits_refusal(self._runner.dtype, prediction.position))
                if sequence.id in live.sequences and sequence.samples_after(prediction.position):
                    drawn.append(prediction)
            elif request.stop.max_tokens > 0:
                drawn.append(prediction)
        return drawn

    def _look_at(
        self, drawn: list[Prediction], sampled: list[Sampled], logits: Tensor, on_logits: OnLogits | None
    ) -> None:
        """Gives rows of logits to those who need more of them than a token."""
        for i, (prediction, choice) in enumerate(zip(drawn, sampled, strict=True)):
            sequence = prediction.sequence
            if choice.id == NOT_FINITE:
                continue
            if on_logits is not None:
                on_logits(sequence.id, len(sequence.tokens), logits[i])
            if sequence.follower is not None:
                sequence.predictions[len(sequence.tokens)] = torch.log_softmax(logits[i].double(), dim=0)

    def _tell_latents(self, latents: list[LatentRows], drawn: list[Prediction], sampled: list[Sampled]) -> None:
        """Sends what layers would have said in place of each token that comes now, before those that are sampled."""
        sequences = self._live.sequences
        following = {(p.sequence.id, p.position): choice.id for p, choice in zip(drawn, sampled, strict=True)}
        asked: dict[tuple[int, int], tuple[int, ...]] = {}
        for uid, position in {owner for rows in latents for owner in rows.asked}:
            sequence = sequences.get(uid)
            if sequence is None or sequence.state is None:
                continue
            scored = sequence.tokens[position + 1] if sequence.scores else NOT_FINITE
            token = following.get((uid, position), scored)
            if token != NOT_FINITE:
                asked[uid, position] = (token, *sequence.state.bound.latent_options)
        for uid, found in latent_predictions(self._decoder, latents, asked).items():
            with self._live.concerning(sequences[uid]):
                for predictions in found:
                    sequences[uid].request.on_event(predictions)

    def _accept(self, drawn: list[Prediction], sampled: list[Sampled]) -> None:
        """Adds the sampled tokens to their sequences, and finishes those that end with them."""
        live, most = self._live, self._context_length
        self._observe_tokens([p.sequence for p, choice in zip(drawn, sampled, strict=True) if choice.id != NOT_FINITE])
        for prediction, choice in zip(drawn, sampled, strict=True):
            sequence = prediction.sequence
            if choice.id == NOT_FINITE:
                live.fail(sequence, logits_refusal(self._runner.dtype, prediction.position))
                continue
            self.generated_tokens += 1
            # This is what `concerning` does, which costs more to enter than a token to accept.
            try:
                reason = sequence.accept(choice, most)
                if reason is not None:
                    live.finish(sequence, reason)
            except Exception as error:
                live.broke(sequence, error)

    def _observe_tokens(self, sequences: list[Sequence]) -> None:
        """Tells the observer how long the clients have waited for their tokens, all of which they have now."""
        now = time.monotonic()
        gaps = []
        for sequence in sequences:
            if sequence.last_token_at is None:
                sequence.first_token_at = now
                self._live.observer.on_first_token(now - sequence.arrival)
            else:
                gaps.append(now - sequence.last_token_at)
            sequence.last_token_at = now
        if gaps:
            self._live.observer.on_inter_tokens(gaps)

    def _end_computed(self, work: list[Work]) -> None:
        """Ends sequences that sample nothing and have computed all they need."""
        for sequence in [w.sequence for w in work if w.sequence.samples_nothing]:
            if sequence.id not in self._live.sequences or sequence.remaining > 0:
                continue
            if sequence.leader is not None:
                if sequence.leader.ended is not None:
                    self._live.complete(sequence.leader, sequence.leader.ended)
            elif sequence.scores or sequence.request.stop.max_tokens == 0:
                self._live.finish(sequence, FinishReason.LENGTH)
