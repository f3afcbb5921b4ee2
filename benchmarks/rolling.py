"""A rolling restart under load: two servers, a client that balances, and not one call lost.

    python benchmarks/rolling.py           the embedded model; saves results/rolling.json
    python benchmarks/rolling.py --tiny    a tiny random model, as in the tests

Two real server processes share the calls of one client of each kind. While callers go on, the first server gets
SIGTERM, drains, ends and is started anew on its address; when it answers again, so does the second. Callers send one
call after another: streams, scores and sessions, without any policy of retries. The last line is a JSON object:

    lost_calls       calls that ended in an error, whatever the error
    balance_of_two   share of the calls that the less loaded server answered while both were there

The exit status is 1 when a call was lost, a server did not end with status 0, or the balance is below .4.
"""

import argparse
import asyncio
import json
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
from measure import save
from serving import PATIENCE_SECONDS, ServerProcess

from patchclamp import AsyncClient, Client, PatchclampError

PROMPT = "The weather today"
TOKENS = 8
# Calls that both servers together have answered before the first one is restarted.
BALANCED_CALLS = 60
LEAST_BALANCE = 0.4
# Callers of each of the two clients.
CALLERS = 3
# Between the calls of a caller: a server that starts shares the machine with all of this.
PAUSE_SECONDS = 0.05
ANSWERED = 'patchclamp_requests_total{code="OK",'
# What is said of a lost call is for people: the first few do.
SHOWN = 5


class Tally:
    """What callers saw. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.answered: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.errors: list[str] = []
        self.slowest_seconds = 0.0

    @contextmanager
    def call(self, kind: str) -> Iterator[None]:
        """One call."""
        began = time.monotonic()
        try:
            yield
        except PatchclampError as error:
            with self._lock:
                self.lost[f"{kind}: {error.code}"] += 1
                self.errors.append(f"{kind}: {error}")
            return
        with self._lock:
            self.answered[kind] += 1
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - began)


def call_on(client: Client, tally: Tally, ended: threading.Event) -> None:
    while not ended.wait(PAUSE_SECONDS):
        with tally.call("stream"):
            client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True).result()
        with tally.call("score"):
            client.score(PROMPT, " is fine")
        with tally.call("session"), client.session(PROMPT, max_tokens=TOKENS, ignore_eos=True) as session:
            session.result()


async def call_on_async(client: AsyncClient, tally: Tally, ended: threading.Event) -> None:
    while not ended.is_set():
        await asyncio.sleep(PAUSE_SECONDS)
        with tally.call("async stream"):
            await client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True).result()
        with tally.call("async score"):
            await client.score(PROMPT, " is fine")
        with tally.call("async session"):
            async with client.session(PROMPT, max_tokens=TOKENS, ignore_eos=True) as session:
                await session.result()


@contextmanager
def load(target: str, tally: Tally) -> Iterator[None]:
    """Callers of one client of each kind, while the block runs."""
    ended = threading.Event()

    async def all_async() -> None:
        async with AsyncClient(target) as client:
            await asyncio.gather(*(call_on_async(client, tally, ended) for _ in range(CALLERS)))

    with Client(target) as client:
        callers = [threading.Thread(target=call_on, args=(client, tally, ended)) for _ in range(CALLERS)]
        callers.append(threading.Thread(target=asyncio.run, args=(all_async(),)))
        for caller in callers:
            caller.start()
        try:
            yield
        finally:
            ended.set()
            for caller in callers:
                caller.join()


class Pair:
    """Two servers that are restarted one after the other, each on its own address."""

    def __init__(self, model: str, artifacts: Path, stack: ExitStack) -> None:
        self._model = model
        self._artifacts = artifacts
        self._stack = stack
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        self.servers = [self._process(i) for i in range(2)]
        for server in self.servers:
            # They load side by side.
            server.start()
        for server in self.servers:
            stack.enter_context(server)

    @property
    def target(self) -> str:
        return f"ipv4:{','.join(self.addresses)}"

    def answered(self, i: int) -> int:
        """Calls that a server has answered since it was started; health and the like do not count."""
        metrics = self.servers[i].metrics().items()
        return int(sum(n for name, n in metrics if name.startswith(ANSWERED) and "GenerationService" in name))

    def restart(self, i: int) -> int:
        """Returns the status with which it ended."""
        self.servers[i].signal(signal.SIGTERM)
        status = self.servers[i].wait()
        self.servers[i] = self._process(i)
        self._stack.enter_context(self.servers[i])
        return status

    def _process(self, i: int) -> ServerProcess:
        return ServerProcess(self._model, self._artifacts, f"--address={self.addresses[i]}")


def free_ports(n: int) -> list[int]:
    """Of this machine. They stay free while nobody else takes them."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Raises SystemExit when it does not come to hold."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"{what} did not happen within {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.05)


def roll(pair: Pair, tally: Tally) -> dict[str, object]:
    """All of it, under load."""
    with load(pair.target, tally):
        # A client has a connection to one of them first.
        wait_for("an answer of each server", lambda: all(pair.answered(i) for i in range(2)))
        begun = [pair.answered(i) for i in range(2)]
        wait_for(
            f"{BALANCED_CALLS} answers",
            lambda: sum(pair.answered(i) for i in range(2)) - sum(begun) >= BALANCED_CALLS,
        )
        shares = [pair.answered(i) - n for i, n in enumerate(begun)]
        print(f"while both were there: {shares[0]} and {shares[1]} calls", flush=True)
        statuses = []
        for i in range(2):
            statuses.append(pair.restart(i))
            print(f"server {i + 1} ended with status {statuses[-1]} and was started anew", flush=True)
            wait_for(f"an answer of the new server {i + 1}", lambda i=i: pair.answered(i) > 0)  # type: ignore[misc]
    return {
        "balance_of_two": round(min(shares) / sum(shares), 3),
        "calls_by_server": shares,
        "exit_statuses": statuses,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model; saves nothing")
    arguments = parser.parse_args()
    started = time.monotonic()
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="patchclamp-rolling-") as name, ExitStack() as stack:
        model = "embedded"
        if arguments.tiny:
            from tiny_llama import save_tiny_llama

            model = str(Path(name) / "model")
            save_tiny_llama(Path(model))
        seen = roll(Pair(model, Path(name) / "artifacts", stack), tally)
    lost = sum(tally.lost.values())
    result = {
        "lost_calls": lost,
        **seen,
        "answered_calls": dict(tally.answered),
        "lost": dict(tally.lost),
        "slowest_call_seconds": round(tally.slowest_seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    for error in tally.errors[:SHOWN]:
        print(error)
    if not arguments.tiny:
        save("rolling", result)
    print(json.dumps(result))
    return int(bool(lost or any(seen["exit_statuses"]) or seen["balance_of_two"] < LEAST_BALANCE))  # type: ignore


if __name__ == "__main__":
    sys.exit(main())
