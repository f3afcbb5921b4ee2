"""Patchclamp beside llama.cpp and the libraries that steer models with torch, on the same model, prompts and threads.

    python benchmarks/peers [--only PEER …] [--cases WORDS …] [--rounds N] [--quick] [--json FILE]

Makes an environment for each peer in --cache (once: some minutes, 1.2 to 1.6 GB each), starts a worker in each, and
asks them in alternating rounds: decoding at batch 1, 8, 16 and 64 (unsteered; a vector at one layer; at all layers but
the first; as many different programs), prompts of 512, 2,048 and 8,128 tokens and decoding after them, reading the
residual stream of all layers; the time from start to ready, resident memory at rest and under load; and how far the
predictions of each are from plain torch in float32. llama.cpp and we have the same Q4_1 file, the others the float32
weights that it dequantises to. cases.py says how many tokens and rounds each has, workers/ what is called.

What a peer cannot do is null with the reason; one that fails does not stop the others. A whole run is written to
benchmarks/results/peers.json; the last line is a JSON object (summary.py).
"""

from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads

configure_threads()
keep_compiled_code()

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

# Its modules, and those that benchmarks share.
sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import record, save
from serving import ServerProcess

from patchclamp_server.files import cache_root
from patchclamp_server.model.progress import RichProgress
from patchclamp_server.sparsity.policies import CONTROLS, POLICIES
from peers import models
from peers.cases import ONE_BY_ONE, PROMPT, Case, brief, cases, vectors
from peers.environments import OURS, PEERS
from peers.equality import compare
from peers.figures import ONLY_OURS, Figure
from peers.process import environment
from peers.rounds import Rounds, Setting
from peers.session import Start, start_all
from peers.summary import last_line, summary

TEXT = Path(__file__).parents[2] / "server/patchclamp_server/analysis/data/ordinary.txt"
THREADS = 2
# Of every worker; of the server one more.
STARTS = 2
# Dense policies, and controls, are not sparse inference that is served.
POLICIES_SERVED = [name for name in POLICIES if name not in CONTROLS | {"dense", "exact_zero"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=PEERS, choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}"
    )
    parser.add_argument("--cases", nargs="+", default=[], help="only those with one of these words in their names")
    parser.add_argument("--rounds", type=int, default=9, help="at most")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="rounds after the first that would end later are left out"
    )
    parser.add_argument(
        "--env", nargs="+", default=[], metavar="PEER=PYTHON", help="interpreters that have a peer installed"
    )
    parser.add_argument("--cache", type=Path, default=cache_root() / "peers", help="of environments and the model")
    parser.add_argument("--quick", action="store_true", help="one round of a few tokens each")
    parser.add_argument("--tiny", action="store_true", help="the same on random weights, of us and of --env")
    parser.add_argument(
        "--json", type=Path, help="where to write the result; that of a whole run goes to results/ as well"
    )
    options = parser.parse_args()
    started = time.perf_counter()
    with ExitStack() as stack:
        result = measure(stack, options, started)
    result["minutes"] = round((time.perf_counter() - started) / 60, 1)
    if options.json:
        options.json.write_text(json.dumps(record("peers", result), indent=2) + "\n", encoding="utf-8")
    ignored = {"env", "cache", "json"}
    defaults = vars(parser.parse_args([]))
    if all(value == defaults[name] for name, value in vars(options).items() if name not in ignored):
        print(f"written: {save('peers', result).name}")
    print(json.dumps(last_line(result["summary"])))


def measure(stack: ExitStack, options: argparse.Namespace, started: float) -> dict[str, Any]:
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="patchclamp-peers-")))
    file, directory = _models(options, scratch)
    n_layers, width = models.shape(directory)
    np.save(scratch / "vectors.npy", vectors(width, n_layers))
    start = Start(
        cache=options.cache,
        interpreters=dict(each.split("=", 1) for each in options.env),
        file=file,
        directory=directory,
        vectors=scratch / "vectors.npy",
        threads=THREADS,
        starts=1 if _is_brief(options) else STARTS,
    )
    text = _text(directory, options.tiny)
    chosen = [case for case in _cases(options) if not options.cases or any(word in case.name for word in options.cases)]
    rounds = Rounds(Setting(text, n_layers), options.minutes * 60 - (time.perf_counter() - started))
    peers = start_all(stack, options.only, start, rounds)
    if not _is_brief(options):
        rounds.warm_up(chosen)
    rounds.run(chosen, options.rounds)
    figures = rounds.figures
    if not options.cases:
        figures |= compare(rounds.workers, directory, start.vectors, text, n_layers)
    server = _server(options, file)
    return {
        "threads": THREADS,
        "file": file.name,
        "file_bytes": _bytes(file),
        "prompt": PROMPT,
        "one_by_one": ONE_BY_ONE,
        "rounds_left_out": rounds.left_out,
        "brief": _is_brief(options),
        "peers": peers,
        "efforts": {case.name: {"quick": vars(case.quick), "slow": vars(case.slow)} for case in chosen},
        "figures": {
            name: {peer: _figure(each, peers, peer).card() for peer in options.only} for name, each in figures.items()
        },
        "server": {name: figure.card() for name, figure in server.items()},
        "summary": summary(figures, _bytes(file), server),
    }


def _is_brief(options: argparse.Namespace) -> bool:
    return options.quick or options.tiny


def _figure(found: Mapping[str, Figure], peers: Mapping[str, Any], peer: str) -> Figure:
    """Of a peer that was never asked: why."""
    default = peers[peer].get("error") or ONLY_OURS
    return found.get(peer) or Figure(reason=default)


def _models(options: argparse.Namespace, scratch: Path) -> tuple[Path, Path]:
    """What llama.cpp and we load, and what the others load."""
    if options.tiny:
        directory = models.tiny_directory(scratch / "model")
        return directory, directory
    with RichProgress() as progress:
        file = models.gguf_file(options.cache, progress)
    return file, models.float32_directory(file)


def _bytes(model: Path) -> int:
    files = [model] if model.is_file() else list(model.iterdir())
    return sum(each.stat().st_size for each in files)


def _text(directory: Path, tiny: bool) -> list[int]:
    """Ids of an ordinary text, the same for all."""
    if tiny:
        return np.random.default_rng(0).integers(256, size=4096).tolist()
    ids: list[int] = AutoTokenizer.from_pretrained(directory)(TEXT.read_text(encoding="utf-8")).input_ids
    return ids


def _cases(options: argparse.Namespace) -> list[Case]:
    if options.tiny:
        return brief(cases(["griffin", "glance"]))
    # Profiles take longer to make than everything else that is brief.
    return brief(cases(["griffin", "glance"])) if options.quick else cases(POLICIES_SERVED)


def _server(options: argparse.Namespace, file: Path) -> dict[str, Figure]:
    """`patchclamp serve`: seconds from its start until it says its address, and what is resident then."""
    found = {"ready": Figure(), "memory": Figure()}
    if OURS not in options.only or options.cases:
        for figure in found.values():
            figure.reason = "not asked for"
        return found
    for _ in range(1 if _is_brief(options) else STARTS + 1):
        artifacts = Path(tempfile.mkdtemp(prefix="patchclamp-peers-"))
        started = time.perf_counter()
        try:
            with ServerProcess(str(file), artifacts, environment=environment(THREADS)) as server:
                found["ready"].values.append(time.perf_counter() - started)
                found["memory"].values.append(server.rss_bytes())
        except SystemExit as error:
            found["ready"].reason = found["memory"].reason = str(error)
        finally:
            shutil.rmtree(artifacts)
    return found


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
