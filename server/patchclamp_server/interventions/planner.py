"""The plan of each step: what is settled is kept from step to step, what moves is compiled anew.

A span is *steady* when the next token of its sequence finds the same entries: it is one generated token, all scopes are
settled, and nothing is captured. Readouts, aborts and watches do not make it less so, since their positions come from
the step. The steady spans of a step are one part of its plan, and the others, such as chunks of prompts and scopes
that look at the token, are another one.
"""

from patchclamp_server.interventions.compiler import compile_part
from patchclamp_server.interventions.plan import Part, StepPlan
from patchclamp_server.interventions.setting import Setting
from patchclamp_server.interventions.spans import ProgramSpan


class Planner:
    """Keeps the steady part as long as the same programs are at the same rows. `compilations` grows by one for every
    span that is compiled."""

    def __init__(self, setting: Setting, *, by_kernels: bool = False) -> None:
        self.compilations = 0
        self._setting = setting
        self._by_kernels = by_kernels
        # Of each steady span its row, sequence and version.
        self._key: list[int] = []
        self._steady: Part | None = None
        self._plan = StepPlan((), setting.tables)

    def plan(self, spans: list[ProgramSpan]) -> StepPlan:
        """`spans`: those of the step that have a program or captures. The same plan as before where all is steady."""
        steady, moving, key = [], [], list[int]()
        for span in spans:
            state = span.state
            if (
                state is not None
                and span.offset >= state.steady_from
                and span.offset >= state.counted
                and len(span.token_ids) == 1
                and not span.captures
            ):
                steady.append(span)
                key += (span.row, state.uid, state.version)
            else:
                moving.append(span)
        kept = key == self._key
        if not kept:
            self._key = key
            self._steady = self._compiled(steady, steady=True) if steady else None
        if self._steady is not None:
            self._steady.spans = steady
        if moving or not kept or len(self._plan.parts) > (self._steady is not None):
            parts = [] if self._steady is None else [self._steady]
            if moving:
                parts.append(self._compiled(moving, steady=False))
            self._plan = StepPlan(parts, self._setting.tables)
        return self._plan

    def _compiled(self, spans: list[ProgramSpan], *, steady: bool) -> Part:
        self.compilations += len(spans)
        return compile_part(self._setting, spans, steady=steady, by_kernels=self._by_kernels)
