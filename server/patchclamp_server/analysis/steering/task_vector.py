"""Task vector: v = mean over prompts of the last token's state, of prompts that demonstrate the task.

    a => b
    c => d
    e =>            h of this last token, layer by layer

`replace`d at the last token of a prompt without any demonstration ("f =>"), it makes the model do the task. Every
training demonstration is asked about once, after up to SHOTS others in a random order.

Measured at each layer: the share of held-out inputs whose answer begins with the likeliest token once the state of the
last token is replaced. Beside it (`random_accuracy`): the same with the mean state of the same prompts in which each
input has the output of another one, which knows the form of answers and not the task. Baselines: nothing replaced, and
demonstrations in the prompt. Source: Hendel et al. 2023, In-Context Learning Creates Task Vectors, §3; Todd et al.
2023, Function Vectors in Large Language Models, §2; Luo et al. 2024, Task Vectors are Cross-Modal, §3.
"""

import random
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.requests import OnEvent, completed
from patchclamp_server.analysis.steering.demonstrations import (
    LAST,
    Demonstration,
    Encode,
    deranged,
    last_states,
    norms,
    prompt,
    shots,
)
from patchclamp_server.analysis.steering.evidence import LayerEvidence, shuffled, training_pairs
from patchclamp_server.analysis.steering.result import Card, Result, best_by_accuracy, stored
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Priority, Request, StopParams, Token
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import Edit, Program, ReplaceVector, Vector
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

SHOTS = 8
MEASURE = (
    "held-out inputs without demonstrations that are answered right (first token) once the state of their last token "
    "is replaced; beside it the vector of demonstrations whose outputs were exchanged"
)
Prompts: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TaskPrompts:
    """Token ids. `demonstrated` and `exchanged` are of training demonstrations, the others of held-out ones: `asked`
    shows nothing, `shown` shows demonstrations; `answers` are the first tokens of their outputs."""

    demonstrated: Prompts
    exchanged: Prompts
    asked: Prompts
    shown: Prompts
    answers: tuple[int, ...]

    @classmethod
    def of(
        cls,
        demonstrations: Sequence[Demonstration],
        fraction: float,
        seed: int,
        encode: Encode,
        answer: Encode,
    ) -> "TaskPrompts":
        """`answer` gives the ids of a text that follows a prompt. Raises InvalidArgument on "demonstrations"."""
        n = training_pairs(len(demonstrations), fraction, "demonstrations")
        order = shuffled(len(demonstrations), seed)
        training, heldout = [demonstrations[i] for i in order[:n]], order[n:]
        draw = random.Random(seed)
        wrong = deranged(training, draw)
        demonstrated, exchanged = list[tuple[int, ...]](), list[tuple[int, ...]]()
        for i, each in enumerate(training):
            # The same demonstrations in the same order: what differs are their outputs.
            others = draw.sample([j for j in range(n) if j != i], min(SHOTS, n - 1))
            for own, known in ((demonstrated, training), (exchanged, wrong)):
                own.append(encode(prompt([known[j] for j in others], each.input), f"demonstrations[{order[i]}]"))
        held = [(demonstrations[i], f"demonstrations[{i}]") for i in heldout]
        return cls(
            tuple(demonstrated),
            tuple(exchanged),
            tuple(encode(prompt((), each.input), f"{field}.input") for each, field in held),
            tuple(encode(prompt(shots(training, SHOTS, draw), each.input), field) for each, field in held),
            tuple(answer(f" {each.output}", f"{field}.output")[0] for each, field in held),
        )


@dataclass(frozen=True, eq=False)
class TaskVector:
    prompts: TaskPrompts
    demonstrations: tuple[Demonstration, ...]
    site: Site
    layers: tuple[int, ...]
    holdout_fraction: float = 0.25
    seed: int = 0
    description: str = ""
    tags: Tags = NO_TAGS


async def task_vector(
    engine: Engine, store: ArtifactStore, info: ModelInfo, job: TaskVector
) -> AsyncGenerator[Progress | Result, None]:
    """Yields progress, then the result. Stages are "activations", counted in prompts, and "evidence", in layers."""
    prompts = job.prompts
    texts = (*prompts.demonstrated, *prompts.exchanged, *prompts.asked)
    steps, states = Steps("activations", len(texts)), list[Tensor]()
    async with aclosing(last_states(engine, texts, job.site, job.layers)) as found:
        async for state in found:
            states.append(state)
            yield steps.advance()
    n = len(prompts.demonstrated)
    vectors, control = torch.stack(states[:n]).mean(dim=0), torch.stack(states[n : 2 * n]).mean(dim=0)
    activation_norms = norms(states[2 * n :])

    evidence = []
    for row, layer in enumerate(job.layers):
        own, other = (_replacing(vector[row], job.site, layer, info) for vector in (vectors, control))
        accuracies = [await accuracy(engine, prompts.asked, prompts.answers, program) for program in (own, other)]
        evidence.append(
            LayerEvidence(
                layer,
                heldout_accuracy=accuracies[0],
                random_accuracy=accuracies[1],
                norm=float(vectors[row].norm()),
                activation_norm=float(activation_norms[row]),
                explained_variance=0.0,
                margin=0.0,
                midpoint=None,
                pooled_tokens=n,
            )
        )
        yield Progress("evidence", row + 1, len(job.layers))
    baselines = {
        "unedited": await accuracy(engine, prompts.asked, prompts.answers, None),
        "demonstrations": await accuracy(engine, prompts.shown, prompts.answers, None),
    }
    best = best_by_accuracy(evidence)
    yield await stored(
        store,
        info,
        job,
        dict(zip(job.layers, vectors, strict=True)),
        Card(tuple(evidence), best.layer, MEASURE, _warnings(best, baselines), baselines),
        method="task_vector",
        parameters={"shots": SHOTS},
        source={
            "demonstrations": len(job.demonstrations),
            "demonstrations_digest": json_digest([[each.input, each.output] for each in job.demonstrations]),
        },
        evidence={"training_demonstrations": n, "heldout_demonstrations": len(prompts.asked)},
    )


async def accuracy(
    engine: Engine, prompts: Iterable[tuple[int, ...]], answers: Sequence[int], program: BoundProgram | None
) -> float:
    """Returns the share of prompts whose likeliest next token is the one of the answer."""
    requests = (partial(_request, tokens, program) for tokens in prompts)
    right = 0
    async with aclosing(completed(engine, requests)) as finished:
        index = 0
        async for events in finished:
            right += any(isinstance(event, Token) and event.id == answers[index] for event in events)
            index += 1
    return right / len(answers)


def _request(tokens: tuple[int, ...], program: BoundProgram | None, on_event: OnEvent) -> Request:
    stop = StopParams(max_tokens=1, ignore_eos=True)
    return Request(tokens, on_event, program, stop=stop, priority=Priority.ANALYSIS)


def _replacing(vector: Tensor, site: Site, layer: int, info: ModelInfo) -> BoundProgram:
    edit = Edit(ReplaceVector(Vector(values=vector)), site, layers=(layer,), scope=LAST)
    return bind(Program((edit,)), info)


def _warnings(best: LayerEvidence, baselines: dict[str, float]) -> tuple[str, ...]:
    control = max(best.random_accuracy, baselines["unedited"])
    if best.heldout_accuracy > control:
        return ()
    return (
        f"at no layer are more held-out inputs answered right ({best.heldout_accuracy:.2f}) than with exchanged "
        f"outputs or without an edit ({control:.2f}); with demonstrations in the prompt "
        f"{baselines['demonstrations']:.2f}",
    )
