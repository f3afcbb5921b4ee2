"""The plan of each step, made anew only when something has changed."""

from patchclamp_server.interventions.compiler import Compiler, Setting
from patchclamp_server.interventions.plan import ProgramSpan, StepPlan


class Planner:
    """Keeps the last plan: a decode step whose programs and rows are those of the step before runs it as it is."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        # For each program its first row, sequence and version.
        self._key: tuple[tuple[int, int, int], ...] | None = None
        self._plan: StepPlan | None = None

    def plan(self, spans: list[ProgramSpan]) -> StepPlan:
        """`spans`: those of the step that have a program or a capture."""
        key = None
        if all(span.reusable for span in spans):
            key = tuple((s.row, s.state.uid, s.state.version) for s in spans if s.state is not None)
            if key == self._key and self._plan is not None:
                return self._plan
        plan = Compiler(self._setting, spans).compile()
        self._key, self._plan = key, plan
        return plan
