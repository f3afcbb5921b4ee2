"""Four times the load that a server can carry: what it still finishes, what it refuses and how, and what it keeps.

    python benchmarks/load [--seconds 60] [--capacity-seconds 20] [--overload 4] [options of `patchclamp serve`]

1. `patchclamp serve` in a process of its own; clients in this one, in a closed loop that keeps every place taken:
   capacity is the tokens of finished requests per second.
2. Without a pause, Poisson arrivals at `overload` times as many requests per second, for `seconds`. Prompts have 8 to
   160 words, answers 8 to 48 tokens, a quarter is steered, a third has a deadline. Two tenants send as much each; one
   has twice the weight.
3. No more arrivals; every stream has to end.

    goodput_ratio            tokens per second of requests that finished (in their deadline) during 2, over capacity
    refused_with_retry_info  of the refused requests, the share that carried RetryInfo
    stuck_streams            streams that had no end when all should have long been served
    rss_growth_ratio         memory of the server after 3 over that before 2

A full run writes benchmarks/results/load.json. The last line is a JSON object.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import grpc

# Its modules, and those that benchmarks share.
sys.path.insert(0, str(Path(__file__).parents[1]))
from serving import ServerProcess, serving

from load.clients import Call, Clients, requests
from patchclamp import Client, PatchclampError
from patchclamp_server.security.tokens import new_token

CHANNELS = 4
# Beyond the places of the server, so that each is taken again at once.
SPARE_CLIENTS = 16
# Of the median time of a request at capacity: the deadlines of those that have one.
DEADLINE_FACTOR = 3.0
HEALTH_SECONDS = 1.0
FULL_SECONDS = 60.0
WEIGHTS = {"gold": 2.0, "silver": 1.0}


@dataclass
class Watcher:
    """What the server looks like from outside meanwhile: health and memory, every second."""

    server: ServerProcess
    rss: list[int] = field(default_factory=list)
    health: Counter[str] = field(default_factory=Counter)

    async def watch(self) -> None:
        with Client(self.server.address, timeout=10.0) as client:
            while True:
                self.rss.append(self.server.rss_bytes())
                try:
                    self.health[await asyncio.to_thread(client.health)] += 1
                except PatchclampError as error:
                    self.health[type(error).__name__] += 1
                await asyncio.sleep(HEALTH_SECONDS)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {f"p{q}": round(ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 3) for q in (50, 99)}


def finished(calls: Sequence[Call], begin: float, end: float) -> list[Call]:
    return [c for c in calls if c.outcome == "ok" and c.ended is not None and begin <= c.ended < end]


def make_tenants(directory: Path) -> tuple[list[str], list[str]]:
    """Options of a server that knows them, and a token of each."""
    made = [new_token(tenant, None) for tenant in WEIGHTS]
    (directory / "tokens").write_text("".join(f"{kept.line}\n" for _, kept in made))
    rules = "".join(f"  {tenant}: {{weight: {weight}}}\n" for tenant, weight in WEIGHTS.items())
    (directory / "policy.yaml").write_text(f"tenants:\n{rules}")
    options = [f"--tokens={directory / 'tokens'}", f"--policy={directory / 'policy.yaml'}"]
    return options, [presented for presented, _ in made]


async def run(server: ServerProcess, arguments: argparse.Namespace, tokens: Sequence[str]) -> dict[str, Any]:
    with Client(server.address, token=tokens[0], token_in_clear=True) as client:
        model = client.models()[0]
    options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(server.address, options) for _ in range(CHANNELS)]
    clients = Clients(channels, [(("authorization", f"Bearer {token}"),) for token in tokens])
    watcher = Watcher(server)
    watching = asyncio.create_task(watcher.watch())

    begin = await saturate(server, clients, arguments, (model.d_model, model.n_layers))
    await asyncio.sleep(arguments.capacity_seconds)
    end = time.monotonic()
    served = finished(clients.calls, begin, end)
    capacity = sum(c.tokens for c in served) / (end - begin)
    rate = len(served) / (end - begin)
    latency = percentiles([(c.ended or end) - c.started for c in served])
    print(f"capacity {capacity:.1f} tokens/s in {rate:.2f} requests/s; a request takes {latency}", flush=True)

    offered = rate * arguments.overload
    needed = int(offered * arguments.seconds * 1.5) + 100
    made = await asyncio.to_thread(
        requests, needed, model.d_model, model.n_layers, seed=2, longest_prompt=arguments.longest_prompt
    )
    before = server.rss_bytes()
    clients.deadline_seconds = DEADLINE_FACTOR * latency["p50"]
    clients.stop_closed_loop()
    first = len(clients.calls)
    begin = time.monotonic()
    await clients.open_loop(iter(made), offered, arguments.seconds, seed=3)
    end = time.monotonic()
    goodput = sum(c.tokens for c in finished(clients.calls, begin, end)) / (end - begin)
    preempted = server.metrics()["patchclamp_preemptions_total"]
    arrived = (len(clients.calls) - first) / (end - begin)
    print(f"goodput {goodput:.1f} tokens/s while {arrived:.2f} requests/s arrive", flush=True)

    stuck = await clients.drained(arguments.drain_seconds)
    drained_in = time.monotonic() - end
    after, kept = await settled(server), server.rss_bytes()
    watching.cancel()
    for channel in channels:
        await channel.close()
    return {
        **outcomes(clients.calls[first:]),
        "seconds": arguments.seconds,
        "overload": arguments.overload,
        "goodput_ratio": round(goodput / capacity, 3),
        "goodput_tokens_by_tenant": {
            tenant: sum(c.tokens for c in finished(clients.calls, begin, end) if c.tenant == i)
            for i, tenant in enumerate(WEIGHTS)
        },
        "stuck_streams": stuck,
        "rss_growth_ratio": round(kept / before, 3),
        "rss_mib": {"before": before >> 20, "peak": max(watcher.rss) >> 20, "after": kept >> 20},
        "capacity_tokens_per_second": round(capacity, 1),
        "goodput_tokens_per_second": round(goodput, 1),
        "offered_requests_per_second": round(offered, 2),
        "deadline_seconds": round(clients.deadline_seconds, 1),
        "capacity_request_seconds": latency,
        "drained_in_seconds": round(drained_in, 1),
        "health": dict(watcher.health),
        "kv_blocks_held_after": after["patchclamp_kv_blocks"] - after["patchclamp_kv_blocks_free"],
        "preemptions": preempted,
        "refused_by_reason": {
            name.partition('"')[2].rstrip('"}'): value
            for name, value in after.items()
            if name.startswith("patchclamp_admission_refused_total{")
        },
    }


async def saturate(
    server: ServerProcess, clients: Clients, arguments: argparse.Namespace, model: tuple[int, int]
) -> float:
    """A closed loop that has been running long enough for requests to end as fast as they come; when that was so."""
    made = await asyncio.to_thread(
        requests, arguments.closed_requests, *model, seed=1, longest_prompt=arguments.longest_prompt
    )
    n = arguments.max_sequences + SPARE_CLIENTS
    clients.start_closed_loop(chain.from_iterable(iter(lambda: made, None)), n)
    begin = time.monotonic()
    # Those that began together end one by one after a while, and the KV cache has been used as far as it goes.
    while len([c for c in clients.calls if c.outcome == "ok"]) < 2 * n or await asyncio.to_thread(
        unused_blocks, server
    ):
        if time.monotonic() - begin > arguments.warm_up_limit:
            raise SystemExit("the server did not reach its capacity in time")
        await asyncio.sleep(0.5)
    return time.monotonic()


def unused_blocks(server: ServerProcess) -> bool:
    """Memory that would only now be taken, by a few idle places at most."""
    now = server.metrics()
    held = now["patchclamp_kv_blocks"] - now["patchclamp_kv_blocks_free"]
    return now["patchclamp_kv_blocks_cached"] + held < 0.98 * now["patchclamp_kv_blocks"]


async def settled(server: ServerProcess) -> dict[str, float]:
    """The metrics once no sequence is left."""
    for _ in range(100):
        now = server.metrics()
        if not now["patchclamp_sequences_running"] and not now["patchclamp_queue_waiting"]:
            break
        await asyncio.sleep(0.1)
    return now


def outcomes(calls: Sequence[Call]) -> dict[str, Any]:
    """Of the requests that were offered during the overload."""
    refused = [c for c in calls if c.outcome == "RESOURCE_EXHAUSTED"]
    ok = [c for c in calls if c.outcome == "ok"]
    answered = [(c, c.ended) for c in refused if c.ended is not None]
    return {
        "offered": len(calls),
        "outcomes": dict(Counter(c.outcome or "stuck" for c in calls)),
        "refused_with_retry_info": sum(c.has_retry_info for c in refused) / len(refused) if refused else None,
        "first_token_seconds": percentiles([c.first - c.started for c in ok if c.first is not None]),
        "request_seconds": percentiles([c.ended - c.started for c in ok if c.ended is not None]),
        "refusal_seconds": percentiles([ended - c.started for c, ended in answered]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS)
    parser.add_argument("--capacity-seconds", type=float, default=20.0)
    parser.add_argument("--overload", type=float, default=4.0)
    parser.add_argument("--warm-up-limit", type=float, default=300.0, help=argparse.SUPPRESS)
    parser.add_argument("--drain-seconds", type=float, default=300.0, help="after which a stream counts as stuck")
    parser.add_argument("--longest-prompt", type=int, default=160, help="words")
    parser.add_argument("--closed-requests", type=int, default=2000, help=argparse.SUPPRESS)
    parser.add_argument("--max-sequences", type=int, default=32)
    parser.add_argument("--max-waiting", type=int, default=64)
    parser.add_argument("--kv-cache-tokens", type=int, default=8192)
    arguments, options = parser.parse_known_args()
    options += [
        f"--{name.replace('_', '-')}={getattr(arguments, name)}"
        for name in ("max_sequences", "max_waiting", "kv_cache_tokens")
    ]
    with tempfile.TemporaryDirectory(prefix="patchclamp-load-") as directory:
        with_tenants, tokens = make_tenants(Path(directory))
        with serving(*options, *with_tenants) as server:
            result = asyncio.run(run(server, arguments, tokens))
    result["options"] = options
    result["cores"] = os.cpu_count()
    for name, value in result.items():
        print(f"{name:28s} {value}")
    if arguments.seconds >= FULL_SECONDS and not any(option.startswith("--model") for option in options):
        from measure import save

        print(f"written: {save('load', result).name}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
