"""The HTTP front against gRPC, on one server and in alternating rounds: tokens a second, and time to the first token.

    python benchmarks/http.py [--rounds 5] [--tokens 64] [options of `patchclamp serve`]

`patchclamp serve --http` runs in a process of its own, the clients in this one. In a round, n streams of greedy
completions begin together, once by each way, and the round ends with the last of them; prompts are the same, and
cached for both. The client of HTTP reads the stream with as little work as it can, as that of gRPC does, and decodes
each chunk.

    http_vs_grpc_n   tokens a second over HTTP, over those of gRPC: the median over rounds
    ttft_extra_ms    how much later the first text comes over HTTP at one stream: the difference of medians
    stable_256       whether 256 streams over HTTP all ended with the texts of gRPC

The last line is a JSON object.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import orjson
import uvloop
from serving import ServerProcess

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub

STREAMS = (1, 16, 64)
MANY = 256
FIRST_TOKENS = 40
# Rounds of one stream are short: so many more make up for it.
MORE_ROUNDS = {1: 4}


@dataclass
class Answer:
    """Of one stream."""

    text: str
    tokens: int
    # Seconds to the first text.
    first: float


Complete = Callable[[str, int], Awaitable[Answer]]


class OverGrpc:
    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = GenerationServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def complete(self, prompt: str, tokens: int) -> Answer:
        began = time.perf_counter()
        request = pb.GenerateRequest(
            prompt=pb.Prompt(text=prompt), stop=pb.StopConditions(max_tokens=tokens, ignore_eos=True)
        )
        answer = Answer("", 0, 0.0)
        async for response in self._stub.Generate(request):
            if response.text and not answer.first:
                answer.first = time.perf_counter() - began
            answer.text += response.text
            if response.HasField("finished"):
                answer.tokens = response.finished.usage.generated_tokens
        return answer


class OverHttp:
    """Keeps connections open, as every client of HTTP does."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._host, self._port = host, int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()

    async def complete(self, prompt: str, tokens: int) -> Answer:
        began = time.perf_counter()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        body = orjson.dumps(
            {
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.partition(b"\r\n")[0]:
            raise SystemExit(f"refused: {status.decode()}")
        answer = Answer("", 0, 0.0)
        while size := int(await reader.readuntil(b"\r\n"), 16):
            events = await reader.readexactly(size + 2)
            for event in events.split(b"\n\n"):
                data = event.removeprefix(b"data: ")
                if not data.startswith(b"{"):
                    continue
                chunk: dict[str, Any] = orjson.loads(data)
                text = "".join(choice["text"] for choice in chunk["choices"])
                if text and not answer.first:
                    answer.first = time.perf_counter() - began
                answer.text += text
                if chunk["usage"]:
                    answer.tokens = chunk["usage"]["completion_tokens"]
        await reader.readexactly(2)
        self._idle.append((reader, writer))
        return answer


def prompts(streams: int) -> list[str]:
    return [f"Once upon a time, in village {number}, there lived" for number in range(streams)]


async def rate(complete: Complete, streams: int, tokens: int) -> float:
    """Tokens a second of one round."""
    began = time.perf_counter()
    answers = await asyncio.gather(*(complete(prompt, tokens) for prompt in prompts(streams)))
    seconds = time.perf_counter() - began
    generated = sum(answer.tokens for answer in answers)
    if generated != streams * tokens:
        raise SystemExit(f"{generated} tokens came of {streams} streams of {tokens}")
    return generated / seconds


async def measure(address: str, url: str, rounds: int, tokens: int) -> dict[str, Any]:
    over_grpc, over_http = OverGrpc(address), OverHttp(url)
    result: dict[str, Any] = {}
    for streams in STREAMS:
        for way in (over_grpc, over_http):
            await rate(way.complete, streams, tokens)
        ratios, rates = [], []
        for number in range(rounds * MORE_ROUNDS.get(streams, 1)):
            ways = (over_grpc, over_http) if number % 2 else (over_http, over_grpc)
            measured = {way: await rate(way.complete, streams, tokens) for way in ways}
            ratios.append(measured[over_http] / measured[over_grpc])
            rates.append(measured[over_grpc])
        result[f"http_vs_grpc_{streams}"] = round(statistics.median(ratios), 3)
        result[f"grpc_tokens_per_second_{streams}"] = round(statistics.median(rates), 1)
        print(f"{streams} streams: {ratios}", flush=True)
    firsts: dict[Any, list[float]] = {over_grpc: [], over_http: []}
    for number in range(FIRST_TOKENS):
        for way in (over_grpc, over_http) if number % 2 else (over_http, over_grpc):
            answer = await way.complete("Once upon a time", 2)
            firsts[way].append(answer.first)
    medians = {way: statistics.median(times) for way, times in firsts.items()}
    result["ttft_grpc_ms"] = round(medians[over_grpc] * 1000, 2)
    result["ttft_extra_ms"] = round((medians[over_http] - medians[over_grpc]) * 1000, 2)
    many = prompts(MANY)
    texts = [
        [answer.text for answer in await asyncio.gather(*(way.complete(prompt, 16) for prompt in many))]
        for way in (over_http, over_grpc)
    ]
    result["stable_256"] = texts[0] == texts[1]
    await over_http.close()
    await over_grpc.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    args, options = parser.parse_known_args()
    with (
        tempfile.TemporaryDirectory() as artifacts,
        ServerProcess(args.model, Path(artifacts), "--http=127.0.0.1:0", *options) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        result = runner.run(measure(server.address, server.started["http"], args.rounds, args.tokens))
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
