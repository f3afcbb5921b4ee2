"""How long commands may take, and what they print where the output cannot write every character."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from canned import Generations, Heads, Monitoring, Sparsities
from canned_neurons import Neurons

from patchclamp.cli import main
from patchclamp.v1 import generation_pb2 as pb

Serve = Callable[..., str]


class Timed:
    """A servicer, and how many seconds the last call of it had left; centuries when it had no deadline."""

    def __init__(self, servicer: Any) -> None:
        self._servicer = servicer
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._servicer, name)

        def timed(request: Any, context: Any) -> Any:
            self.seconds = context.time_remaining()
            return method(request, context)

        return timed


@pytest.fixture
def file(tmp_path: Path) -> str:
    """One line that every kind of file can be."""
    pair = {"positive": "a", "negative": "b", "clean": "a", "corrupt": "b", "clean_answer": "c", "corrupt_answer": "d"}
    pair |= {"prompt": "p", "answer": "a"}
    path = tmp_path / "line.jsonl"
    path.write_text(json.dumps(pair))
    return str(path)


# Of each service the commands whose call ends when its work is done.
STREAMS = {
    "generation": (Generations, [["generate", "hi"], ["compare", "hi"], ["heads", "ground", "mine", "hi"]]),
    "sparsity": (
        Sparsities,
        [
            ["sparsity", "calibrate", "mine", "--policy", "cats", "--text", "FILE"],
            ["sparsity", "evaluate", "cats", "--text", "FILE"],
        ],
    ),
    "heads": (
        Heads,
        [
            ["heads", "detect", "mine"],
            ["heads", "score", "induction"],
            ["heads", "ablate", "mine"],
            ["heads", "circuit", "mine", "--pairs", "FILE"],
        ],
    ),
    "neurons": (
        Neurons,
        [
            ["neurons", "decode", "mine"],
            ["neurons", "find", "dog"],
            ["neurons", "localize", "welch_t", "--corpus", "wiki", "--target", "code"],
            ["neurons", "evaluate", "mine", "--target", "FILE"],
            ["neurons", "census", "mine", "--corpus", "wiki"],
            ["neurons", "describe", "mine", "--texts", "FILE"],
            ["neurons", "match", "tuned", "--corpus", "wiki"],
        ],
    ),
    "monitoring": (Monitoring, [["watch", "reference", "mine", "usual"], ["watch", "follow", "mine"]]),
}


@pytest.mark.parametrize(
    ("service", "arguments"), [(service, each) for service, (_, commands) in STREAMS.items() for each in commands]
)
def test_a_stream_has_the_deadline_that_was_asked_for_and_no_other(
    serve: Serve, file: str, service: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timed(STREAMS[service][0]())
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", serve(**{service: timed}))
    command = [file if argument == "FILE" else argument for argument in arguments]
    assert main([*command, "--json"]) == 0
    assert timed.seconds > 1e9
    assert main([*command, "--json", "--timeout", "77"]) == 0
    assert timed.seconds == pytest.approx(77, abs=30)


def test_another_call_has_a_deadline_without_being_asked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(Generations())
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", serve(generation=timed))
    assert main(["score", "hi", " you"]) == 0
    assert timed.seconds == pytest.approx(300, abs=30)


class Chinese(Generations):
    """Says what ASCII cannot."""

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(text="中 é", tokens=[pb.GeneratedToken(id=7, text="中", logprob=-0.5)])
        yield pb.GenerateResponse(text="!", finished=pb.Finished(reason=pb.FINISH_REASON_EOS))


def in_ascii(serve: Serve, *arguments: str) -> str:
    """What a command prints on an output of ASCII."""
    written = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(written, encoding="ascii")) as output:
        assert main([*arguments, "--address", serve(generation=Chinese())]) == 0
        output.flush()
        return written.getvalue().decode("ascii")


def test_what_the_output_cannot_write_is_escaped_and_the_rest_arrives(serve: Serve) -> None:
    printed = in_ascii(serve, "generate", "hi", "--logprobs", "0")
    assert printed.startswith("\\u4e2d \\xe9!\n")
    assert '"\\u4e2d"' in printed


def test_json_on_such_an_output_is_still_json(serve: Serve) -> None:
    assert json.loads(in_ascii(serve, "generate", "hi", "--json"))["text"] == "中 é!"
