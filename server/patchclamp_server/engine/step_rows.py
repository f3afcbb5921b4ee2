"""Counts what a step is going to compute: by kind of row for pace.py, and by what is new for statistics."""

from patchclamp_server.engine.pace import StepRows
from patchclamp_server.engine.request import Priority
from patchclamp_server.engine.scheduler import Work


def rows_of(work: list[Work]) -> StepRows:
    decode = prompt = analysis = 0
    for sequence, n in work:
        if sequence.request.priority is Priority.ANALYSIS:
            analysis += n
        elif n == 1:
            decode += 1
        else:
            prompt += n
    return StepRows(decode, prompt, analysis)


def counted_tokens(work: list[Work]) -> tuple[int, int]:
    """Returns, before a step, the tokens of prompts that it computes for the first time (a baseline beside its leader
    has none), and the tokens that it computes again after a preemption."""
    new = recomputed = 0
    for sequence, n in work:
        start, reached, prompt_length = sequence.computed, sequence.reached, sequence.prompt_length
        if start < reached:
            recomputed += min(start + n, reached) - start
        if start < prompt_length and sequence.leader is None:
            new += max(0, min(start + n, prompt_length) - max(start, reached))
    return new, recomputed
