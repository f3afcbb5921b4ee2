"""Runs one needle as a request of the engine, and judges the answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from patchclamp_server.analysis.heads.retrieval.needle_prompt import NeedlePrompt
from patchclamp_server.analysis.heads.retrieval.needles import Plan
from patchclamp_server.analysis.heads.retrieval.retrieval_scores import SUCCESS_RECALL
from patchclamp_server.analysis.heads.retrieval.rouge import recall
from patchclamp_server.analysis.requests import OnEvent
from patchclamp_server.engine.request import Event, Priority, Request, StopParams, Text, Token
from patchclamp_server.interventions.bound import BoundProgram


@dataclass(frozen=True)
class NeedleRun:
    """Has the fields of the message of this name."""

    needle: int
    length: int
    depth: float
    recall: float
    success: bool
    answer: str


def needle_request(prompt: NeedlePrompt, program: BoundProgram | None, on_event: OnEvent) -> Request:
    """Returns the request, whose answer is decoded greedily."""
    return Request(
        prompt.ids,
        on_event,
        program=program,
        stop=StopParams(max_tokens=prompt.max_tokens),
        priority=Priority.ANALYSIS,
    )


def needle_run(plan: Plan, index: int, events: Sequence[Event]) -> NeedleRun:
    """Returns the run at this index of the plan, given all events of its request."""
    placement = plan.placements[index]
    answer = "".join(event.text for event in events if isinstance(event, Text))
    found = recall(answer, plan.needles[placement.needle].answer)
    return NeedleRun(placement.needle, placement.length, placement.depth, found, found > SUCCESS_RECALL, answer.strip())


def generated_ids(events: Sequence[Event]) -> tuple[int, ...]:
    return tuple(event.id for event in events if isinstance(event, Token))
