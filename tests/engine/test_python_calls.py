"""What a sequence adds to the Python work of a decode step: counted, not timed.

On a GPU a step of 256 sequences has some 16 ms in all, and a call of Python takes about 0.1 µs of it.
"""

import sys
from types import FrameType

import pytest
from engine_runs import loaded

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Request, SamplingParams, StopParams
from patchclamp_server.rpc.metrics.server import Metrics

FEW, MANY = 8, 40
# Of a sequence in a step: to be scheduled, put into a batch, sampled for, and told its token and its text. Before
# sequences were taken together it was 99, and 103 with sampling.
MOST_CALLS = 26


class CallCount:
    """Counts the functions of Python that are entered."""

    def __init__(self) -> None:
        self.n = 0

    def __enter__(self) -> "CallCount":
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        self.n += event == "call"


def decode_calls(sequences: int, sampling: SamplingParams, deadline: float | None) -> int:
    """Calls of a step in which all sequences decode, and none needs another block."""
    engine = Engine(loaded("llama"), EngineConfig(max_sequences=MANY, max_tokens_per_step=1024))
    engine.observer = Metrics()
    stop = StopParams(max_tokens=12, ignore_eos=True)
    for i in range(sequences):
        prompt = (3, 5 + i, 9)
        engine.submit(Request(prompt, lambda event: None, sampling=sampling, stop=stop, deadline=deadline))
    counts = []
    for _ in range(8):
        with CallCount() as count:
            engine._expire()
            assert engine.step()
        counts.append(count.n)
    assert len(engine.scheduler.running) == sequences
    # What Python does once in a while, such as to make more random numbers, is not in every step.
    return min(counts[3:])


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=1)],
    ids=["greedy", "sampled"],
)
def test_a_sequence_adds_few_python_calls_to_a_decode_step(sampling: SamplingParams) -> None:
    few, many = (decode_calls(n, sampling, deadline=1e9) for n in (FEW, MANY))
    assert (many - few) / (MANY - FEW) <= MOST_CALLS
