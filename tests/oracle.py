"""The truth: plain transformers with eager attention and naive hooks, no KV cache, one sequence, one row at a time.

Every step runs the whole sequence again, so nothing here can be wrong about caches, batches or chunks; the formulas
are in oracle_formulas.py, the places in oracle_sites.py. `tests/engine` compares the server with it.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle_formulas import (
    Artifacts,
    all_features,
    edited,
    holds,
    in_scope,
    measured,
    probe_values,
    source_row,
    vector_at,
)
from oracle_sites import attach, contributions, logit_lens, neuron_vectors, watching_attention
from torch import Tensor
from transformers import PreTrainedModel

from patchclamp_server.interventions.kinds.features import FeatureEdit, FeatureReadout, TopFeaturesReadout
from patchclamp_server.interventions.kinds.patch import Patch
from patchclamp_server.interventions.program import (
    ActivationReadout,
    Condition,
    Edit,
    HeadEdit,
    HeadReadout,
    LogitLensReadout,
    NeuronEdit,
    NeuronReadout,
    ProbeReadout,
    Program,
    ProjectionReadout,
    Readout,
    ReadoutValue,
    TopNeuronsReadout,
)
from patchclamp_server.model.sites import RESIDUAL_SITES, Site

# edit name -> {position: strength of the tokens from there on}
Strengths = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class EditCount:
    """The receipt of one edit, with the first position at which its gate was open (None: never, or no gate)."""

    name: str
    rows: int
    mean_relative_change: float
    gate_firings: int
    first_open: int | None


@dataclass(frozen=True, eq=False)
class OracleResult:
    """`logits` [n, vocab] are those each generated token was chosen from; `all_logits` [T, vocab] those of the last
    pass, over the prompt and every generated token but the last. Receipts and readouts are of that pass."""

    tokens: tuple[int, ...]
    logits: Tensor
    all_logits: Tensor
    receipts: tuple[EditCount, ...]
    readouts: tuple[ReadoutValue, ...]
    # First position at which an abort condition held, and its name. Nothing is generated from there on.
    aborted_at: int | None
    aborted_by: str | None
    # Smallest distance of an examined projection from its threshold: rounding may decide below about 1e-4.
    condition_margin: float
    # Smallest difference between the two largest logits a token was chosen from.
    token_margin: float


@dataclass
class _Pass:
    """One forward pass over the whole sequence, under the program."""

    model: PreTrainedModel
    program: Program
    tokens: Sequence[int]
    prompt_length: int
    roles: Sequence[str] | None
    strengths: Strengths
    artifacts: Artifacts
    logits: Tensor = field(init=False)
    # What each condition said of each position (False outside its scope), by identity of the condition.
    verdicts: dict[int, list[bool]] = field(default_factory=dict)
    # Relative change of every (edit, layer, position) that was edited, in the order of the forward pass.
    changes: list[tuple[int, float]] = field(default_factory=list)
    readouts: list[tuple[tuple[int, int, int], ReadoutValue]] = field(default_factory=list)
    condition_margin: float = float("inf")
    # States [T, width] that a readout of several layers has seen, by its index and the layer.
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    # Rows [T, width] of every site after its edits.
    after: dict[tuple[Site, int], Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def run(self) -> "_Pass":
        hooks = attach(self.model, self.visit)
        about_heads = [part for part in (*self.program.edits, *self.program.readouts) if concerns_attention(part)]
        watched = watching_attention(self.model, self.queries, self.look) if about_heads else nullcontext()
        try:
            with watched:
                self.logits = self.model(input_ids=torch.tensor([list(self.tokens)]), use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        for index, readout in enumerate(self.program.readouts):
            if isinstance(readout.kind, LogitLensReadout) and readout.site not in RESIDUAL_SITES:
                self.read_contributions(index, readout, readout.kind)
        return self

    def read_contributions(self, index: int, readout: Readout, kind: LogitLensReadout) -> None:
        """Of what is added to the residual stream, once it is known where that ends."""
        assert readout.site is not None
        ends = self.after[Site.RESID_POST, self.model.config.num_hidden_layers - 1]
        for layer in self.layers_of(readout):
            for position, row in enumerate(self.after[readout.site, layer]):
                if not self.scoped(readout.scope, position):
                    continue
                added = [row]
                if kind.neurons:
                    every = neuron_vectors(self.model, layer, row)
                    added = [every[neuron] for neuron in kind.neurons]
                picked = [_picked(kind, contributions(self.model, each, ends[position])) for each in added]
                values = tuple(value for own, _ in picked for value in own)
                ids = tuple(token for _, own in picked for token in own)
                value = ReadoutValue(readout.name or str(index), layer, position, values, ids)
                self.readouts.append(((position, index, layer), value))

    def scoped(self, scope: Any, position: int) -> bool:
        return in_scope(scope, position, self.tokens, self.prompt_length, self.roles)

    def strength(self, edit: Edit, position: int) -> float:
        strength = edit.strength
        for start, value in sorted(self.strengths.get(edit.name, {}).items()):
            if position >= start:
                strength = value
        return strength

    def gate_open(self, edit: Edit, position: int) -> bool:
        if edit.gate is None:
            return True
        verdicts = self.verdicts[id(edit.gate.condition)]
        return any(verdicts[: position + 1]) if edit.gate.latched else verdicts[position]

    def queries(self, layer: int, queries: Tensor) -> Tensor:
        """queries [n_heads, T, head_dim] of a layer after the edits that make attention uniform."""
        rows = queries.transpose(0, 1)
        return self.visit(Site.ATTN_Q, layer, rows.flatten(1)).view(rows.shape).transpose(0, 1)

    def look(self, layer: int, weights: Tensor) -> None:
        """Head readouts of a layer, from its attention matrices [n_heads, T, T]."""
        for index, readout in enumerate(self.program.readouts):
            if not concerns_attention(readout) or layer not in self.layers_of(readout):
                continue
            assert isinstance(readout.kind, HeadReadout)
            heads = readout.kind.heads or range(len(weights))
            for position in range(len(self.tokens)):
                if self.scoped(readout.scope, position):
                    rows = [weights[head, position] for head in heads]
                    ids = tuple(row.tolist().index(float(row.max())) for row in rows)
                    values = tuple(float(row.max()) for row in rows)
                    value = ReadoutValue(readout.name or str(index), layer, position, values, ids)
                    self.readouts.append(((position, index, layer), value))

    def layers_of(self, part: Edit | Readout) -> tuple[int, ...]:
        return layers_of(part, self.model.config.num_hidden_layers, self.artifacts)

    def visit(self, site: Site, layer: int, activation: Tensor) -> Tensor:
        """The activation [..., T, width] after all edits of the program at this site and layer."""
        n_heads = self.model.config.num_attention_heads
        rows = activation.reshape(len(self.tokens), -1).clone()
        for index, edit in enumerate(self.program.edits):
            layers = self.layers_of(edit)
            if (Site.ATTN_Q if concerns_attention(edit) else edit.site) is not site or layer not in layers:
                continue
            for position in range(len(self.tokens)):
                if not (self.scoped(edit.scope, position) and self.gate_open(edit, position)):
                    continue
                source = None
                if isinstance(edit.kind, Patch):
                    source = source_row(edit.kind, layer, position, self.prompt_length, self.artifacts)
                    if source is None:
                        continue
                h = rows[position].double()
                read = source if source is not None else self.read_elsewhere(edit, position)
                new = edited(edit, self.strength(edit, position), h, layers, layer, self.artifacts, n_heads, read)
                self.changes.append((index, float((new - h).norm() / h.norm())))
                rows[position] = new.float()
        self.after[site, layer] = rows.clone()
        for condition in conditions_of(self.program):
            if place_of(condition, self.artifacts) == (site, layer):
                self.verdicts[id(condition)] = [
                    self.examine(condition, rows[position].double(), position) for position in range(len(self.tokens))
                ]
        for index, readout in enumerate(self.program.readouts):
            if isinstance(readout.kind, ProbeReadout):
                self.read_probe(index, readout, readout.kind, site, layer, rows)
            elif isinstance(readout.kind, LogitLensReadout) and site not in RESIDUAL_SITES:
                continue
            elif readout.site is site and layer in self.layers_of(readout) and not concerns_attention(readout):
                self.read(index, readout, layer, rows)
        return rows.view(activation.shape)

    def read_elsewhere(self, edit: Edit, position: int) -> Tensor | None:
        """The row that a transcoder reads, after the edits of its site."""
        if isinstance(edit.kind, FeatureEdit):
            info = self.artifacts[edit.kind.autoencoder].info
            if "output_site" in info.provenance:
                return self.after[info.site, int(info.provenance["layer"])][position].double()
        return None

    def examine(self, condition: Condition, h: Tensor, position: int) -> bool:
        if not self.scoped(condition.scope, position):
            return False
        value = measured(condition, h, self.artifacts)
        self.condition_margin = min(self.condition_margin, abs(value - condition.threshold))
        return holds(condition, value)

    def read_probe(
        self, index: int, readout: Readout, kind: ProbeReadout, site: Site, layer: int, rows: Tensor
    ) -> None:
        """At the last of its layers, of the states at all of them."""
        artifact = self.artifacts[kind.probe]
        layers = artifact.info.layers
        if site.value != artifact.info.provenance["site"] or layer not in layers:
            return
        self.kept[index, layer] = rows.clone()
        if layer != max(layers):
            return
        for position in range(len(self.tokens)):
            if self.scoped(readout.scope, position):
                states = {each: self.kept[index, each][position] for each in layers}
                found = probe_values(artifact, states, all_classes=kind.all_classes)
                value = ReadoutValue(readout.name or str(index), layer, position, tuple(found))
                self.readouts.append(((position, index, layer), value))

    def read(self, index: int, readout: Readout, layer: int, rows: Tensor) -> None:
        layers = self.layers_of(readout)
        name = readout.name or str(index)
        for position in range(len(self.tokens)):
            if not self.scoped(readout.scope, position):
                continue
            h, ids = rows[position], torch.tensor([], dtype=torch.long)
            if isinstance(readout.kind, ProjectionReadout):
                vectors = [vector_at(v, layers, layer, self.artifacts) for v in readout.kind.vectors]
                values = torch.stack([h.double() @ v / v.norm() for v in vectors])
            elif isinstance(readout.kind, NeuronReadout):
                ids = torch.tensor(readout.kind.neurons)
                values = h[ids]
            elif isinstance(readout.kind, ActivationReadout):
                ids = torch.tensor(readout.kind.units, dtype=torch.long)
                values = h[ids] if readout.kind.units else h
            elif isinstance(readout.kind, FeatureReadout):
                ids = torch.tensor(readout.kind.features)
                values = all_features(self.artifacts[readout.kind.autoencoder], h)[ids]
            elif isinstance(readout.kind, TopFeaturesReadout):
                values, ids = all_features(self.artifacts[readout.kind.autoencoder], h).sort(descending=True)
                n = min(readout.kind.k, int((values > 0).sum()))
                values, ids = values[:n], ids[:n]
            elif isinstance(readout.kind, TopNeuronsReadout):
                ids = h.abs().sort(descending=True).indices[: readout.kind.k]
                values = h[ids]
            else:
                assert isinstance(readout.kind, LogitLensReadout)
                picked = _picked(readout.kind, logit_lens(self.model, h))
                values, ids = torch.tensor(picked[0]), torch.tensor(picked[1])
            value = ReadoutValue(name, layer, position, tuple(values.tolist()), tuple(ids.tolist()))
            self.readouts.append(((position, index, layer), value))


def _picked(kind: LogitLensReadout, by_token: Tensor) -> tuple[list[float], list[int]]:
    ids = torch.tensor(kind.token_ids) if kind.token_ids else by_token.sort(descending=True).indices[: kind.k]
    return by_token[ids].tolist(), ids.tolist()


def concerns_attention(part: Edit | Readout) -> bool:
    """Whether the part is about what attention does, and not about its output."""
    return isinstance(part.kind, HeadReadout) or (isinstance(part.kind, HeadEdit) and part.kind.uniform)


def layers_of(part: Edit | Readout, n_layers: int, artifacts: Artifacts) -> tuple[int, ...]:
    if part.all_layers:
        return tuple(range(n_layers))
    if not part.layers and isinstance(part.kind, NeuronEdit) and part.kind.neuron_set is not None:
        return tuple(artifacts[part.kind.neuron_set].info.layers)
    return part.layers


def place_of(condition: Condition, artifacts: Artifacts) -> tuple[Site | None, int]:
    """Where a condition looks: a probe has its own place."""
    if not condition.probe:
        return condition.site, condition.layer
    info = artifacts[condition.probe].info
    return Site(info.provenance["site"]), max(info.layers)


def conditions_of(program: Program) -> list[Condition]:
    gates = [edit.gate.condition for edit in program.edits if edit.gate is not None]
    return gates + [abort.condition for abort in program.abort_when]


def run_oracle(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    program: Program | None,
    max_new_tokens: int,
    roles: Sequence[str] | None = None,
    strengths_by_position: Strengths | None = None,
    artifacts: Artifacts | None = None,
) -> OracleResult:
    """Greedy generation of `max_new_tokens` tokens under a program; it never stops at an end-of-sequence token."""
    tokens = list(prompt_ids)
    chosen_from: list[Tensor] = []
    while True:
        done = _Pass(
            model, program or Program(), tokens, len(prompt_ids), roles, strengths_by_position or {}, artifacts or {}
        ).run()
        aborted_at, aborted_by = _first_abort(done)
        if aborted_at is None and len(chosen_from) < max_new_tokens:
            chosen_from.append(done.logits[-1])
        if aborted_at is not None or len(chosen_from) == max_new_tokens:
            break
        tokens.append(int(done.logits[-1].argmax()))
    logits = torch.stack(chosen_from) if chosen_from else torch.empty(0, done.logits.shape[-1])
    generated = tuple(int(row.argmax()) for row in logits)
    top = logits.topk(2).values
    return OracleResult(
        tokens=generated,
        logits=logits,
        all_logits=done.logits,
        receipts=tuple(_receipt(done, index) for index in range(len(done.program.edits))),
        readouts=tuple(value for _, value in sorted(done.readouts, key=lambda pair: pair[0])),
        aborted_at=aborted_at,
        aborted_by=aborted_by,
        condition_margin=done.condition_margin,
        token_margin=float((top[:, 0] - top[:, 1]).min()) if len(top) else float("inf"),
    )


def oracle_logits(
    model: PreTrainedModel,
    tokens: Sequence[int],
    program: Program | None,
    prompt_length: int | None = None,
    roles: Sequence[str] | None = None,
    artifacts: Artifacts | None = None,
) -> Tensor:
    """Logits [T, vocab] of given tokens; those from `prompt_length` (default: none) on count as generated."""
    length = len(tokens) if prompt_length is None else prompt_length
    return _Pass(model, program or Program(), tokens, length, roles, {}, artifacts or {}).run().logits


@torch.no_grad()
def oracle_latents(
    model: PreTrainedModel,
    tokens: Sequence[int],
    program: Program | None,
    prompt_length: int,
    artifacts: Artifacts | None = None,
) -> Tensor:
    """Log-probabilities [n_layers, T, vocab] that final norm and unembedding read at the end of each block, after its
    edits."""
    done = _Pass(model, program or Program(), tokens, prompt_length, None, {}, artifacts or {}).run()
    rows = [done.after[Site.RESID_POST, layer] for layer in range(model.config.num_hidden_layers)]
    return torch.stack([torch.stack([logit_lens(model, h) for h in layer]) for layer in rows])


def _first_abort(done: _Pass) -> tuple[int | None, str | None]:
    fired = [
        (done.verdicts[id(abort.condition)].index(True), order, abort.name)
        for order, abort in enumerate(done.program.abort_when)
        if any(done.verdicts[id(abort.condition)])
    ]
    if not fired:
        return None, None
    position, _, name = min(fired)
    return position, name


def _receipt(done: _Pass, index: int) -> EditCount:
    edit = done.program.edits[index]
    changes = [change for edit_index, change in done.changes if edit_index == index]
    open_at = []
    if edit.gate is not None:
        open_at = [position for position in range(len(done.tokens)) if done.gate_open(edit, position)]
    return EditCount(
        name=edit.name,
        rows=len(changes),
        mean_relative_change=sum(changes) / len(changes) if changes else 0.0,
        # Tokens of the edit's scope at which its gate was open, at each of its layers.
        gate_firings=len(changes) if edit.gate is not None else 0,
        first_open=open_at[0] if open_at else None,
    )
