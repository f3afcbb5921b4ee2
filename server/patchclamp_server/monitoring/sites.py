"""The hooks of a watched step: at each place the operators of its programs, and after them what the watches look at."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from patchclamp_server.interventions.plan import Place, StepPlan
from patchclamp_server.interventions.program import Site
from patchclamp_server.monitoring.layout import Layout

if TYPE_CHECKING:
    # Its kernels need Triton, which takes a second to import where none runs.
    from patchclamp_server.model.kernel_forward import Programs


class WatchedSites:
    """Implements the decoder's SiteHooks. `plan` None: there are no programs to be run by operators."""

    def __init__(self, plan: StepPlan | None, layout: Layout) -> None:
        self.plan, self.layout = plan, layout
        operators = {} if plan is None else plan.operators
        # One look-up a place: a decode step visits 200.
        self._visited: dict[Place, Sequence[Any]] = dict(operators)
        for place, look in layout.looks.items():
            self._visited[place] = [*operators.get(place, ()), look]

    def between(self, programs: "Programs") -> "Programs":
        """Programs of kernels that are looked at in the same way: no launch runs past a place of the watches.

        A row keeps its bits, but in a dtype narrower than float32 one that is edited on both sides of a place, as at
        resid_post and at the resid_pre of the next layer, is rounded between them.
        """
        return replace(programs, observers=self, breaks=programs.breaks | self.layout.breaks)

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        operators = self._visited.get((site, layer))
        if operators:
            context = None if self.plan is None else self.plan.context
            for operator in operators:
                operator.run(x, context)


class SiteWatcher:
    """Keeps the last hooks: decode steps have the same plan and layout again and again."""

    def __init__(self) -> None:
        self._last: WatchedSites | None = None

    def follow(self, plan: StepPlan | None, layout: Layout) -> WatchedSites:
        last = self._last
        if last is None or last.plan is not plan or last.layout is not layout:
            self._last = last = WatchedSites(plan, layout)
        return last
