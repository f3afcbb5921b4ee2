"""Grounding: sources of generated tokens from what heads looked at, and the report of a whole answer."""

from collections.abc import Sequence
from typing import Any

import pytest
from engine_runs import Bench, Job, loaded
from programs import edit, prompt, shapes

from patchclamp_server.artifacts.head_sets import Head
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Finished, Readouts, Request, StopParams, Token
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import GENERATING, HeadReadout, Program, Readout, ReadoutValue
from patchclamp_server.interventions.state import EMPTY_PROGRAM
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.call.grounding import CopySource, GroundedTokens, Grounding

HEADS = (Head(2, 1), Head(0, 3), Head(2, 0))
PROMPT = (10, 11, 12, 13, 12, 15)
LAST = len(PROMPT) - 1


def text_of(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def follow() -> GroundedTokens:
    return GroundedTokens(Grounding.by(HEADS, EMPTY_PROGRAM), PROMPT, text_of)


def looks(position: int, layer: int, **heads: tuple[int, float]) -> ReadoutValue:
    """What the heads of a layer looked at: h1=(key position, probability)."""
    named = sorted(heads)
    ids = tuple(heads[name][0] for name in named)
    return ReadoutValue("grounding", layer, position, tuple(heads[name][1] for name in named), ids)


def at(
    position: int, head0: tuple[int, float], head1: tuple[int, float], head3: tuple[int, float]
) -> list[ReadoutValue]:
    """Values of the row at a position: head 3 of layer 0, heads 0 and 1 of layer 2."""
    return [looks(position, 0, h3=head3), looks(position, 2, h0=head0, h1=head1)]


def test_a_source_is_a_prompt_token_that_is_the_generated_one() -> None:
    answer = follow()
    assert answer.take(at(LAST, (2, 0.4), (3, 0.9), (4, 0.7))) == []
    assert answer.sources(LAST + 1, 12) == [CopySource(4, 0, 3, 0.7), CopySource(2, 2, 0, 0.4)]


def test_a_generated_token_that_is_looked_at_is_no_source() -> None:
    answer = follow()
    answer.take(at(LAST + 2, (LAST + 1, 0.9), (LAST + 2, 0.9), (0, 0.1)))
    assert answer.sources(LAST + 3, 12) == []


def test_the_row_before_a_token_tells_its_sources_and_no_other() -> None:
    answer = follow()
    answer.take([*at(LAST, (0, 0.9), (0, 0.9), (0, 0.9)), *at(LAST + 1, (1, 0.5), (1, 0.6), (1, 0.7))])
    assert [s.position for s in answer.sources(LAST + 1, 10)] == [0, 0, 0]
    assert [s.probability for s in answer.sources(LAST + 2, 11)] == [0.7, 0.6, 0.5]
    assert answer.sources(LAST + 3, 11) == []


def test_readouts_of_the_client_come_back() -> None:
    own = ReadoutValue("mine", 2, LAST, (0.5,), (2,))
    assert follow().take([own, *at(LAST, (2, 0.4), (3, 0.9), (4, 0.7))]) == [own]


def test_the_report_counts_each_token_once_and_joins_neighbouring_positions() -> None:
    answer = follow()
    for position, (token, best) in enumerate([(12, 2), (13, 3), (12, 2), (15, 5), (99, 0)], LAST):
        # Another head is at the other 12 of the prompt, with a smaller probability.
        answer.take(at(position, (best, 0.6), (4, 0.3), (0, 0.1)))
        answer.sources(position + 1, token)
    report = answer.report()
    assert (report.grounded_ratio, report.grounded_tokens) == (0.8, 4)
    assert [(r.start, r.end, r.tokens, r.text) for r in report.ranges] == [(2, 4, 3, "12 13"), (5, 6, 1, "15")]


def test_an_answer_of_no_tokens_is_not_grounded() -> None:
    report = follow().report()
    assert (report.grounded_ratio, report.grounded_tokens, report.ranges) == (0.0, 0, ())


def test_the_readout_has_a_name_that_the_program_does_not_use() -> None:
    taken = Readout(HeadReadout(), Site.ATTN_Z, "grounding", layers=(0,))
    program = bind(Program(readouts=(taken,)), loaded("llama").info)
    grounding = Grounding.by(HEADS, program)
    names = [readout.name for readout in grounding.added_to(program).readouts]
    assert names[0] == "grounding"
    assert len(set(names)) == 2


def test_only_the_heads_and_layers_of_the_set_are_read_where_a_token_is_generated() -> None:
    readout = Grounding.by(HEADS, EMPTY_PROGRAM).readout
    assert readout.heads == {0: (3,), 2: (0, 1)}
    assert readout.layers == (0, 2)
    assert readout.scope == GENERATING


def run(program: Any, tokens: tuple[int, ...]) -> list[Event]:
    engine, events = Engine(loaded("qwen3"), EngineConfig(kv_block_size=4, kv_cache_tokens=1024)), []
    engine.submit(Request(tokens, events.append, program=program, stop=StopParams(max_tokens=6, ignore_eos=True)))
    while engine.step():
        pass
    return events


def test_what_grounding_reads_is_what_a_client_would_read_and_changes_neither_tokens_nor_receipt() -> None:
    """Heads of the set alone, of the row before every token, in time for it."""
    steered = bind(Program((edit("add", Site.RESID_POST, shapes("qwen3")),)), loaded("qwen3").info)
    tokens = prompt("grounded", 14)
    grounding = Grounding.by(HEADS, steered)
    plain, grounded = run(steered, tokens), run(grounding.added_to(steered), tokens)

    def kept(events: list[Event], kind: type) -> list[Any]:
        return [event for event in events if isinstance(event, kind)]

    assert kept(grounded, Token) == kept(plain, Token)
    assert kept(grounded, Finished)[0].receipt == kept(plain, Finished)[0].receipt

    all_heads = Program(steered.program.edits, (Readout(HeadReadout(), Site.ATTN_Z, all_layers=True),))
    with Bench("qwen3", EngineConfig(kv_block_size=4)) as bench:
        [outcome] = bench.run([Job(tokens, all_heads)])
    everything = {(v.position, v.layer): v for v in outcome.readouts}
    follower = GroundedTokens(grounding, tokens, text_of)
    pending: set[int] = set()
    for event in grounded:
        if isinstance(event, Readouts):
            assert follower.take(event.values) == []
            pending.add(event.position)
            for value in event.values:
                whole = everything[event.position, value.layer]
                asked = grounding.readout.heads[value.layer]
                assert value.ids == tuple(whole.ids[h] for h in asked)
                assert value.values == pytest.approx([whole.values[h] for h in asked], rel=1e-5)
        if isinstance(event, Token):
            assert pending == {event.position - 1}
            pending.clear()
