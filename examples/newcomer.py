"""From nothing to a watched service of two servers, as a newcomer would get there. Every step says what it saw.

    python examples/newcomer.py                      the embedded model; needs `pip install '.[server]'`
    python examples/newcomer.py --model DIRECTORY    another model

1. installs the thin client into an environment of its own, from this repository
2. asks for a first answer, unsteered and steered
3. makes a vector from pairs of its own, and chooses layer and strength by what it measures
4. gates the edit by the vector's own evidence
5. watches the vector; thresholds and buckets come from a reference of ordinary requests
6. adds a second server to the first, and restarts one after the other while calls go on

Servers run on free ports of this machine, with an artifact store that is deleted at the end. The exit status is 1
when something is not as it is said here.
"""

import argparse
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from patchclamp import Client, PatchclampError
from patchclamp.monitoring import watch_direction
from patchclamp.programs import add, when
from patchclamp.results import ExtractionResult, LayerEvidence
from patchclamp.v1.program_pb2 import Edit

REPOSITORY = Path(__file__).parents[1]
JOYFUL_SAD = REPOSITORY / "benchmarks/data/concepts/joyful_sad.jsonl"
PATIENCE_SECONDS = 120.0

# One sentence twice, at the sea and in the mountains: what differs between both sides is all the vector can be of.
SCENES = [
    ("We spent the morning on the {}.", "beach", "summit"),
    ("She packed her bag and went down to the {}.", "harbour", "valley"),
    ("From the window you could see the {}.", "waves", "peaks"),
    ("He told us about the {} of his childhood.", "ocean", "mountains"),
    ("The children came home with pockets full of {}.", "seashells", "pine cones"),
    ("In the evening the {} was quiet and dark.", "bay", "ridge"),
    ("They live in a small house near the {}.", "coast", "glacier"),
    ("A cold wind came from the {}.", "sea", "hills"),
    ("We hired a guide and a {} for the day.", "boat", "mule"),
    ("The path ends at the {}.", "lighthouse", "alpine hut"),
    ("Her brother works as a {}.", "sailor", "climber"),
    ("After the storm the {} was covered with wood.", "shore", "slope"),
]
PAIRS = [(sentence.format(sea), sentence.format(mountain)) for sentence, sea, mountain in SCENES]
# What the vector shall make likelier, what less likely, and what it shall leave alone.
BEGINNING, WANTED, UNWANTED = "On our holiday we saw", " the waves and the boats.", " the peaks and the snow."
ORDINARY = " train to the city leaves at eight and arrives before noon."
MOST_PERPLEXITY_RATIO = 1.5
STRENGTHS = (1.0, 2.0, 4.0, 8.0)

TRAFFIC = [
    "The weather today",
    "My day at the office was",
    "Once upon a time",
    "The best way to learn",
    "In the news",
    "A",
]
REFERENCE_TOKENS = 512
CALLERS = 4


class Unexpected(Exception):
    """Something is not as this script says."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Unexpected(what)
    print(f"  ok: {what}")


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def free_port() -> int:
    """Of this machine. It stays free while nobody else takes it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Server:
    """`patchclamp serve` in a process of its own, on an address that it keeps when it is restarted."""

    def __init__(self, model: str, folder: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._log = folder / f"server-{self.address.rpartition(':')[2]}.log"
        self._command = [sys.executable, "-m", "patchclamp", "serve", "--json", f"--model={model}"]
        self._command += [f"--address={self.address}", "--metrics-address=127.0.0.1:0"]
        # It looks at the store every second for watches that were started on the other server.
        self._command += [f"--artifacts-url={folder / 'artifacts'}", "--watch-poll-seconds=1"]

    def __enter__(self) -> "Server":
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        # One line when it serves; the end of the output where it could not start.
        if not self._process.stdout.readline():
            raise Unexpected(f"the server did not start:\n{self._log.read_text()}")
        print(f"  a server answers on {self.address}", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def restart(self) -> int:
        """By SIGTERM: it drains and ends. Returns the status with which it did."""
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(PATIENCE_SECONDS)
        self.__exit__()
        self.__enter__()
        return status


class CommandLine:
    """The programs of an environment. is_alone: nothing of the one that this script runs in is found."""

    def __init__(self, programs: Path, is_alone: bool) -> None:
        self._programs = programs
        self._environment = dict(os.environ)
        if is_alone:
            self._environment.pop("PYTHONPATH", None)

    def run(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        """What it prints, on standard output and on standard error."""
        print(f"  $ {shlex.join([program, *arguments])}", flush=True)
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            cwd=cwd,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        shown = [line for line in done.stdout.splitlines() if not re.fullmatch(r"[a-z ]+ \d+/\d+", line)]
        print("".join(f"    {line}\n" for line in shown), end="", flush=True)
        if done.returncode:
            raise Unexpected(f"{program} ended with status {done.returncode}")
        return done.stdout


def install(folder: Path) -> CommandLine:
    """An environment that has nothing but the thin client."""
    # pip builds in the directory that it installs from: a copy keeps the checkout as it is.
    source = folder / "source"
    for name in ("clients", "server", "kernels"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    venv.create(folder / "client", with_pip=True)
    commands = CommandLine(folder / "client" / "bin", is_alone=True)
    commands.run("python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install", ".", cwd=source)
    has_torch = "import importlib.util; print(importlib.util.find_spec('torch') is not None)"
    expect(commands.run("python", "-c", has_torch).strip() == "False", "the client needs no torch")
    return commands


def first_answers(thin: CommandLine, address: str, layer: int) -> None:
    ask = ["generate", "My day at the office was", "--max-tokens", "30", "--address", address]
    thin.run("patchclamp", *ask)
    thin.run("patchclamp", "vectors", "extract", "joyful_sad", "--pairs", str(JOYFUL_SAD), "--address", address)
    steered = thin.run("patchclamp", *ask, "--steer", f"joyful_sad@{layer}:1.5")
    expect(": edited" in steered, "the receipt says that the answer was edited")


def own_vector(client: Client) -> ExtractionResult:
    found = client.extract_vectors(PAIRS, pooling="mean", tags=["sea"]).result()
    for warning in found.warnings:
        print(f"  warning: {warning}")
    return found


def candidates(found: ExtractionResult) -> list[LayerEvidence]:
    """Six layers, spread over those that tell held-out pairs apart better than chance. Not layer 0: a gate needs one
    before."""
    able = [layer for layer in found.layers[1:] if layer.heldout_accuracy >= layer.random_accuracy + 0.2]
    able = able or list(found.layers[1:])
    return [able[i * len(able) // 6] for i in range(6)] if len(able) > 6 else able


def choose(client: Client, found: ExtractionResult) -> tuple[int, float, float]:
    """Layer, strength and effect: most effect beyond a random vector's, where ordinary text stays likely."""

    def effect(edit: list[Edit]) -> float:
        """How much likelier the wanted text is than the unwanted, in nats a token."""
        scores = [client.score(BEGINNING, text, program=edit) for text in (WANTED, UNWANTED)]
        wanted, unwanted = (score.total_logprob / len(score.tokens) for score in scores)
        return wanted - unwanted

    unedited, plain = effect([]), client.score("The", ORDINARY).perplexity
    tried = []
    print("  layer  accuracy  random  strength  effect  of a random vector  perplexity ratio")
    for evidence in candidates(found):
        layer = evidence.layer
        drawn = random.Random(layer)
        noise = [drawn.gauss(0, 1) for _ in range(found.artifact.width)]
        length = sum(x * x for x in noise) ** 0.5
        noise = [x * evidence.norm / length for x in noise]
        for strength in STRENGTHS:
            edit = [add("sea", layers=layer, strength=strength)]
            moved = effect(edit) - unedited
            control = effect([add(noise, layers=layer, strength=strength)]) - unedited
            ratio = client.score("The", ORDINARY, program=edit).perplexity / plain
            tried.append((moved - abs(control), ratio, layer, strength))
            print(
                f"  {layer:<6} {evidence.heldout_accuracy:<9.2f} {evidence.random_accuracy:<7.2f} {strength:<9g} "
                f"{moved:<7.2f} {control:<19.2f} {ratio:.2f}"
            )
    kept = [each for each in tried if each[1] <= MOST_PERPLEXITY_RATIO]
    beyond, _, layer, strength = max(kept or tried)
    print(
        f"  chosen: layer {layer}, strength {strength:g}: {beyond:.2f} nats a token beyond a random vector", flush=True
    )
    return layer, strength, beyond


def gated(client: Client, found: ExtractionResult, layer: int, strength: float) -> tuple[int, int]:
    """How often the gate opened on words of the sea, and of the mountains."""
    evidence = found.layers[layer - 1]
    edit = add("sea", layers=layer, strength=strength, name="sea", gate=when("sea", layer=layer - 1, above="midpoint"))
    openings = []
    for prompt in ("The sailor and the boat at sea", "The climber on the snow and ice"):
        receipt = client.generate(prompt, program=edit, max_tokens=1).result().receipt.edits[0]
        print(f"  {prompt!r}: {receipt}")
        expect(
            receipt.gate_threshold is not None and abs(receipt.gate_threshold - evidence.midpoint) < 1e-3,
            f"the gate compared with the midpoint of the evidence, {evidence.midpoint:.4g}",
        )
        openings.append(receipt.gate_firings)
    return openings[0], openings[1]


@contextmanager
def calls(target: str) -> Iterator["Calls"]:
    """Ordinary requests, one after the other of each caller, while the block runs."""
    with Client(target) as client, ThreadPoolExecutor(CALLERS) as callers:
        seen = Calls(client)
        ended = [callers.submit(seen.go_on, caller) for caller in range(CALLERS)]
        try:
            yield seen
        finally:
            seen.end.set()
            for each in ended:
                each.result()


class Calls:
    """What the callers saw."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.end = threading.Event()
        self.answered = 0
        self.lost: list[PatchclampError] = []

    def go_on(self, caller: int) -> None:
        for seed in range(caller, 10**9, CALLERS):
            if self.end.is_set():
                return
            try:
                prompt = TRAFFIC[seed % len(TRAFFIC)]
                self.client.generate(prompt, max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True).result()
                self.answered += 1
            except PatchclampError as error:
                self.lost.append(error)


def watch(client: Client, address: str, layer: int) -> None:
    client.create_watch([watch_direction("sea", "sea", layers=layer, threshold="p99")], tags=["sea-watch"])
    client.start_watch("sea-watch", "first")
    with calls(address):
        stored = client.record_reference("first", tokens=REFERENCE_TOKENS, tags=["ordinary"]).result()
    client.stop_watch("first")
    print(f"  a reference of {REFERENCE_TOKENS} ordinary tokens: {stored.id[:19]}")
    client.start_watch("sea-watch", "sea", reference="ordinary", window_tokens=256)
    with calls(address):
        wait_for("a window of tokens", lambda: client.watch_statistics("sea").watch.tokens >= 256)
    statistics = client.watch_statistics("sea")
    item, kind = statistics.items[0], statistics.kinds[0]
    p50 = next(each.value for each in item.quantiles if each.probability == 0.5)
    print(
        f"  threshold {item.threshold:.4g}, the 99th percentile of the reference; "
        f"median {p50:.4g}, mean {item.mean:.4g}"
    )
    print(f"  buckets {', '.join(f'{bound:.3g}' for bound in kind.buckets)}")
    print(f"  fired at {item.fired} of {item.tokens} tokens ({item.fired / item.tokens:.1%})")
    print(f"  drift from the reference {item.drift:.3f}, of which chance makes {item.drift_noise:.3f}")
    scale = statistics.calibration.scale if statistics.calibration else ""
    expect(scale == "reference", "threshold and buckets come from the reference")
    expect(kind.buckets[0] <= item.threshold <= kind.buckets[-1], "the threshold lies within the buckets")


def rolling_restart(servers: list[Server]) -> None:
    target = f"ipv4:{','.join(server.address for server in servers)}"
    with calls(target) as seen:
        for i, server in enumerate(servers):
            before = seen.answered
            expect(server.restart() == 0, f"server {i + 1} drained and ended with status 0")
            wait_for("more answers", lambda before=before: seen.answered > before + CALLERS)  # type: ignore[misc]
            wait_for("the watch on the new server", lambda server=server: tokens_watched(server) >= 0)  # type: ignore[misc]
        print(f"  {seen.answered} calls were answered meanwhile")
        for error in seen.lost[:3]:
            print(f"  lost: {error}")
        expect(seen.answered > 0 and not seen.lost, "no call was lost")
        wait_for("tokens in both watches", lambda: all(tokens_watched(server) > 0 for server in servers))
    for server in servers:
        tokens = tokens_watched(server)
        expect(tokens > 0, f"the watch runs on {server.address}: {tokens} tokens")


def tokens_watched(server: Server) -> int:
    """By the watch on this server since its start; -1 while it does not run there."""
    with Client(server.address) as client:
        found = [each for each in client.list_watches().watches if each.name == "sea" and each.state == "running"]
    return found[0].tokens if found else -1


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise Unexpected(f"{what} did not come within {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.1)


def path(model: str, is_trained: bool, skips_install: bool, folder: Path, stack: ExitStack) -> None:
    """is_trained: the model understands something, so that a vector must do what it is for."""
    step("1. Install the client")
    thin = CommandLine(Path(sys.executable).parent, is_alone=False) if skips_install else install(folder)
    thin.run("patchclamp", "--version")

    step("2. A first answer, and a steered one")
    servers = [stack.enter_context(Server(model, folder))]
    client = stack.enter_context(Client(servers[0].address))
    n_layers = client.models()[0].n_layers
    first_answers(thin, servers[0].address, min(16, n_layers - 1))

    step("3. A vector of one's own, its layer and its strength")
    found = own_vector(client)
    layer, strength, beyond = choose(client, found)
    if is_trained:
        expect(
            found.layers[layer].heldout_accuracy > found.layers[layer].random_accuracy, "it tells held-out pairs apart"
        )
        expect(beyond > 0, "it does more than a random vector")
    steer = add("sea", layers=layer, strength=strength, name="sea")
    result = client.generate(BEGINNING, program=steer, max_tokens=20).result()
    print(f"  {BEGINNING}{result.text}\n  {result.receipt.edits[0]}")
    expect(result.receipt.touched, "the receipt says that the answer was edited")

    step("4. A gate from its own evidence")
    at_sea, in_mountains = gated(client, found, layer, strength)
    if is_trained:
        expect(at_sea > in_mountains, "it opens more often on words of the sea")

    step("5. A watch whose threshold and buckets come from data")
    watch(client, servers[0].address, layer)

    step("6. A second server, and a rolling restart")
    servers.append(stack.enter_context(Server(model, folder)))
    wait_for("the watch on the second server", lambda: tokens_watched(servers[1]) >= 0)
    rolling_restart(servers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a hub id, a directory or a .gguf file")
    parser.add_argument(
        "--untrained", action="store_true", help="the model has random weights: nothing is expected of its answers"
    )
    parser.add_argument("--skip-install", action="store_true", help="use `patchclamp` of this environment")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="patchclamp-newcomer-") as folder, ExitStack() as stack:
        try:
            path(arguments.model, not arguments.untrained, arguments.skip_install, Path(folder), stack)
        except (Unexpected, PatchclampError) as error:
            print(f"\nnot as expected: {error}", file=sys.stderr)
            return 1
    print(f"\nall of it in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
