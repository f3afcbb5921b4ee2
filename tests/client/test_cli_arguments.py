"""The command line: what its arguments mean, and the exit status of wrong ones."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from patchclamp.cli import main
from patchclamp.cli.app import build_parser
from patchclamp.cli.extract import pairs_file
from patchclamp.cli.options import generate_options, prompt_of
from patchclamp.cli.steering import clamp, layer_list, program_of, steer
from patchclamp.programs import Program, generated, project_out, read_top_neurons
from patchclamp.requests import generate
from patchclamp.v1 import program_pb2 as pb


def parse(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(arguments)


def test_steer_reads_vector_layers_and_strength() -> None:
    edit = steer("joyful@10-12:4.0")
    assert (edit.add.vector.artifact, list(edit.layers), edit.strength) == ("joyful", [10, 11, 12], 4.0)


def test_steer_accepts_ids_with_a_colon_and_a_scope() -> None:
    edit = steer("sha256:ab@3:-1.5,generated")
    assert (edit.add.vector.artifact, edit.strength) == ("sha256:ab", -1.5)
    assert edit.scope == generated().message()


def test_steer_without_strength_is_the_whole_vector_and_unit_divides_by_its_norm() -> None:
    assert steer("joyful@all").strength == 1.0
    assert steer("joyful@all:2,unit").add.vector.unit


def test_clamp_holds_a_neuron_at_a_value() -> None:
    edit = clamp("L12N345=3.0")
    assert (list(edit.layers), list(edit.neurons.neurons), list(edit.neurons.set.values)) == ([12], [345], [3.0])


def test_clamp_within_bounds_leaves_open_what_is_not_given() -> None:
    bounds = clamp("L1N3,7=-1..,generated").neurons.clamp
    assert bounds.min == -1.0
    assert not bounds.HasField("max")


@pytest.mark.parametrize("text", ["joyful", "@3:1", "joyful@:1", "joyful@3:much", "joyful@5-3:1", "joyful@3:1,twice"])
def test_a_malformed_steer_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        steer(text)


@pytest.mark.parametrize("text", ["12N345=3", "L12N=3", "L12N345", "L12N345=a", "L12N345=2..1", "L12N345=.."])
def test_a_malformed_clamp_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        clamp(text)


def test_layers_may_mix_ranges_and_single_ones() -> None:
    assert layer_list("8,10-12") == [8, 10, 11, 12]


def test_a_program_file_comes_before_the_options(tmp_path: Path) -> None:
    file = tmp_path / "program.json"
    readouts = [read_top_neurons(3, layers=1)]
    file.write_text(Program([project_out("sad", layers=1, name="no-sad")], readouts=readouts).to_json())
    args = parse("generate", "hi", "--clamp", "L1N2=0", "--steer", "joyful@3:1", "--program", str(file))
    program = program_of(args)
    assert [edit.name for edit in program.edits] == ["no-sad", "joyful@3", "L1N2"]
    assert program.readouts == tuple(readouts)


def test_repeated_edits_get_distinct_names() -> None:
    program = program_of(parse("generate", "hi", *["--steer", "joyful@3:1"] * 3))
    assert [edit.name for edit in program.edits] == ["joyful@3", "joyful@3#2", "joyful@3#3"]


def test_sampling_flags_reach_the_request_and_others_stay_unset() -> None:
    args = parse("generate", "hi", "--temperature", "0.7", "--stop", "a", "--stop", "b", "--logprobs", "0")
    request = generate(prompt_of(args), generate_options(args))
    assert (request.prompt.text, request.sampling.temperature) == ("hi", 0.7)
    assert list(request.stop.strings) == ["a", "b"]
    assert request.HasField("logprobs")
    assert not request.sampling.HasField("seed")
    assert not request.stop.HasField("max_tokens")
    assert request.program == pb.Program()


def test_a_system_turn_makes_the_prompt_a_chat() -> None:
    args = parse("generate", "hi", "--system", "be brief")
    chat = generate(prompt_of(args), generate_options(args)).prompt.chat
    assert [(m.role, m.content) for m in chat.messages] == [("system", "be brief"), ("user", "hi")]


def test_pairs_are_texts_or_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "be glad"}]
    file = tmp_path / "pairs.jsonl"
    lines = [{"positive": "glad", "negative": "sad"}, {"positive": chat, "negative": chat}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert pairs_file(str(file)) == [("glad", "sad"), (chat, chat)]


@pytest.mark.parametrize("line", ["{", '{"positive": "a"}', '{"positive": 1, "negative": "b"}', "[]"])
def test_a_malformed_pair_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(f'{{"positive": "a", "negative": "b"}}\n{line}\n')
    with pytest.raises(argparse.ArgumentTypeError, match=r"pairs\.jsonl:2"):
        pairs_file(str(file))


def test_the_address_comes_from_the_option_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("models").address == "localhost:50051"
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", "gpu:1")
    assert parse("models").address == "gpu:1"
    assert parse("models", "--address", "gpu:2").address == "gpu:2"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["generate"],
        ["generate", "hi", "--steer", "joyful"],
        ["generate", "hi", "--program", "missing.json"],
        ["vectors", "extract", "joyful"],
        ["vectors", "tag", "joyful"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_a_file_that_cannot_be_read_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vectors", "put", "missing.gguf"]) == 2
    assert "missing.gguf" in capsys.readouterr().err


def test_a_number_out_of_range_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi", "--top-k", "-1"]) == 2
    assert "-1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "score", "compare", "models", "health"])
def test_every_command_can_answer_in_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "-h"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["extract", "list", "get", "put", "export", "rm", "tag"])
def test_every_action_on_vectors_can_answer_in_json(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["vectors", action, "-h"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "pull"])
def test_a_server_command_without_the_extra_says_what_to_install(command: str) -> None:
    code = f"import sys\nsys.modules['torch'] = None\nfrom patchclamp.cli import main\nsys.exit(main(['{command}']))\n"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "torch" in finished.stderr
    assert "pip install 'patchclamp[server]'" in finished.stderr
