"""Memory, start and decoding of models in real shapes: files of random weights, ours beside llama.cpp.

    python benchmarks/shapes.py [--shapes qwen2.5-0.5b llama-3.1-8b] [--llama-cpp PYTHON] [--directory DIRECTORY]

Files are made by random_gguf.py in the mix that llama.cpp calls Q4_K_M, in a directory that is kept if it is named. Of
the embedded model it is the file that it is served from. Each is served by `patchclamp serve`, the whole server, as a
user starts it, once so that it is in the page cache and what is compiled is compiled, then again: from start to ready,
resident memory when ready, all that a process has of its mapped file included, and when it has decoded. llama.cpp is
started the same way, with a context of 1,024 tokens. Then both decode one request in turns. `over_file` is resident
memory over 1.3 x the file + 300 MiB. Writes benchmarks/results/shapes.json, and prints a JSON object as its last line.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from measure import alternate, save
from peers.process import WORKERS, Worker, environment
from random_gguf import SHAPES, write
from serving import ServerProcess

from patchclamp import Client
from patchclamp_server.model.embedded import embedded_file

EMBEDDED = "embedded"
MIB = 1 << 20
ALLOWED_OVER_FILE, ALLOWED_BESIDE = 1.3, 300 * MIB
THREADS = 2
# Word tokens of the embedded model's tokenizer, which all files have.
PROMPT = tuple(range(1000, 1016))


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


@contextmanager
def ours(file: Path, artifacts: Path, figures: dict[str, Any]) -> Iterator[ServerProcess]:
    started = time.perf_counter()
    with ServerProcess(str(file), artifacts, environment=environment(THREADS)) as server:
        figures["ready_seconds"] = round(time.perf_counter() - started, 2)
        figures["ready_bytes"] = resident_bytes(server.process.pid)
        yield server


@contextmanager
def llama_cpp(python: str, file: Path, figures: dict[str, Any]) -> Iterator[Worker]:
    command = [python, str(WORKERS / "llama_cpp_worker.py")]
    with Worker(command, environment(THREADS, None)) as worker:
        worker.ask("load", model=str(file), vectors=None, threads=THREADS)
        figures["llama_cpp_ready_seconds"] = round(time.perf_counter() - worker.started, 2)
        figures["llama_cpp_ready_bytes"] = worker.resident_bytes()
        yield worker


def tokens_per_second(server: ServerProcess, tokens: int) -> float:
    """Of the tokens after the first."""
    with Client(server.address) as client:
        stream = client.generate(PROMPT, max_tokens=tokens, ignore_eos=True)
        times = [time.perf_counter() for chunk in stream for _ in chunk.tokens]
    return (len(times) - 1) / (times[-1] - times[0])


def llama_tokens_per_second(worker: Worker, tokens: int) -> float:
    answer = worker.ask("decode", prompts=[list(PROMPT)], tokens=tokens, programs=[None], one_by_one=0)
    return float(answer["decoded"] / answer["decode_seconds"])


def measure(file: Path, llama: str | None, rounds: int, tokens: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"file_bytes": file.stat().st_size}
    with tempfile.TemporaryDirectory(prefix="patchclamp-") as directory:
        artifacts = Path(directory)
        with ours(file, artifacts, {}):
            pass
        with ours(file, artifacts, figures) as server:
            runs = {"patchclamp": lambda: tokens_per_second(server, tokens)}
            if llama is None:
                found = alternate(runs, rounds)
            else:
                with llama_cpp(llama, file, {}):
                    pass
                with llama_cpp(llama, file, figures) as worker:
                    found = alternate(
                        {**runs, "llama_cpp": lambda: llama_tokens_per_second(worker, tokens)},
                        rounds,
                    )
            figures["decoded_bytes"] = resident_bytes(server.process.pid)
    allowed = ALLOWED_OVER_FILE * figures["file_bytes"] + ALLOWED_BESIDE
    figures["over_allowed"] = round(figures["ready_bytes"] / allowed, 3)
    figures["tokens_per_second"] = {name: [round(rate, 2) for rate in own] for name, own in found.items()}
    figures["median_tokens_per_second"] = {name: round(median(own), 2) for name, own in found.items()}
    if llama is not None:
        ratios = [a / b for a, b in zip(found["patchclamp"], found["llama_cpp"], strict=True)]
        figures["vs_llama_cpp"] = round(median(ratios), 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=[EMBEDDED, *SHAPES], default=[EMBEDDED, *SHAPES])
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="interpreter that has llama-cpp-python")
    parser.add_argument("--directory", type=Path, help="where the files are kept, or are already")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="patchclamp-shapes-") as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        for name in arguments.shapes:
            file = embedded_file() if name == EMBEDDED else directory / f"{name}.gguf"
            if not file.exists():
                print(f"{name}: its file is made", flush=True)
                write(file, SHAPES[name], embedded_file())
            results[name] = measure(file, arguments.llama_cpp, arguments.rounds, arguments.tokens)
            print(f"{name}: {json.dumps(results[name])}", flush=True)
    path = save("shapes", {"threads": THREADS, "rounds": arguments.rounds, "shapes": results})
    print(f"written: {path.name}", file=sys.stderr)
    shown = ("over_allowed", "ready_seconds", "vs_llama_cpp")
    print(json.dumps({f"{name} {key}": own.get(key) for name, own in results.items() for key in shown}))


if __name__ == "__main__":
    main()
