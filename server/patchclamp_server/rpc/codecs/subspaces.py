"""Turns the messages of FindSubspace into the job of analysis/subspaces and back. Refusals name fields."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from patchclamp.v1 import steering_pb2 as pb
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.subspaces.circular_plane import MIN_VALUES
from patchclamp_server.analysis.subspaces.interchange import Pair
from patchclamp_server.analysis.subspaces.job import (
    AlignmentSearch,
    FoundSubspace,
    PlaneSearch,
    ScopedPrompt,
    SubspaceSearch,
)
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import chosen, count, distinct, required
from patchclamp_server.interventions.program import Scope, TokenSelector
from patchclamp_server.interventions.scopes import SequenceTokens, check_scope, scope_mask
from patchclamp_server.model.arrays import BoolArray
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.artifact import decode_label, encode_artifact
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.program import decode_scope, decode_site
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.rpc.codecs.training import decode_training
from patchclamp_server.text.prompt import EncodedPrompt, PromptEncoder

MAX_PAIRS, MAX_VALUES, MAX_PROMPTS = 4096, 1000, 4096
MAX_COMPONENTS, DEFAULT_COMPONENTS = 32, 5
MAX_RANK = 256
DEFAULT_HOLDOUT_FRACTION = 0.25
_LAST_TOKEN = Scope((TokenSelector(last_k=1),))


def decode_subspace_search(request: pb.FindSubspaceRequest, prompts: PromptEncoder, info: ModelInfo) -> SubspaceSearch:
    """Returns a checked job. Tokenises every prompt: call it in a thread."""
    method = chosen(request, "method", "")
    site = decode_site(request.site, "site") if request.site else Site.RESID_POST
    if site not in info.sites:
        accepted = ", ".join(each.value for each in info.sites)
        raise InvalidArgument("site", f"{info.architecture} has no {site.value}; it has {accepted}")
    for i, layer in enumerate(request.layers):
        count(layer, f"layers[{i}]", high=info.n_layers - 1)
    layers = tuple(sorted(distinct(request.layers, "layers"))) or tuple(range(info.n_layers))
    scoped = _Scoped(request, prompts, info)
    search: PlaneSearch | AlignmentSearch
    if method == "circular_plane":
        search = _plane(request.circular_plane, scoped)
    else:
        search = _alignment(request.distributed_alignment, scoped, info.sites[site])
    description, tags = decode_label(request)
    return SubspaceSearch(search, site, layers, request.seed, description, tags)


def encode_subspace(event: Progress | FoundSubspace) -> pb.FindSubspaceResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.FindSubspaceResponse)
    found = pb.FoundSubspace(
        artifact=encode_artifact(event.artifact),
        layers=[pb.SubspaceEvidence(**asdict(each)) for each in event.layers],
        best_layer=event.best_layer,
        warnings=event.warnings,
    )
    return pb.FindSubspaceResponse(result=found)


class _Scoped:
    """Encodes prompts, and finds their tokens in the scope of a request."""

    def __init__(self, request: pb.FindSubspaceRequest, prompts: PromptEncoder, info: ModelInfo) -> None:
        self.prompts, self._info = prompts, info
        self._scope = decode_scope(request.scope, "scope") if request.HasField("scope") else _LAST_TOKEN

    def prompt(self, proto: "pb.CyclicValue | pb.InterchangePair", name: str, field: str) -> ScopedPrompt:
        required(proto, name, field)
        return self.encoded(decode_prompt(getattr(proto, name), self.prompts, f"{field}.{name}"), f"{field}.{name}")

    def encoded(self, prompt: EncodedPrompt, field: str) -> ScopedPrompt:
        check_scope(self._scope, "scope", vocab_size=self._info.vocab_size, has_roles=prompt.roles is not None)
        ids = np.array(prompt.ids)
        sequence = SequenceTokens(len(ids), prompt.roles)
        mask: BoolArray = scope_mask(self._scope, sequence, np.arange(len(ids)), ids)
        if not mask.any():
            raise InvalidArgument(field, "has no token in scope")
        return ScopedPrompt(prompt.ids, mask)


def _plane(proto: pb.CircularPlane, scoped: _Scoped) -> PlaneSearch:
    field = "circular_plane.values"
    if not MIN_VALUES <= len(proto.values) <= MAX_VALUES:
        raise InvalidArgument(
            field, f"expected {MIN_VALUES} to {MAX_VALUES} values of a cycle, got {len(proto.values)}"
        )
    names = distinct([each.value for each in proto.values], field)
    total = sum(len(each.prompts) for each in proto.values)
    if total > MAX_PROMPTS:
        raise InvalidArgument(field, f"expected at most {MAX_PROMPTS} prompts, got {total}")
    prompts = []
    for i, each in enumerate(proto.values):
        if not each.value:
            raise InvalidArgument(f"{field}[{i}].value", "expected a name")
        if not each.prompts:
            raise InvalidArgument(f"{field}[{i}].prompts", "expected at least one prompt")
        own = []
        for j, prompt in enumerate(each.prompts):
            path = f"{field}[{i}].prompts[{j}]"
            own.append(scoped.encoded(decode_prompt(prompt, scoped.prompts, path), path))
        prompts.append(tuple(own))
    components = count(proto.components, "circular_plane.components", high=MAX_COMPONENTS) or DEFAULT_COMPONENTS
    if components < 2:
        raise InvalidArgument("circular_plane.components", "expected at least 2: a plane has two axes")
    return PlaneSearch(tuple(names), tuple(prompts), components)


def _alignment(proto: pb.DistributedAlignment, scoped: _Scoped, width: int) -> AlignmentSearch:
    field = "distributed_alignment"
    fraction = proto.holdout_fraction if proto.HasField("holdout_fraction") else DEFAULT_HOLDOUT_FRACTION
    if not 0 < fraction < 1:
        message = f"expected a number between 0 and 1, both excluded, got {fraction:g}"
        raise InvalidArgument(f"{field}.holdout_fraction", message)
    rank = count(proto.rank, f"{field}.rank", high=min(MAX_RANK, width)) or 1
    training = decode_training(proto.training, f"{field}.training")
    kept = _pairs(proto.kept, scoped, f"{field}.kept", low=0)
    pairs = _pairs(proto.pairs, scoped, f"{field}.pairs", low=2)
    return AlignmentSearch(pairs, kept, rank, training, fraction)


def _pairs(pairs: Sequence[pb.InterchangePair], scoped: _Scoped, field: str, *, low: int) -> tuple[Pair, ...]:
    """One pair is held out, and one at least trained on: of no pairs there are none, and of some at least two."""
    if not low <= len(pairs) <= MAX_PAIRS or len(pairs) == 1:
        raise InvalidArgument(field, f"expected 2 to {MAX_PAIRS} pairs, got {len(pairs)}")
    found = []
    for i, each in enumerate(pairs):
        path = f"{field}[{i}]"
        base, source = (scoped.prompt(each, name, path) for name in ("base", "source"))
        answer = scoped.prompts.encode_continuation(each.answer, f"{path}.answer", base.ids)
        if not answer:
            raise InvalidArgument(f"{path}.answer", "is empty; at least one token is expected")
        if base.chosen.sum() != source.chosen.sum():
            message = f"has {source.chosen.sum()} tokens in scope, the base has {base.chosen.sum()}: they are exchanged"
            raise InvalidArgument(f"{path}.source", message)
        found.append(Pair(base.ids, source.ids, tuple(answer), base.chosen, source.chosen, path))
    return tuple(found)
