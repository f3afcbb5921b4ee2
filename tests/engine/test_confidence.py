"""Confidence in an answer is that of plain transformers with naive hooks: in mixed batches, in chunks, after a
preemption, from the prefix cache, and under both executors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from engine_runs import loaded
from oracle import oracle_latents, run_oracle
from programs import edit, mixed, prompt, shapes
from test_against_oracle import BLOCK, config
from tiny_models import FAMILIES, tiny_model

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import (
    Event,
    Failed,
    Finished,
    LatentPredictions,
    Priority,
    Readouts,
    Request,
    StopParams,
    Token,
)
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import Program
from patchclamp_server.interventions.state import EMPTY_PROGRAM
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.call.confidence import AnswerConfidence, Confidence, ConfidenceReport, Option

GENERATED_TOKENS = 5


@pytest.fixture(autouse=True)
def references() -> Iterator[None]:
    with reference_only():
        yield


@dataclass(eq=False)
class Asked:
    """A request for confidence, and all that came of it. `score`: given tokens that follow the prompt."""

    family: str
    prompt: tuple[int, ...]
    confidence: Confidence | None = None
    program: Program | None = None
    score: tuple[int, ...] = ()
    priority: Priority = Priority.INTERACTIVE
    events: list[Event] = field(default_factory=list)

    def request(self) -> Request:
        program = EMPTY_PROGRAM if self.program is None else bind(self.program, loaded(self.family).info)
        if self.confidence is not None:
            program = self.confidence.added_to(program)
        return Request(
            self.prompt + self.score,
            self.events.append,
            program=program,
            stop=StopParams(max_tokens=0 if self.score else GENERATED_TOKENS, ignore_eos=True),
            score_from=len(self.prompt) if self.score else None,
            priority=self.priority,
        )

    @property
    def ended(self) -> Finished:
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return self.events[-1]

    def report(self) -> ConfidenceReport:
        assert self.confidence is not None
        answer = AnswerConfidence(self.confidence)
        for event in self.events:
            if isinstance(event, LatentPredictions):
                answer.add(event)
        return answer.report()

    def expected(self) -> tuple[list[float], list[float], list[list[float]]]:
        """Agreement and probability by layer, and probability by option and layer, as the oracle has them."""
        model, asked = tiny_model(self.family), self.confidence
        assert asked is not None
        answer = self.score or run_oracle(model, self.prompt, self.program, GENERATED_TOKENS).tokens
        tokens = self.prompt + answer
        by_layer = oracle_latents(model, tokens[:-1], self.program, len(self.prompt))[:, len(self.prompt) - 1 :]
        n = 1 if asked.options else len(answer)
        agreement, probability, shares = [], [], []
        for layer in asked.layers:
            rows = by_layer[layer, :n]
            probability.append(sum(float(row[token].exp()) for row, token in zip(rows, answer, strict=False)) / n)
            agreement.append(sum(int(row.argmax()) == token for row, token in zip(rows, answer, strict=False)) / n)
        for option in asked.options:
            every = [by_layer[layer, 0, [other.token for other in asked.options]].exp().sum() for layer in asked.layers]
            own = [by_layer[layer, 0, option.token].exp() for layer in asked.layers]
            shares.append([float(a / b) for a, b in zip(own, every, strict=True)])
        if asked.options:
            ids = [option.token for option in asked.options]
            said = [int(by_layer[layer, 0, ids].argmax()) for layer in range(len(by_layer))]
            agreement = [float(said[layer] == said[-1]) for layer in asked.layers]
        return agreement, probability, shares

    def assert_right(self) -> None:
        report, (agreement, probability, shares) = self.report(), self.expected()
        assert report.tokens == (1 if report.options else len(self.score) or GENERATED_TOKENS)
        assert report.layer_agreement == pytest.approx(agreement)
        assert report.layer_probability == pytest.approx(probability, abs=1e-5, rel=1e-3)
        for option, own in zip(report.options, shares, strict=True):
            assert option.probability == pytest.approx(own, abs=1e-5)
        n = self.confidence.n_layers if self.confidence else 0
        before = [a for a, layer in zip(agreement, report.layers, strict=True) if layer < n - 1]
        assert report.consistency == pytest.approx(sum(before) / len(before))


def run(family: str, asked: Sequence[Asked], options: EngineConfig) -> Engine:
    engine = Engine(loaded(family), options)
    for own in asked:
        engine.submit(own.request())
    while engine.step():
        pass
    for own in asked:
        assert isinstance(own.ended, Finished)
    return engine


def every_layer(family: str, *options: int) -> Confidence:
    n = shapes(family).n_layers
    return Confidence(tuple(range(n)), n, tuple(Option(f"{token}", token) for token in options), (0.5,) * n)


def several(family: str) -> list[Asked]:
    """Answers that are asked about in different ways, beside those that are not."""
    n = shapes(family).n_layers
    steered = Program((edit("add", Site.RESID_POST, shapes(family), layers=(0, n - 1), strength=0.5),))
    programs = mixed(shapes(family))
    return [
        Asked(family, prompt("all layers", 22), every_layer(family)),
        Asked(family, prompt("plain", 17)),
        Asked(family, prompt("edited", 13), every_layer(family), steered),
        Asked(family, prompt("one layer", 9), Confidence((0,), n)),
        Asked(family, prompt("options", 19), every_layer(family, 7, 12, 30), steered),
        Asked(family, prompt("scored", 11), every_layer(family), steered, score=prompt("continuation", 8)),
        Asked(family, prompt("scored options", 12), every_layer(family, 3, 4), score=(3,)),
        Asked(family, prompt("other program", 10), program=programs["many edits"]),
    ]


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
@pytest.mark.parametrize("step", [512, 5], ids=["whole", "chunked"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_a_mixed_batch(family: str, step: int, kernels: bool) -> None:
    asked = several(family)
    run(family, asked, config(max_tokens_per_step=step, kernels=kernels, enable_prefix_cache=False))
    for own in asked:
        if own.confidence is not None:
            own.assert_right()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    asked = Asked(family, prompt(f"{family} alone", 14), every_layer(family))
    run(family, [asked], config())
    asked.assert_right()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_agrees_with_the_token_that_it_would_have_said(layer: int) -> None:
    tokens, s = prompt("said by a layer", 12), shapes("llama")
    apart = Program(
        tuple(edit("add", Site.RESID_POST, s, f"{i}", name=f"e{i}", layers=(i,), strength=9.0) for i in (0, 1, 2))
    )
    said = oracle_latents(tiny_model("llama"), tokens, apart, len(tokens))[:, -1].argmax(dim=1).tolist()
    assert len(set(said)) == len(said), "layers that say the same show nothing"
    asked = Asked("llama", tokens, every_layer("llama"), apart, score=(said[layer],))
    run("llama", [asked], config())
    asked.assert_right()
    assert asked.report().layer_agreement == tuple(float(i == layer) for i in range(len(said)))


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
@pytest.mark.parametrize("scores", [False, True], ids=["generates", "scores"])
def test_a_preempted_answer_is_read_once(scores: bool, kernels: bool) -> None:
    score = prompt("preempted answer", 20) if scores else ()
    asked = Asked("llama", prompt("preempted", 9), every_layer("llama"), score=score, priority=Priority.ANALYSIS)
    options = config(max_sequences=1, max_tokens_per_step=5, kernels=kernels)
    engine = Engine(loaded("llama"), options)
    engine.submit(asked.request())
    for _ in range(4):
        engine.step()
    assert any(isinstance(event, LatentPredictions) for event in asked.events)
    engine.submit(Asked("llama", (5, 6, 7)).request())
    while engine.step():
        pass
    assert asked.ended.usage.preemptions == 1
    asked.assert_right()


def test_a_prompt_that_is_all_in_the_prefix_cache_is_read_too() -> None:
    tokens = prompt("cached", 4 * BLOCK + 1)
    asked = [Asked("llama", tokens, every_layer("llama", *options)) for options in ((), (), (5, 9))]
    engine = Engine(loaded("llama"), config())
    for own in asked:
        engine.submit(own.request())
        while engine.step():
            pass
        own.assert_right()
    assert asked[-1].ended.usage.cached_prompt_tokens > 0


def test_the_answer_and_its_receipt_are_those_of_the_same_request_without_confidence() -> None:
    program = Program((edit("add", Site.RESID_POST, shapes("llama"), name="a"),))
    plain, asked = (Asked("llama", prompt("same", 14), own, program) for own in (None, every_layer("llama")))
    run("llama", [plain], config())
    run("llama", [asked], config())
    assert asked.ended.receipt == plain.ended.receipt
    assert [e for e in asked.events if isinstance(e, Token)] == [e for e in plain.events if isinstance(e, Token)]
    assert not any(isinstance(event, Readouts | Failed) for event in asked.events)
    assert not any(isinstance(event, LatentPredictions) for event in plain.events)


def test_the_numbers_are_the_same_bits_whatever_else_is_in_the_batch() -> None:
    [alone] = several("llama")[:1]
    run("llama", [alone], config(enable_prefix_cache=False))
    among = several("llama")
    run("llama", among, config(enable_prefix_cache=False, max_tokens_per_step=7))
    assert among[0].report() == alone.report()


def test_thresholds_decide_what_a_layer_says_of_two_options() -> None:
    family, tokens = "llama", prompt("thresholds", 15)
    plain = every_layer(family, 7, 12)
    asked = Asked(family, tokens, plain)
    run(family, [asked], config())
    n, shares = shapes(family).n_layers, asked.report().options[0].probability
    for first in (False, True):
        # The last says the first option, and so does the layer before it; the others say it or not.
        thresholds = (*(p - 1e-3 if first else p + 1e-3 for p in shares[:-2]), shares[-2] - 1e-3, shares[-1] - 1e-3)
        own = Asked(
            family,
            tokens,
            Confidence(plain.layers, n, plain.options, thresholds),
        )
        run(family, [own], config())
        assert own.report().layer_agreement == (*((float(first),) * (n - 2)), 1.0, 1.0)


def test_an_answer_of_no_tokens_has_no_confidence() -> None:
    report = AnswerConfidence(Confidence((0, 1), 3)).report()
    assert (report.consistency, report.tokens, report.layer_agreement) == (0.0, 0, (0.0, 0.0))
