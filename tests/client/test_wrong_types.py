"""A value that an argument cannot hold is refused by the argument's name, with what it can hold, before it is sent."""

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from public_calls import arguments_of, awaited, builders, client_methods, made

from patchclamp import AsyncClient, Client, Program
from patchclamp.heads import Grounding, Needle, NeedleTest, StoppingRule, selection_message
from patchclamp.monitoring import watch_direction, watch_neurons
from patchclamp.programs import (
    add,
    clamp_neurons,
    generated,
    last,
    program_message,
    prompt,
    read_heads,
    read_projection,
    scale_heads,
    set_neurons,
    tokens,
    when,
)
from patchclamp.requests import advance, generate, set_strength
from patchclamp.sparsity import QualityGuard, Sparsity, cats, fovea
from patchclamp.v1 import program_pb2 as pb

METHODS = client_methods(Client)
BUILDERS = builders()


class NoValue:
    """What no argument takes."""

    def __repr__(self) -> str:
        return "<no value>"


def parameters_of(name: str, function: Any) -> list[tuple[str, str]]:
    # How long a call may take is the connection's.
    return [(name, each) for each in inspect.signature(function).parameters if each not in ("self", "timeout")]


def wrong(name: str, parameter: str) -> dict[str, Any]:
    """The arguments of a call that would be accepted, with one that is not."""
    arguments = dict(arguments_of(name))
    if parameter in ("messages", "continue_final_message"):
        del arguments["prompt"]
        arguments["messages"] = [("user", "hi")]
    return {**arguments, parameter: NoValue()}


def named(parameter: str) -> str:
    return rf"^{re.escape(parameter)}[\[:. ].*<no value>"


@pytest.mark.parametrize(
    ("method", "parameter"), [pair for name in METHODS for pair in parameters_of(name, getattr(Client, name))]
)
def test_every_argument_of_a_call_is_named_when_it_is_wrong(method: str, parameter: str) -> None:
    with Client() as client, pytest.raises((TypeError, ValueError), match=named(parameter)):
        made(getattr(client, method)(**wrong(method, parameter)))


@pytest.mark.parametrize(
    ("method", "parameter"), [pair for name in METHODS for pair in parameters_of(name, getattr(AsyncClient, name))]
)
async def test_every_argument_of_an_async_call_is_named_when_it_is_wrong(method: str, parameter: str) -> None:
    async with AsyncClient() as client:
        with pytest.raises((TypeError, ValueError), match=named(parameter)):
            await awaited(getattr(client, method)(**wrong(method, parameter)))


@pytest.mark.parametrize(
    ("name", "parameter"), [pair for name, function in BUILDERS.items() for pair in parameters_of(name, function)]
)
def test_every_argument_of_a_builder_is_named_when_it_is_wrong(name: str, parameter: str) -> None:
    # Of above and below only one is given.
    required = {k: v for k, v in arguments_of(name).items() if (parameter, k) != ("below", "above")}
    arguments = {**required, parameter: NoValue()}
    with pytest.raises((TypeError, ValueError), match=named(parameter)):
        made(BUILDERS[name](**arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": "4"}, "max_tokens: expected an int, got '4'"),
        ({"max_tokens": 1.5}, "max_tokens: expected an int, got 1.5"),
        ({"max_tokens": -1}, "max_tokens: expected an int from 0 to 2147483647, got -1"),
        ({"max_tokens": 2**32}, "max_tokens: expected an int from 0 to 2147483647, got 4294967296"),
        ({"seed": -1}, "seed: expected an int from 0 to 18446744073709551615, got -1"),
        ({"temperature": "0.8"}, "temperature: expected a number, got '0.8'"),
        ({"ignore_eos": "no"}, "ignore_eos: expected True or False, got 'no'"),
        ({"stop": ["a", 5]}, "stop[1]: expected a str, got 5"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids[1]: expected an int, got '2'"),
        ({"stop_token_ids": 7}, "stop_token_ids: expected several, each an int, got 7"),
        ({"program": "joyful"}, "program: expected several, each an edit such as add(...)"),
        ({"confidence": 5}, "confidence: expected a Confidence, or True, got 5"),
        ({"grounding": 5}, "grounding: expected a Grounding, or the id or tag of a head set, got 5"),
        ({"sparsity": QualityGuard()}, "sparsity: expected a Sparsity, a policy such as cats"),
        ({"priority": 3}, "priority: expected one of interactive, batch, analysis, got 3"),
    ],
)
def test_an_option_of_a_wrong_type_or_range_says_what_it_takes(options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        generate("hi", **options)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "prompt: expected a text, token ids or chat turns"),
        ([1, "two"], "prompt[1]: expected an int, got 'two'"),
        ([1, -2], "prompt[1]: expected an int from 0 to 2147483647, got -2"),
        ([("user", 5)], "prompt[0].content: expected a str, got 5"),
        ([{"role": "user", "content": "hi", "tool_calls": []}], 'prompt[0]: expected (role, content) or {"role": ...'),
        ([{"role": "user", "contents": "hi"}], 'prompt[0]: expected (role, content) or {"role": ...'),
    ],
)
def test_a_prompt_that_would_lose_something_is_refused(source: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        generate(source)


def test_continuing_a_text_that_is_no_chat_is_refused() -> None:
    with pytest.raises(ValueError, match="continue_final_message: only a chat"):
        generate("hi", continue_final_message=True)


@pytest.mark.parametrize("call", [lambda c: c.put_artifact(b"", tags="joy"), lambda c: c.watch_statistics("w", "joy")])
def test_one_text_in_place_of_several_is_not_taken_apart(call: Any) -> None:
    with Client() as client, pytest.raises(TypeError, match=r"(tags|items): expected several, each a str, got 'joy'"):
        call(client)


def test_a_file_is_given_by_its_path_and_not_by_its_name() -> None:
    with Client() as client, pytest.raises(TypeError, match=r"data: expected bytes or a Path, got 'v\.gguf'"):
        client.put_artifact("v.gguf")  # type: ignore[arg-type]
    with Client() as client, pytest.raises(FileNotFoundError):
        client.put_artifact(Path("v.gguf"))


def test_a_policy_in_place_of_a_profile_is_told_where_it_belongs() -> None:
    with pytest.raises(
        TypeError, match=re.escape("profile: expected the id or tag of a profile; a policy is given as")
    ):
        Sparsity(cats(keep_ratio=0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fovea(keep_ratio="0.5"), "keep_ratio: expected several, each a number, got '0.5'"),
        (lambda: cats(keep_ratio=[0.5, "x"]), "keep_ratio[1]: expected a number, got 'x'"),
        (lambda: StoppingRule(window=-1).message(), "window: expected an int from 0"),
        (lambda: NeedleTest(needles=["pizza"]).message(), "needles[0]: expected a Needle, got 'pizza'"),
        (lambda: NeedleTest(needles=[Needle("q", "n", 5)]).message(), "answer: expected a str, got 5"),
        (lambda: Grounding("h", top_k=-1).message(), "top_k: expected an int from 0"),
        (lambda: selection_message([(1, 2), (3,)]), "heads[1]: expected (layer, head), got (3,)"),
        (lambda: selection_message([(1, "2")]), "heads[0][1]: expected an int, got '2'"),
        (lambda: watch_neurons("n", [1], [2]), "layer: expected an int, got [1]"),
        (lambda: watch_direction("n", 5.0, layers=1), "direction: expected the id or tag of a vector, or its numbers"),
        (lambda: watch_direction("n", [[1.0], [2.0, 3.0]]), "direction: rows of different length"),
        (lambda: add("v", layers=None), 'layers: expected several, each an int, or "all", got None'),
        (lambda: add(["v", "w"], layers=1), "direction: expected numbers, got 'v'"),
        (lambda: add("v", layers=1, gate="toxic"), "gate: expected a Gate, got 'toxic'"),
        (lambda: add("v", layers=1, gate=pb.Readout()), "gate: expected a Gate, got a Readout"),
        (lambda: add("v", layers=1, strength=10**400), "strength: expected a number, got 1000"),
        (lambda: clamp_neurons([1], layers=1, min="0"), "min: expected a number, got '0'"),
        (lambda: when("v", layer=1, below="0"), "below '0' is unknown; accepted: midpoint"),
        (lambda: read_projection("v", layers=1), "directions: expected several, each a vector, got 'v'"),
        (lambda: advance(-1), "tokens: expected an int from 0"),
        (lambda: set_strength("joy", "2"), "strength: expected a number, got '2'"),
        (lambda: last("4"), "k: expected an int, got '4'"),
        (lambda: tokens(5), "ids: expected several, each an int, got 5"),
        (
            lambda: Program(readouts=[add("v", layers=1)]),
            "readouts[0]: expected a readout such as read_heads(",
        ),
        (
            lambda: program_message([read_heads(layers=1)]),
            "program[0]: expected an edit such as add(...); Prog",
        ),
    ],
)
def test_a_builder_says_what_it_takes(build: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        build()


def test_numbers_of_numpy_are_numbers() -> None:
    edit = set_neurons(np.int64(3), np.float32(0.5), layers=np.int64(2), strength=np.float64(2.0))
    assert (list(edit.neurons.neurons), list(edit.layers), edit.strength) == ([3], [2], 2.0)
    assert list(scale_heads(np.array([1, 2]), np.float32(0.5), layers=np.arange(2)).heads.heads) == [1, 2]
    assert cats(keep_ratio=np.float64(0.5)).keep_ratio == 0.5
    assert generate(np.array([5, 6]), max_tokens=np.int64(4)).stop.max_tokens == 4


@pytest.mark.parametrize(("name", "scope"), [("generated", generated()), ("prompt", prompt())])
def test_a_scope_can_be_named(name: Any, scope: Any) -> None:
    assert add("v", layers=1, scope=name) == add("v", layers=1, scope=scope)
    assert read_heads(layers=1, scope=name) == read_heads(layers=1, scope=scope)
    assert when("v", layer=1, above=0.0, scope=name) == when("v", layer=1, above=0.0, scope=scope)
    assert (tokens([7]) & name) == (tokens([7]) & scope)


def test_all_tokens_have_a_name_too() -> None:
    assert add("v", layers=1, scope="all").scope == pb.Scope()


def test_an_unknown_scope_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"scope 'output' is unknown; accepted: 'all', 'prompt', 'generated', or"):
        add("v", layers=1, scope="output")  # type: ignore[typeddict-item]
    with pytest.raises(TypeError, match=r"scope: expected 'all', .* got the function generated"):
        add("v", layers=1, scope=generated)  # type: ignore[typeddict-item]


def test_one_edit_is_a_program() -> None:
    edit = add("v", layers=1)
    assert generate("hi", program=edit) == generate("hi", program=[edit]) == generate("hi", program=Program(edit))
    assert Program(readouts=read_heads(layers=1)) == Program(readouts=[read_heads(layers=1)])


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("wrong_timeout", ["3", True, [3], object()])
async def test_a_timeout_that_is_no_number_is_refused_by_its_name(kind: Any, wrong_timeout: Any):
    with pytest.raises(TypeError, match=r"^timeout: expected a number of seconds, got "):
        kind(timeout=wrong_timeout)
    with pytest.raises(TypeError, match=r"^timeout: expected a number of seconds, got "):
        await awaited(kind().models(timeout=wrong_timeout))


def test_a_timeout_that_is_not_a_number_of_seconds_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"^timeout: .*nan"):
        Client().models(timeout=float("nan"))
