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
from patchclamp_server.interventions.kinds.rules import CompiledEdit, CompiledRead, Rule, StepContext
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
    # Each pair of an edit and a row has a row of Tables.counts and 0 or 1 here, in the order of execution.
    counter: Tensor | None = None
    counted: Tensor | None = None
    # It serves more than one step.
    steady: bool = False
    # This belongs to the step that is running.
    context: StepContext | None = None
    # |h| and |delta| of the pairs of edits, where all edits can be compiled: compiled visits note the first.
    _norms: Tensor | None = None
    _delta_norms: Tensor | None = None
    # What compiled visits have the addresses of; None at places where they cannot do what rules do.
    _calls: dict[Place, list[Read] | None] = field(default_factory=dict)
    _readings: Tensor | None = None
    _opened: Tensor | None = None

    def _all_closed(self, device: torch.device) -> Tensor:
        report = self.report
        if self._opened is None:
            self._opened = torch.ones(len(report.condition_rows) * report.n_columns + 1, device=device)
        self._opened[:-1] = 0.0
        return self._opened

    def readings(self, device: torch.device) -> Tensor:
        """The numbers that each step reads anew, at one place in memory."""
        if self._readings is None:
            self._readings = torch.empty(len(self.report.reading_rows) * self.report.n_readings, device=device)
        return self._readings

    def begin(self, positions: Tensor, tables: Tables) -> None:
        readings = self.readings(positions.device).zero_()
        self.context = StepContext(positions, tables.latch, self._all_closed(positions.device), readings, [], [], [])

    def calls(self, place: Place, device: torch.device) -> list[Read] | None:
        """Returns compiled calls that do what the rules of a place do; None where there is a rule without them."""
        if place not in self._calls:
            if not self._calls:
                self._keep_norms()
            found: list[Read] | None = []
            for rule in self.rules.get(place, []):
                if found is not None and isinstance(rule, CompiledRead):
                    found += rule.reads(self.readings(device))
                elif found is not None and isinstance(rule, CompiledEdit) and rule.norms is not None:
                    found.append(rule.write(rule.norms))
                else:
                    found = None
            self._calls[place] = found
        return self._calls[place]

    def _keep_norms(self) -> None:
        """Gives edits a place of their own for |h|, in the order of execution, if every one can be compiled."""
        rules = [rule for own in self.rules.values() for rule in own]
        edits = [rule for rule in rules if isinstance(rule, CompiledEdit) and rule.entries.gate is None]
        if not edits or len(edits) + sum(isinstance(rule, CompiledRead) for rule in rules) < len(rules):
            return
        self._delta_norms = torch.cat([rule.delta_norms for rule in edits])
        self._norms = torch.ones_like(self._delta_norms)
        sizes = [len(rule.entries) for rule in edits]
        for rule, own in zip(edits, torch.split(self._norms, sizes), strict=True):
            rule.norms = own

    def finish(self, tables: Tables, outcome: StepOutcome, end: Tensor) -> None:
        """Adds the step to the receipts, and copies what was read to the host. `end` [T, d_model] is the residual
        stream after the last block."""
        context, report, spans = self.context, self.report, self.spans
        assert context is not None
        if self.counter is not None and self.counted is not None:
            if self._norms is not None and self._delta_norms is not None:
                norms, deltas, opened = self._norms, self._delta_norms, self.counted
            else:
                norms, deltas = torch.cat(context.norms), torch.cat(context.delta_norms)
                opened = torch.cat(context.gates).double() * self.counted
            change = deltas.double() / norms.double().clamp_min(torch.finfo(torch.float32).tiny)
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
            # Gates and ups are parts of one array.
            if place[0] in PREACTIVATION_SITES:
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
