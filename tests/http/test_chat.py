"""Chats by the official client of OpenAI, against what gRPC says of the same request."""

import openai
from live import LiveServer

from patchclamp import Client

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
GREEDY = {"temperature": 0.0, "max_completion_tokens": 24, "extra_body": {"ignore_eos": True}}


def test_greedy_text_equals_that_of_grpc(client: openai.OpenAI, model: str, live_server: LiveServer) -> None:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
    with Client(live_server.address) as grpc:
        wanted = grpc.generate(messages=MESSAGES, max_tokens=24, ignore_eos=True).result()
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == wanted.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == wanted.usage.prompt_tokens


def test_text_of_a_stream_equals_that_without(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=MESSAGES, **GREEDY)
    chunks = list(client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_an_answer_without_a_limit_goes_on_to_the_end_of_the_context(
    client: openai.OpenAI, model: str, live_server: LiveServer
) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True, "patchclamp": {}}
    )
    assert answer.usage is not None
    # The last token needs no place.
    assert answer.usage.total_tokens in (256, 257)
    assert "warnings" not in answer.choices[0].patchclamp["finished"]["receipt"]


def test_logprobs_tell_each_token_and_the_likeliest(client: openai.OpenAI, model: str, live_server: LiveServer) -> None:
    found = client.chat.completions.create(model=model, messages=MESSAGES, logprobs=True, top_logprobs=2, **GREEDY)
    with Client(live_server.address) as grpc:
        wanted = grpc.generate(messages=MESSAGES, max_tokens=24, ignore_eos=True, logprobs=2).result()
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == [token.text for token in wanted.tokens]
    assert [entry.logprob for entry in logprobs.content] == [token.logprob for token in wanted.tokens]
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)


def test_samples_stream_beside_each_other(client: openai.OpenAI, model: str) -> None:
    options = {"temperature": 1.5, "seed": 3, "max_completion_tokens": 12, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(model=model, messages=MESSAGES, n=3, **options)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model=model, messages=MESSAGES, n=3, stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_text_parts_are_one_text(client: openai.OpenAI, model: str) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    in_parts = client.chat.completions.create(model=model, messages=parts, **GREEDY)
    as_one = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}], **GREEDY)
    assert in_parts.choices[0].message.content == as_one.choices[0].message.content
