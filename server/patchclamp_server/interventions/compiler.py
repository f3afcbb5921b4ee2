"""Compiles some spans of a step: the entries of their programs, each at the rows in its scope, grouped into rules.

Which rules exist depends on the (place, kind) combinations in use, never on how many programs use them. Entries are
chosen, sorted and gathered by arrays over all rows; nothing here is done an edit or a program at a time.
"""

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.interventions.captures import CaptureRule
from patchclamp_server.interventions.columns import (
    COLUMN,
    FLAGS,
    GATE,
    GROUP,
    ITEM,
    KIND,
    LATCH,
    STRENGTH,
    EntryFlag,
    EntryKind,
)
from patchclamp_server.interventions.entries import place_of_group
from patchclamp_server.interventions.kinds import RULES
from patchclamp_server.interventions.kinds.latents import LatentRule
from patchclamp_server.interventions.kinds.rankings import RowsRead
from patchclamp_server.interventions.kinds.rules import Entries, Notes, Pairs
from patchclamp_server.interventions.plan import Latents, Part, Ranking
from patchclamp_server.interventions.report import Report
from patchclamp_server.interventions.rows import SpanRows, chosen, moving_rows, steady_rows
from patchclamp_server.interventions.scopes import Int32Array
from patchclamp_server.interventions.setting import Setting
from patchclamp_server.interventions.spans import CaptureSpan, ProgramSpan
from patchclamp_server.model.arrays import BoolArray, IntArray
from patchclamp_server.model.sites import FORWARD_ORDER


def compile_part(setting: Setting, spans: list[ProgramSpan], *, steady: bool, by_kernels: bool) -> Part:
    """`steady`: spans of one token whose scopes are settled. `by_kernels`: only what kernels leave to torch."""
    tables = setting.tables
    own = [span for span in spans if span.state is not None]
    rows = steady_rows(tables, own) if steady else moving_rows(tables, own)
    part = Part(own, rows, Report(rows), by_kernels, steady=steady)
    if own:
        local, entry, inside = chosen(tables.host, rows, behind=by_kernels)
        if len(entry):
            _add_rules(part, setting, local, entry, inside)
    for span in spans:
        for capture in span.captures:
            _add_capture(part, span, capture)
    return part


def _add_rules(part: Part, setting: Setting, local: IntArray, entry: IntArray, inside: BoolArray) -> None:
    host, rows = setting.tables.host, part.rows
    # Pairs come row by row, so that those of an entry keep the order of the rows.
    order = np.lexsort((entry, host.ints[entry, GROUP]))
    local, entry, inside = local[order], entry[order], inside[order]
    ints = host.ints[entry]
    edits = ints[:, KIND] < EntryKind.CONDITION
    if edits.any():
        # In the order of execution.
        part.counter = _tensor(setting, ints[edits, LATCH].astype(np.int64))
        part.counted = _tensor(setting, rows.counted[local[edits]].astype(np.float64))
        part.notes = Notes.of(len(part.counter), setting.device)
    before = np.concatenate(([0], np.cumsum(edits)))
    row = rows.row[local]
    taking = ints[:, FLAGS] & EntryFlag.INPUT != 0
    pairs = Pairs(
        entry,
        row,
        _tensor(setting, row),
        _tensor(setting, host.floats[entry, STRENGTH]),
        _tensor(setting, _targets(part.report, local, ints)),
        ints[:, GATE] >= 0,
        _tensor(setting, inside),
        _tensor(setting, _readings(part.report, local, ints)) if taking.any() else None,
        taking,
    )
    group = ints[:, GROUP]
    starts = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1]))).tolist()
    for start, end in zip(starts, [*starts[1:], len(group)], strict=True):
        place, kind, flags = place_of_group(int(group[start]))
        layer, site = divmod(place, len(FORWARD_ORDER))
        notes = part.notes.part(before[start], before[end]) if part.notes is not None and edits[start] else None
        entries = Entries(pairs, setting, FORWARD_ORDER[site], layer, start, end, notes)
        rule = RULES[kind](entries, flags)
        part.rules.setdefault((FORWARD_ORDER[site], layer), []).append(rule)
        if isinstance(rule, RowsRead):
            asked = _asked(rows, local[start:end], ints[start:end, ITEM])
            part.rankings.append(Ranking(layer, rule, asked))
        elif isinstance(rule, LatentRule):
            own = local[start:end]
            asked_at = zip(rows.owner[own].tolist(), rows.offset[own].tolist(), strict=True)
            part.latents.append(Latents(layer, rule, list(asked_at)))


def _targets(report: Report, local: IntArray, ints: Int32Array) -> IntArray:
    """Where each pair writes or looks: the condition of a gate or abort, or the first number of a reading."""
    kind, gate, column = ints[:, KIND], ints[:, GATE], ints[:, COLUMN]
    # The last one is always open.
    targets = np.full(len(local), len(report.condition_rows) * report.n_columns, dtype=np.int64)
    condition = np.searchsorted(report.condition_rows, local) * report.n_columns
    targets = np.where(gate >= 0, condition + gate, targets)
    targets = np.where(kind == EntryKind.CONDITION, condition + column, targets)
    return np.where(kind > EntryKind.CONDITION, _readings(report, local, ints), targets)


def _readings(report: Report, local: IntArray, ints: Int32Array) -> IntArray:
    """Where the first number of each pair stands among the readings."""
    readings: IntArray = np.searchsorted(report.reading_rows, local) * report.n_readings + ints[:, COLUMN]
    return readings


def _asked(rows: SpanRows, local: IntArray, item: Int32Array) -> list[tuple[int, int, str]]:
    asked = []
    for i, offset, number in zip(rows.owner[local].tolist(), rows.offset[local].tolist(), item.tolist(), strict=True):
        layout = rows.states[i].loaded.layout
        asked.append((i, offset, layout.items_read[number - layout.readout_item(0)].name))
    return asked


def _add_capture(part: Part, span: ProgramSpan, capture: CaptureSpan) -> None:
    """Up to the end of the prompt."""
    n = min(len(span.token_ids), span.prompt_length - span.offset)
    for layer in capture.pool.layers if n > 0 else ():
        rule = CaptureRule(capture.pool, layer, slice(span.row, span.row + n), span.offset)
        part.rules.setdefault((capture.site, layer), []).append(rule)


def _tensor(setting: Setting, array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(setting.device)
