"""Completions by the official client of OpenAI, against what gRPC says of the same request."""

import openai
import pytest
from live import LiveServer

from patchclamp import Client

GREEDY = {"temperature": 0.0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


def test_greedy_text_and_tokens_equal_those_of_grpc(client: openai.OpenAI, model: str, live_server: LiveServer) -> None:
    over_http = client.completions.create(
        model=model, prompt="hello", temperature=0, max_tokens=24, extra_body={"ignore_eos": True, "patchclamp": {}}
    )
    with Client(live_server.address) as grpc:
        wanted = grpc.generate("hello", max_tokens=24, ignore_eos=True).result()
    choice = over_http.choices[0]
    assert choice.text == wanted.text
    assert [token["id"] for token in choice.patchclamp["tokens"]] == [token.id for token in wanted.tokens]
    assert choice.finish_reason == "length"


def test_text_of_a_stream_equals_that_without(client: openai.OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt="hello", **GREEDY)
    chunks = list(client.completions.create(model=model, prompt="hello", stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_counts_the_tokens_of_prompt_and_answer(client: openai.OpenAI, model: str) -> None:
    usage = client.completions.create(model=model, prompt="hello", **GREEDY).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 24, 29)


def test_a_stream_ends_with_the_usage_where_it_is_asked_for(client: openai.OpenAI, model: str) -> None:
    chunks = list(
        client.completions.create(
            model=model, prompt="hello", stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_sixteen_tokens_are_generated_where_nothing_is_said(client: openai.OpenAI, model: str) -> None:
    usage = client.completions.create(model=model, prompt="hello", extra_body={"ignore_eos": True}).usage
    assert usage is not None
    assert usage.completion_tokens == 16


def test_a_seed_repeats_the_sample(client: openai.OpenAI, model: str) -> None:
    first, again = (
        client.completions.create(
            model=model, prompt="hello", temperature=1.5, seed=7, max_tokens=24, extra_body={"ignore_eos": True}
        )
        for _ in range(2)
    )
    assert first.choices[0].text == again.choices[0].text


def test_samples_are_as_many_as_n_and_the_first_has_the_seed(client: openai.OpenAI, model: str) -> None:
    options = {"temperature": 1.5, "seed": 7, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    several = client.completions.create(model=model, prompt="hello", n=3, **options)
    alone = client.completions.create(model=model, prompt="hello", **options)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].text == alone.choices[0].text
    assert len({choice.text for choice in several.choices}) == 3
    assert several.usage is not None
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (5, 72)


def test_each_of_several_prompts_has_its_choice(client: openai.OpenAI, model: str) -> None:
    together = client.completions.create(model=model, prompt=["hello", "good day"], **GREEDY)
    alone = [client.completions.create(model=model, prompt=prompt, **GREEDY) for prompt in ("hello", "good day")]
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]


def test_a_prompt_may_be_token_ids(client: openai.OpenAI, model: str, live_server: LiveServer) -> None:
    with Client(live_server.address) as grpc:
        ids = list(grpc.tokenize("hello").ids)
    as_ids = client.completions.create(model=model, prompt=ids, **GREEDY)
    as_text = client.completions.create(model=model, prompt="hello", **GREEDY)
    assert as_ids.choices[0].text == as_text.choices[0].text


def test_text_ends_before_a_stop_string(client: openai.OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt="hello", **GREEDY).choices[0].text
    stop = whole[5:7]
    stopped = client.completions.create(model=model, prompt="hello", stop=stop, **GREEDY).choices[0]
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


def test_a_bias_of_a_token_decides_what_is_drawn(client: openai.OpenAI, model: str) -> None:
    choice = client.completions.create(
        model=model, prompt="hello", logit_bias={"65": 100}, logprobs=0, **GREEDY
    ).choices[0]
    assert choice.logprobs is not None
    assert len(set(choice.logprobs.tokens or ())) == 1


def test_nothing_ends_before_the_least_number_of_tokens(client: openai.OpenAI, model: str) -> None:
    likely = {"temperature": 0.0, "logit_bias": {"2": 100, "65": 99}}
    choice = client.completions.create(model=model, prompt="hello", extra_body={"min_tokens": 5}, **likely)
    assert choice.usage is not None
    assert (choice.usage.completion_tokens, choice.choices[0].finish_reason) == (6, "stop")


def test_logprobs_equal_those_of_grpc(client: openai.OpenAI, model: str, live_server: LiveServer) -> None:
    found = client.completions.create(model=model, prompt="hello", logprobs=2, **GREEDY).choices[0].logprobs
    with Client(live_server.address) as grpc:
        wanted = grpc.generate("hello", max_tokens=24, ignore_eos=True, logprobs=2).result()
    assert found is not None
    assert found.tokens == [token.text for token in wanted.tokens]
    assert found.token_logprobs == [token.logprob for token in wanted.tokens]
    assert found.text_offset is not None
    assert found.text_offset[:2] == [0, len(wanted.tokens[0].text)]
    assert found.top_logprobs is not None
    assert found.top_logprobs[0][wanted.tokens[0].text] == wanted.tokens[0].logprob


def test_echo_puts_the_prompt_and_its_logprobs_before_the_text(
    client: openai.OpenAI, model: str, live_server: LiveServer
) -> None:
    choice = client.completions.create(
        model=model, prompt="hello", echo=True, max_tokens=2, logprobs=1, temperature=0
    ).choices[0]
    with Client(live_server.address) as grpc:
        ids = list(grpc.tokenize("hello").ids)
        wanted = grpc.score(ids[:1], ids[1:])
    assert choice.text.startswith("hello")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:5] == pytest.approx([token.logprob for token in wanted.tokens])
    assert len(choice.logprobs.tokens or ()) == len(ids) + 2


def test_echo_without_new_tokens_scores_the_prompt(client: openai.OpenAI, model: str) -> None:
    choice = client.completions.create(model=model, prompt="hello", echo=True, max_tokens=0, logprobs=1).choices[0]
    assert choice.text == "hello"
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or ()) == 5


def test_echo_streams_the_prompt_first(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "prompt": ["hello", "good"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 3}
    whole = client.completions.create(temperature=0, **options)
    texts, tokens = [""] * 4, [[] for _ in range(4)]
    for chunk in client.completions.create(temperature=0, stream=True, **options):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.logprobs is not None:
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert texts[0].startswith("hello")
    assert texts[3].startswith("good")
