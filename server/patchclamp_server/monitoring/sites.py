"""The hooks of a watched step run the operators of its programs at each place, and then the looks of the watches."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from patchclamp_server.cpu.invariant.reads import Call
from patchclamp_server.interventions.plan import StepPlan
from patchclamp_server.interventions.spans import Place
from patchclamp_server.model.compiled.job import CompiledVisits
from patchclamp_server.model.sites import FORWARD_ORDER, PREACTIVATION_SITES, Site
from patchclamp_server.monitoring.layout import Layout

if TYPE_CHECKING:
    # Its kernels need Triton, which takes a second to import even where no kernel runs.
    from patchclamp_server.model.kernel_forward import Programs

Visit = Callable[[Site, int, Tensor], None]


class WatchedSites:
    """Implements the decoder's SiteHooks. With `plan` None no programs are run by operators."""

    def __init__(self, plan: StepPlan | None, layout: Layout) -> None:
        self.plan, self.layout = plan, layout
        # The gates and ups that are edited or looked at.
        self.visited_preactivations = layout.visited_preactivations
        if plan is not None:
            self.visited_preactivations = plan.visited_preactivations | layout.visited_preactivations
        self.visited = frozenset(layout.places)
        if plan is not None:
            self.visited |= plan.operators
        # With the looks of watches, and without.
        self._compiled: dict[bool, CompiledVisits | None] = {}
        self.visit = _visit(plan.visit if plan is not None and plan.operators else None, layout)

    @property
    def compiled_visits(self) -> CompiledVisits | None:
        """Returns the visits of this step that need no Python: looks at places where programs run nothing else."""
        looks = self.layout.looks.compiled
        key = looks is not None
        if key not in self._compiled:
            self._compiled[key] = self._calls(looks)
        return self._compiled[key]

    def _calls(self, looks: tuple[int, int] | None) -> CompiledVisits | None:
        read = None if self.plan is None else self.plan.compiled_visits
        operators = frozenset() if self.plan is None else self.plan.operators
        by_programs = {} if read is None else read.calls
        calls: dict[Place, tuple[Call, ...]] = {}
        for place, number in self.layout.places.items():
            # Gates and ups are parts of one array.
            if looks is None or place[0] in PREACTIVATION_SITES or (place in operators and place not in by_programs):
                continue
            calls[place] = *by_programs.get(place, ()), (looks[0], number, looks[1])
        calls |= {place: own for place, own in by_programs.items() if place not in self.layout.places}
        return CompiledVisits(calls) if calls else None

    def between(self, programs: "Programs") -> "Programs":
        """Returns programs of kernels that are watched in the same way: no launch runs past a place of the watches.

        A row keeps its bits, but in a dtype narrower than float32 one that is edited on both sides of a place, as at
        resid_post and at the resid_pre of the next layer, is rounded between them.
        """
        return replace(programs, observers=self, breaks=programs.breaks | self.layout.breaks)


def _visit(edit: Visit | None, layout: Layout) -> Visit:
    """A decode step visits 200 places, between which the caches are emptied: a closure finds more than a method."""
    looks = layout.looks
    numbers: dict[Site, list[int | None]] = {site: [None] * layout.n_layers for site in FORWARD_ORDER}
    for (site, layer), number in layout.places.items():
        numbers[site][layer] = number

    def visit(site: Site, layer: int, x: Tensor) -> None:
        if edit is not None:
            edit(site, layer, x)
        number = numbers[site][layer]
        if number is not None:
            looks.look(number, x)

    return visit


class SiteWatcher:
    """Keeps the last hooks, because decode steps have the same plan and layout again and again."""

    def __init__(self) -> None:
        self._last: WatchedSites | None = None

    def follow(self, plan: StepPlan | None, layout: Layout) -> WatchedSites:
        last = self._last
        if last is None or last.plan is not plan or last.layout is not layout:
            self._last = last = WatchedSites(plan, layout)
        return last
