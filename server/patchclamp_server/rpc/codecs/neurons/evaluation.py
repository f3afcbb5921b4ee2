"""Messages of EvaluateNeuronEdit ↔ analysis/neurons/evaluation.py."""

import random
from collections.abc import Sequence
from dataclasses import asdict

from patchclamp.v1 import neuron_pb2 as pb
from patchclamp_server.analysis.neurons.edit_tests import (
    Fact,
    FactsTest,
    GenerationTest,
    Ids,
    Metric,
    Probe,
    Test,
    TextsTest,
)
from patchclamp_server.analysis.neurons.edits import NeuronEditMode
from patchclamp_server.analysis.neurons.evaluation import DEFAULT_FRACTIONS, EditEffect, EditPoint, Evaluation
from patchclamp_server.analysis.ordinary_text import MAX_WINDOWS, windows
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import InvalidArgument, about, fields_as
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.field_checks import chosen, count, distinct, finite, known, required
from patchclamp_server.interventions.program import (
    Phase,
    Program,
    ProjectionReadout,
    Readout,
    Scope,
    StoredThreshold,
    TokenSelector,
    Vector,
)
from patchclamp_server.interventions.resolver import Resolver
from patchclamp_server.interventions.scopes import check_scope
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.neurons.common import decode_selection, encode_neuron
from patchclamp_server.rpc.codecs.program import decode_scope
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

MAX_TESTS = 32
MAX_FACTS = 1024
MAX_CANDIDATES = 64
# Answers of other facts that an answer is compared with, where none are named.
DRAWN_CANDIDATES = 4
MAX_PROMPTS = 256
MAX_WORDS = 256
DEFAULT_MAX_TOKENS, MAX_MAX_TOKENS = 32, 512
MAX_FRACTIONS = 20
DEFAULT_RANDOM_SETS, MAX_RANDOM_SETS = 10, 100
MAX_VALUE = 1e6

MODES: dict[int, NeuronEditMode] = {
    pb.NeuronEditMode.Value(f"NEURON_EDIT_MODE_{mode.name}"): mode for mode in NeuronEditMode
}
METRICS: dict[Metric, "pb.NeuronMetric.ValueType"] = {
    metric: pb.NeuronMetric.Value(f"NEURON_METRIC_{metric.name}") for metric in Metric
}


def decode_evaluation(
    request: pb.EvaluateNeuronEditRequest, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> Evaluation:
    """Returns a checked job. It tokenises all tests and may load a probe: call it in a thread."""
    required(request, "neurons", "")
    mode = known(request.mode, MODES, "mode", pb.NeuronEditMode.keys()[1:])
    value = finite(request.value, "value", low=-MAX_VALUE, high=MAX_VALUE) if request.HasField("value") else None
    if request.mean_texts and mode is not NeuronEditMode.MEAN:
        raise InvalidArgument("mean_texts", f"are of the mode mean; the mode is {mode.value}")
    tests = _Tests(request.seed, prompts, store, info)
    targets, sides = tests.decode(request.targets, "targets"), tests.decode(request.sides, "sides")
    if not targets:
        raise InvalidArgument("targets", "expected at least one test")
    scope = decode_scope(request.scope, "scope")
    check_scope(scope, "scope", vocab_size=info.vocab_size, has_roles=False)
    return Evaluation(
        decode_selection(request.neurons, "neurons"),
        mode,
        targets,
        sides,
        value=value,
        fractions=_fractions(request.fractions),
        random_sets=count(request.random_sets or DEFAULT_RANDOM_SETS, "random_sets", low=1, high=MAX_RANDOM_SETS),
        seed=request.seed,
        scope=scope,
        mean_texts=tuple(request.mean_texts),
    )


def encode_evaluation(event: Progress | EditPoint | EditEffect) -> pb.EvaluateNeuronEditResponse:
    match event:
        case Progress():
            return encode_progress(event, pb.EvaluateNeuronEditResponse)
        case EditPoint():
            return pb.EvaluateNeuronEditResponse(point=_point(event))
        case EditEffect():
            effect = pb.NeuronEditEffect(
                points=map(_point, event.points), neurons=[encode_neuron(neuron) for neuron in event.neurons]
            )
            return pb.EvaluateNeuronEditResponse(result=effect)


def _point(point: EditPoint) -> pb.NeuronEditPoint:
    measurements = [
        pb.NeuronMeasurement(test=m.test, side=m.side, metric=METRICS[m.metric], **asdict(m.change))
        for m in point.measurements
    ]
    return pb.NeuronEditPoint(fraction=point.fraction, neurons=point.neurons, measurements=measurements)


def _fractions(given: Sequence[float]) -> tuple[float, ...]:
    if len(given) > MAX_FRACTIONS:
        raise InvalidArgument("fractions", f"expected at most {MAX_FRACTIONS}, got {len(given)}")
    for i, fraction in enumerate(given):
        if not 0.0 < fraction <= 1.0:
            raise InvalidArgument(f"fractions[{i}]", f"expected a number above 0 and at most 1, got {fraction:g}")
    return distinct(given, "fractions") or DEFAULT_FRACTIONS


class _Tests:
    """Decodes tests; names are unique among all that one decodes, and windows of texts are bounded together."""

    def __init__(self, seed: int, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo) -> None:
        self._seed, self._prompts, self._store, self._info = seed, prompts, store, info
        self._names: dict[str, str] = {}
        self._windows = 0

    def decode(self, protos: Sequence[pb.NeuronTest], field: str) -> tuple[Test, ...]:
        if len(protos) > MAX_TESTS:
            raise InvalidArgument(field, f"expected at most {MAX_TESTS} tests, got {len(protos)}")
        return tuple(self._test(proto, f"{field}[{i}]") for i, proto in enumerate(protos))

    def _test(self, proto: pb.NeuronTest, field: str) -> Test:
        if not proto.name:
            raise InvalidArgument(f"{field}.name", "required")
        if proto.name in self._names:
            before = self._names[proto.name]
            raise InvalidArgument(f"{field}.name", f"{proto.name!r:.80} is already the name of {before}")
        self._names[proto.name] = field
        match chosen(proto, "kind", field):
            case "facts":
                return FactsTest(proto.name, self._facts(proto.facts.facts, f"{field}.facts.facts"))
            case "texts":
                return TextsTest(proto.name, self._texts(proto.texts.texts, f"{field}.texts.texts"))
            case _:
                return self._generation(proto.name, proto.generation, f"{field}.generation")

    def _facts(self, protos: Sequence[pb.Fact], field: str) -> tuple[Fact, ...]:
        if not 1 <= len(protos) <= MAX_FACTS:
            raise InvalidArgument(field, f"expected 1 to {MAX_FACTS} facts, got {len(protos)}")
        drawn = random.Random(self._seed)
        answers = list(dict.fromkeys(proto.answer for proto in protos))
        facts = []
        for i, proto in enumerate(protos):
            path = f"{field}[{i}]"
            others = [text for text in proto.candidates if text != proto.answer]
            if not proto.candidates:
                apart = [text for text in answers if text != proto.answer]
                others = drawn.sample(apart, min(DRAWN_CANDIDATES, len(apart)))
            if len(others) > MAX_CANDIDATES:
                raise InvalidArgument(f"{path}.candidates", f"expected at most {MAX_CANDIDATES}, got {len(others)}")
            facts.append(self._fact(proto, others, path))
        return tuple(facts)

    def _fact(self, proto: pb.Fact, others: Sequence[str], path: str) -> Fact:
        required(proto, "prompt", path)
        prompt = decode_prompt(proto.prompt, self._prompts, f"{path}.prompt").ids
        if not prompt:
            raise InvalidArgument(f"{path}.prompt", "has no token; an answer is scored after at least one")
        return Fact(
            prompt,
            (
                self._continuation(proto.answer, f"{path}.answer", prompt),
                *(self._continuation(text, f"{path}.candidates", prompt) for text in others),
            ),
        )

    def _continuation(self, text: str, field: str, prompt: Ids) -> Ids:
        ids = self._prompts.encode_continuation(text, field, prompt)
        if not ids:
            raise InvalidArgument(field, "is empty; at least one token is scored")
        if len(prompt) + len(ids) > self._info.context_length:
            raise InvalidArgument(field, f"does not fit into the context of {self._info.context_length} tokens")
        return ids

    def _texts(self, texts: Sequence[str], field: str) -> tuple[Ids, ...]:
        if not texts:
            raise InvalidArgument(field, "expected at least one text")
        with fields_as(lambda name: field + name.removeprefix("texts")):
            found = windows(texts, self._prompts, self._info.context_length)
        self._windows += len(found)
        if self._windows > MAX_WINDOWS:
            message = f"texts of all tests have {self._windows} windows; at most {MAX_WINDOWS} are run"
            raise InvalidArgument(field, message)
        return tuple(found)

    def _generation(self, name: str, proto: pb.GenerationTest, field: str) -> GenerationTest:
        if not 1 <= len(proto.prompts) <= MAX_PROMPTS:
            raise InvalidArgument(f"{field}.prompts", f"expected 1 to {MAX_PROMPTS} prompts, got {len(proto.prompts)}")
        most = min(MAX_MAX_TOKENS, self._info.context_length - 1)
        max_tokens = count(proto.max_tokens or DEFAULT_MAX_TOKENS, f"{field}.max_tokens", low=1, high=most)
        if len(proto.words) > MAX_WORDS or not all(proto.words):
            raise InvalidArgument(f"{field}.words", f"expected at most {MAX_WORDS} words, none of them empty")
        if not proto.words and not proto.probe:
            raise InvalidArgument(f"{field}.words", "expected words, or a probe")
        prompts = []
        for i, prompt in enumerate(proto.prompts):
            ids = decode_prompt(prompt, self._prompts, f"{field}.prompts[{i}]").ids
            if not 1 <= len(ids) <= self._info.context_length - max_tokens:
                room = self._info.context_length - max_tokens
                raise InvalidArgument(f"{field}.prompts[{i}]", f"has {len(ids)} tokens; accepted: 1 to {room}")
            prompts.append(ids)
        probe = self._probe(proto, field) if proto.probe else None
        return GenerationTest(name, tuple(prompts), max_tokens, tuple(proto.words), probe)

    def _probe(self, proto: pb.GenerationTest, field: str) -> Probe:
        resolver = Resolver(self._info, self._store)
        site = resolver.artifact(proto.probe, ArtifactKind.VECTOR, f"{field}.probe").info.site
        assert site is not None
        if not proto.HasField("probe_layer"):
            raise InvalidArgument(f"{field}.probe_layer", "required with a probe")
        layer = count(proto.probe_layer, f"{field}.probe_layer", high=self._info.n_layers - 1)
        vector = Vector(artifact=proto.probe)
        with about(f"{field}.probe"):
            midpoint = resolver.stored_threshold(StoredThreshold.MIDPOINT, vector, site, layer, field)
        scope = Scope((TokenSelector(phase=Phase.GENERATED),))
        readout = Readout(ProjectionReadout((vector,)), site, layers=(layer,), scope=scope)
        return Probe(bind(Program(readouts=(readout,)), self._info, self._store), midpoint)
