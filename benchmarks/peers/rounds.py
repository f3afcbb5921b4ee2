"""Alternating rounds between live workers: in each round every case, in each case every peer that has that round."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from peers.cases import ONE_BY_ONE, QUICK_PEERS, Case, decode_name, programs, prompts
from peers.figures import Figure, Figures
from peers.process import CannotError, PeerError, Worker

# Figures of memory, bytes.
AT_REST, UNDER_LOAD = "memory at rest", "memory under load"
READY = "ready"
# Of larger batches a warm-up would take as long as a round.
MOST_WARMED = 8
LOAD_CASE = decode_name(16, "unsteered")


@dataclass(frozen=True)
class Setting:
    """`text`: the ids that prompts are cut from."""

    text: Sequence[int]
    n_layers: int


class Rounds:
    """`budget_seconds`: rounds after the first are left out once they would pass it."""

    def __init__(self, setting: Setting, budget_seconds: float) -> None:
        self.workers: dict[str, Worker] = {}
        self.setting = setting
        self.figures: Figures = {}
        self.left_out = 0
        self._until = time.perf_counter() + budget_seconds
        self._took: dict[tuple[str, str], float] = {}

    def figure(self, name: str, peer: str) -> Figure:
        return self.figures.setdefault(name, {}).setdefault(peer, Figure())

    def warm_up(self, cases: Sequence[Case]) -> None:
        """Two tokens of each kind of case: what is compiled or allocated at the first is no part of a round."""
        for case in cases:
            if case.kind == "context" or (case.kind == "decode" and case.batch > MOST_WARMED):
                continue
            for peer in self._peers(case):
                # What fails here fails in its round as well, which says so.
                with suppress(CannotError, PeerError):
                    self._ask(self.workers[peer], case, 2)

    def _peers(self, case: Case) -> list[str]:
        return [peer for peer in case.peers or self.workers if peer in self.workers]

    def run(self, cases: Sequence[Case], most_rounds: int) -> None:
        """All rounds of the quick peers, then those of the slow ones: what is compared stands together in time."""
        for quick in True, False:
            for number in range(most_rounds):
                self._round(cases, number, quick)

    def _round(self, cases: Sequence[Case], number: int, quick: bool) -> None:
        for case in cases:
            peers = [peer for peer in self._peers(case) if (peer in QUICK_PEERS) is quick]
            for peer in peers if number % 2 else reversed(peers):
                if number < case.effort(peer).rounds:
                    self._one(case, peer, number)

    def _one(self, case: Case, peer: str, number: int) -> None:
        names = figures_of(case)
        if self.figure(names[0], peer).reason:
            return
        if number and time.perf_counter() + self._took[case.name, peer] > self._until:
            self.left_out += 1
            return
        worker, started = self.workers[peer], time.perf_counter()
        measures_load = case.name == LOAD_CASE and not number
        try:
            if measures_load:
                worker.forget_peak()
            before = worker.cpu_seconds()
            answer = self._ask(worker, case, case.effort(peer).tokens)
            cores = (worker.cpu_seconds() - before) / (time.perf_counter() - started)
            if measures_load:
                self.figure(UNDER_LOAD, peer).values.append(worker.peak_bytes())
        except (CannotError, PeerError) as error:
            for name in (*names, *([UNDER_LOAD] if measures_load else [])):
                self.figure(name, peer).reason = str(error)
        else:
            for name, value in zip(names, rates(case, answer), strict=True):
                figure = self.figure(name, peer)
                figure.values.append(value)
                figure.cores.append(cores)
                figure.how = answer.get("how", "")
        took = self._took[case.name, peer] = time.perf_counter() - started
        values = [f"{name} {self.figure(name, peer).values[-1:]}" for name in names]
        print(f"round {number + 1}: {peer}: {', '.join(values)} in {took:.1f} s", flush=True)

    def _ask(self, worker: Worker, case: Case, tokens: int) -> dict[str, Any]:
        setting = self.setting
        given = prompts(setting.text, case.batch, case.length)
        asked: dict[str, Callable[[], dict[str, Any]]] = {
            "decode": lambda: worker.ask(
                "decode",
                prompts=given,
                tokens=tokens,
                programs=programs(case.steering, case.batch, setting.n_layers),
                one_by_one=ONE_BY_ONE,
            ),
            "edited": lambda: worker.ask("decode_edited", prompts=given, tokens=tokens),
            "sparse": lambda: self._sparsely(worker, case, given, tokens),
            "read": lambda: worker.ask("read", prompt=given[0], layers=setting.n_layers, path=None),
        }
        return asked["decode" if case.kind == "context" else case.kind]()

    def _sparsely(self, worker: Worker, case: Case, given: list[list[int]], tokens: int) -> dict[str, Any]:
        """A profile is made once, of one short text: enough for the speed that it has."""
        documents = prompts(self.setting.text, 1, 256)
        worker.ask("calibrate", policy=case.policy, keep=0.5, documents=documents)
        return dict(worker.ask("decode_sparsely", prompts=given, tokens=tokens, policy=case.policy))


def figures_of(case: Case) -> tuple[str, ...]:
    if case.kind == "context":
        length = case.name.removeprefix("context ")
        return f"prefill {length}", f"decode at {length}"
    return (case.name,)


def rates(case: Case, answer: Mapping[str, Any]) -> tuple[float, ...]:
    """Tokens a second. Of an activation read-out, those whose layers were read."""
    if case.kind == "read":
        return (case.length / answer["seconds"],)
    decode = answer["decoded"] / answer["decode_seconds"]
    if case.kind == "context":
        return case.length / answer["prefill_seconds"], decode
    return (decode,)
