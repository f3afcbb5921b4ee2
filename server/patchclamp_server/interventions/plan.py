"""The compiled programs of one step: rules at sites, which the decoder runs as it passes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from patchclamp_server.cpu.invariant.reads import Call, Read
from patchclamp_server.interventions.captures import CaptureRule
from patchclamp_server.interventions.kinds.latents import LatentRule
from patchclamp_server.interventions.kinds.rankings import RowsRead
from patchclamp_server.interventions.kinds.rules import CompiledEdit, CompiledRead, Notes, Rule, StepContext
from patchclamp_server.interventions.program import ReadoutValue
from patchclamp_server.interventions.report import Report
from patchclamp_server.interventions.rows import SpanRows
from patchclamp_server.interventions.spans import Place, ProgramSpan, StepOutcome
from patchclamp_server.interventions.tables import Tables
from patchclamp_server.model.compiled.job import CompiledVisits
from patchclamp_server.model.sites import PREACTIVATION_SITES, Site


@dataclass(frozen=True, eq=False)
class Ranking:
    """Says who asked for each pair of a rule that reads whole rows: span, offset in it and name of the readout."""

    layer: int
    rule: RowsRead
    asked: list[tuple[int, int, str]]


@dataclass(frozen=True, eq=False)
class Latents:
    """Says whose rows a rule reads: span and offset in it."""

    layer: int
    rule: LatentRule
    asked: list[tuple[int, int]]


@dataclass(eq=False)
class Part:
    """The compiled form of some spans of a step. `rules` are what torch runs of them, at their places.

    With `by_kernels`, kernels run the rest, and write its conditions and readings.
    """

    spans: list[ProgramSpan]
    rows: SpanRows
    report: Report
    by_kernels: bool
    rules: dict[Place, list[Rule]] = field(default_factory=dict)
    rankings: list[Ranking] = field(default_factory=list)
    latents: list[Latents] = field(default_factory=list)
    # Each pair of an edit and a row has a row of Tables.counts, 0 or 1, and notes here, in the order of execution.
    counter: Tensor | None = None
    counted: Tensor | None = None
    notes: Notes | None = None
    # It serves more than one step.
    steady: bool = False
    # This belongs to the step that is running.
    context: StepContext | None = None
    # What compiled visits have the addresses of; None at places where they cannot do what rules do.
    _calls: dict[Place, list[Read] | None] = field(default_factory=dict)
    _readings: Tensor | None = None
    _opened: Tensor | None = None

    def opened(self, device: torch.device) -> Tensor:
        """The conditions that each step asks anew, at one place in memory."""
        report = self.report
        if self._opened is None:
            self._opened = torch.ones(len(report.condition_rows) * report.n_columns + 1, device=device)
        return self._opened

    def readings(self, device: torch.device) -> Tensor:
        """The numbers that each step reads anew, at one place in memory."""
        if self._readings is None:
            self._readings = torch.empty(len(self.report.reading_rows) * self.report.n_readings, device=device)
        return self._readings

    def begin(self, positions: Tensor, tables: Tables) -> None:
        opened, readings = self.opened(positions.device), self.readings(positions.device).zero_()
        opened[:-1] = 0.0
        self.context = StepContext(positions, tables.latch, opened, readings)

    def calls(self, place: Place, device: torch.device) -> list[Read] | None:
        """Returns compiled calls that do what the rules of a place do; None where there is a rule without them."""
        if place not in self._calls:
            found: list[Read] = []
            for rule in self.rules.get(place, []):
                calls = self._calls_of(rule, device)
                if calls is None:
                    self._calls[place] = None
                    return None
                found += calls
            self._calls[place] = found
        return self._calls[place]

    def _calls_of(self, rule: Rule, device: torch.device) -> list[Read] | None:
        if isinstance(rule, CompiledRead):
            return rule.reads(self.readings(device))
        write = rule.write(self.opened(device)) if isinstance(rule, CompiledEdit) else None
        return None if write is None else [write]

    def finish(self, tables: Tables, outcome: StepOutcome, end: Tensor) -> None:
        """Adds the step to the receipts, and copies what was read to the host. `end` [T, d_model] is the residual
        stream after the last block."""
        context, report, spans = self.context, self.report, self.spans
        assert context is not None
        if self.counter is not None and self.counted is not None and self.notes is not None:
            notes = self.notes
            opened = notes.gates.double() * self.counted
            change = notes.delta_norms.double() / notes.norms.double().clamp_min(torch.finfo(torch.float32).tiny)
            tables.counts.index_add_(0, self.counter, torch.stack((opened, opened * change), dim=1))
        if not self.by_kernels and report.asks_conditions:
            held = context.opened[:-1].view(-1, report.n_columns).cpu().numpy()
            report.own_aborts(outcome, spans, held)
        if not self.by_kernels and report.asks_readings:
            report.own_readings(outcome, spans, context.readings.view(-1, report.n_readings).cpu().numpy())
        for ranking in self.rankings:
            for (i, offset, name), (values, ids) in zip(ranking.asked, ranking.rule.found(end), strict=True):
                span = spans[i]
                assert span.state is not None
                value = ReadoutValue(name, ranking.layer, span.offset + offset, values, ids)
                outcome.readouts.append((span.state.uid, value))
        for latents in self.latents:
            asked = [(spans[i], offset) for i, offset in latents.asked]
            owners = [(span.state.uid, span.offset + offset) for span, offset in asked if span.state is not None]
            outcome.latents.append(latents.rule.rows(latents.layer, owners))


class StepPlan:
    """The parts of one step; implements the decoder's SiteHooks. Decode steps keep it, with what it has cached."""

    def __init__(self, parts: Sequence[Part], tables: Tables) -> None:
        self.parts = parts
        self.tables = tables

    @cached_property
    def operators(self) -> frozenset[Place]:
        """Returns the places at which anything runs."""
        return frozenset(place for part in self.parts for place in part.rules)

    @property
    def visited(self) -> frozenset[Place]:
        return self.operators

    @cached_property
    def compiled_visits(self) -> CompiledVisits | None:
        """Returns the visits that need no Python, of a plan that serves more than one step."""
        if not self.parts or not all(part.steady for part in self.parts):
            return None
        device = self.tables.device
        calls: dict[Place, tuple[Call, ...]] = {}
        for place in self.operators:
            # Gates and ups are parts of one array, and so are queries with keys and values.
            if place[0] in (*PREACTIVATION_SITES, Site.ATTN_Q):
                continue
            own = [part.calls(place, device) for part in self.parts]
            if None not in own:
                calls[place] = tuple(each.call for part in own for each in part or ())
        return CompiledVisits(calls) if calls else None

    @cached_property
    def edited_queries(self) -> frozenset[int]:
        """Returns the layers whose queries are edited."""
        return frozenset(layer for site, layer in self.operators if site is Site.ATTN_Q)

    @cached_property
    def visited_preactivations(self) -> dict[Place, bool]:
        """Returns the gates and ups at which anything runs: with False where rows are captured and that is all."""
        found: dict[Place, bool] = {}
        for part in self.parts:
            for place, rules in part.rules.items():
                if place[0] in PREACTIVATION_SITES:
                    found[place] = found.get(place, False) or not all(isinstance(rule, CaptureRule) for rule in rules)
        return found

    def begin(self, positions: Tensor) -> None:
        for part in self.parts:
            part.begin(positions, self.tables)

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        place = (site, layer)
        for part in self.parts:
            rules = part.rules.get(place)
            if rules is not None:
                assert part.context is not None
                for rule in rules:
                    rule.run(x, part.context)

    def finish(self, end: Tensor) -> StepOutcome:
        outcome = StepOutcome()
        for part in self.parts:
            part.finish(self.tables, outcome, end)
        return outcome
