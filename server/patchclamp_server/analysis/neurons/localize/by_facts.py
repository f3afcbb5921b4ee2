"""Neurons of facts: gradient times activation, or integrated gradients, of the log-probability of answers.

    score_j = mean over facts - mean over controls;   no score: among the best CONTROL_SHARE of the controls

Facts are few: none is held out, and a set is judged by the mean score of its neurons beside that of random ones.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.gradients import GradientScores, OverTokens, gradient_times_activation
from patchclamp_server.analysis.neurons.integrated import integrated_gradients
from patchclamp_server.analysis.neurons.localize.methods import Gradients, Localization, Scored
from patchclamp_server.analysis.neurons.targets import Example
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.requests import exclusively
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Work
from patchclamp_server.errors import renaming_fields
from patchclamp_server.model.decoder import Decoder

CONTROL_SHARE = 0.01
MEASURE = "mean score, on the same facts"


@dataclass(frozen=True, eq=False)
class _Attributed:
    """Mean scores float32 [layers, d_ff] of a list of facts; steps and gap of integrated gradients."""

    scores: Tensor
    steps: int = 0
    gap: float = 0.0


async def by_facts(
    engine: Engine, method: Gradients, job: Localization
) -> AsyncGenerator[Progress | tuple[list[Scored], dict[str, Any]], None]:
    """Yields progress in facts, then scores and the fields of Localized beside the sets."""
    found: list[_Attributed] = []
    for examples, field in ((method.facts, f"{job.name}.facts"), (method.controls, f"{job.name}.controls")):
        if not examples:
            continue
        work: Work[Progress | _Attributed] = _work(engine.model.decoder, examples, method, job, field)
        events: AsyncGenerator[Progress | _Attributed, None] = exclusively(engine, work)
        async with aclosing(events) as told:
            async for event in told:
                if isinstance(event, Progress):
                    yield event
                else:
                    found.append(event)
    own = found[0].scores
    scores = own
    if len(found) > 1:
        control = found[1].scores
        n = max(1, round(CONTROL_SHARE * control.numel()))
        bound = control.flatten().topk(n).values[-1]
        scores = torch.where(control >= bound, -torch.inf, own - control)
    gap = max(each.gap for each in found)
    told_gaps = [f"completeness gap {gap:.3g} is above {method.completeness:g}: raise max_steps"]
    every = [*method.facts, *method.controls]
    yield (
        [Scored("", scores, MEASURE, torch.where(scores == -torch.inf, 0.0, scores), _size(job, scores))],
        {
            "texts": len(every),
            "tokens": sum(len(example.tokens) for example in every),
            "steps": sum(each.steps for each in found),
            "completeness_gap": gap,
            "warnings": tuple(told_gaps if method.integrated and gap > method.completeness else ()),
        },
    )


def _size(job: Localization, scores: Tensor) -> int:
    return job.size or max(1, scores.numel() // 100)


def _work(
    decoder: Decoder, examples: Sequence[Example], method: Gradients, job: Localization, field: str
) -> Work[Progress | _Attributed]:
    if not method.integrated:
        over = OverTokens.SUM if method.all_tokens else OverTokens.LAST
        found: GradientScores = yield from gradient_times_activation(
            decoder, examples, layers=job.layers, over_tokens=over, field=field
        )
        yield _Attributed(found.scores)
        return
    steps = Steps("paths", len(examples) * len(job.layers))
    total = torch.zeros(len(job.layers), decoder.spec.d_ff, dtype=torch.float64)
    gradients, gap = 0, 0.0
    for i, example in enumerate(examples):
        positions = None if method.all_tokens else [len(example.prompt) - 1]
        for row, layer in enumerate(job.layers):
            # A path has one example, which it names [0].
            with renaming_fields({f"{field}[0].prompt": f"{field}[{i}].prompt"}):
                path = yield from integrated_gradients(
                    decoder,
                    example,
                    layer,
                    positions=positions,
                    tolerance=method.completeness,
                    max_steps=method.max_steps,
                    field=field,
                )
            total[row] += path.attributions.double()
            gradients += path.steps
            gap = max(gap, path.gap)
            yield steps.advance()
    yield _Attributed((total / len(examples)).float(), gradients, gap)
