"""The command line: what its arguments mean, and the exit status of wrong ones."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from patchclamp.cli import main
from patchclamp.cli.app import build_parser
from patchclamp.cli.extract import pairs_file
from patchclamp.cli.files import text_file
from patchclamp.cli.heads.circuit import clean_corrupt_file
from patchclamp.cli.heads.needles import needles_file
from patchclamp.cli.heads.score import facts_file
from patchclamp.cli.heads.selection import heads
from patchclamp.cli.options import generate_options, prompt_of
from patchclamp.cli.sparse_spec import guard, spec
from patchclamp.cli.steering import clamp, features, layer_list, program_of, steer
from patchclamp.programs import Program, generated, project_out, read_top_neurons
from patchclamp.requests import generate
from patchclamp.sparsity import QualityGuard, Sparsity, cats, fovea, griffin
from patchclamp.v1 import program_pb2 as pb
from patchclamp.v1 import sparse_policy_pb2


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


def test_clamp_names_the_site_behind_the_neurons() -> None:
    assert clamp("L1N3=0").site == pb.SITE_MLP_POST
    gate = clamp("L1N3,7@mlp_gate=..0,generated")
    assert (gate.site, gate.name) == (pb.SITE_MLP_GATE, "L1N3,7@mlp_gate")
    assert clamp("L1N3@mlp_up=2").site == pb.SITE_MLP_UP


def test_clamp_without_a_value_sets_the_neurons_of_a_stored_set_to_their_own_values() -> None:
    edit = clamp("dog,generated")
    assert (edit.neurons.neuron_set, list(edit.neurons.set.values), edit.name) == ("dog", [], "dog")
    assert edit.neurons.HasField("set")
    assert edit.scope == generated().message()


def test_clamp_holds_the_neurons_of_a_stored_set_at_a_value_or_within_bounds() -> None:
    assert list(clamp("sha256:ab12=3").neurons.set.values) == [3.0]
    bounded = clamp("L1-words@mlp_gate=..0")
    assert (bounded.neurons.neuron_set, bounded.site, bounded.neurons.clamp.max) == ("L1-words", pb.SITE_MLP_GATE, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "12N345=3",
        "L12N=3",
        "L12N345",
        "L12N3,7",
        "L12N345=a",
        "L12N345@attn_z=1",
        "L12N345=2..1",
        "L12N345=..",
        "dog=",
        "dog=a",
        "dog=2..1",
        "dog@attn_z",
        "dog,twice",
        "my dog",
    ],
)
def test_a_malformed_clamp_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        clamp(text)


def test_features_are_held_at_a_value_or_within_bounds() -> None:
    edit = features("sae#3,7=2.5")
    assert (edit.features.autoencoder, list(edit.features.features)) == ("sae", [3, 7])
    assert (list(edit.features.set.values), edit.site, edit.name) == ([2.5], pb.SITE_RESID_POST, "sae#3,7")
    bounds = features("sae-12#3@mlp_out=..0,generated")
    assert (bounds.features.clamp.max, bounds.features.clamp.HasField("min")) == (0.0, False)
    assert (bounds.site, bounds.scope.include[0].phase) == (pb.SITE_MLP_OUT, pb.PHASE_GENERATED)
    assert features("sha256:ab#3=1").features.autoencoder == "sha256:ab"


@pytest.mark.parametrize("text", ["sae", "sae#", "sae#3", "sae#3=", "sae#a=1", "sae#3=x", "sae#3@head=1", "sae#3=2..1"])
def test_malformed_features_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        features(text)


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
    request = generate(prompt_of(args), **generate_options(args))
    assert (request.prompt.text, request.sampling.temperature) == ("hi", 0.7)
    assert list(request.stop.strings) == ["a", "b"]
    assert request.HasField("logprobs")
    assert not request.sampling.HasField("seed")
    assert not request.stop.HasField("max_tokens")
    assert request.program == pb.Program()


def test_a_system_turn_makes_the_prompt_a_chat() -> None:
    args = parse("generate", "hi", "--system", "be brief")
    chat = generate(prompt_of(args), **generate_options(args)).prompt.chat
    assert [(m.role, m.content) for m in chat.messages] == [("system", "be brief"), ("user", "hi")]


def test_pairs_are_texts_or_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "be glad"}]
    file = tmp_path / "pairs.jsonl"
    lines = [{"positive": "glad", "negative": "sad"}, {"positive": chat, "negative": chat}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert pairs_file(str(file)) == [("glad", "sad"), (chat, chat)]


def test_a_policy_with_its_settings_is_one_argument() -> None:
    expected = Sparsity("mine", fovea(keep_ratio=0.5, first_layer=2, bits=3, exact_gate=True))
    assert spec("fovea:keep_ratio=.5,bits=3,exact_gate,first_layer=2,profile=mine").sparsity == expected
    assert spec("griffin").sparsity == Sparsity(policy=griffin())


def test_ratios_of_layers_are_parted_by_slashes() -> None:
    assert spec("cats:keep_ratio=.5/.25").sparsity.policy == cats(keep_ratio=[0.5, 0.25])


def test_another_ratio_takes_the_place_of_those_of_layers() -> None:
    assert spec("cats:keep_ratio=.5/.25").with_keep(0.4).sparsity.policy == cats(keep_ratio=0.4)


@pytest.mark.parametrize("ref", ["my-profile", "sha256:0abc"])
def test_what_names_no_policy_is_a_profile(ref: str) -> None:
    assert spec(ref).sparsity == Sparsity(ref)


def test_every_policy_of_the_contract_can_be_said() -> None:
    kinds = sparse_policy_pb2.SparsePolicy.DESCRIPTOR.oneofs_by_name["policy"].fields
    for kind in kinds:
        policy = spec(kind.name).sparsity.policy
        assert policy is not None
        assert policy.WhichOneof("policy") == kind.name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("foveal:bits=3", "'foveal' is no policy; accepted: dense, "),
        ("fovea:bit=3", "'bit' is unknown; accepted: keep_ratio, "),
        ("fovea:bits=three", "bits='three' is not a whole number"),
        ("cats:keep_ratio=half", "keep_ratio='half' is not"),
        ("fovea:exact_gate=yes", "expected exact_gate alone"),
        ("cats:keep_ratio", "expected keep_ratio=VALUE"),
        ("cats:keep_ratio=.5,keep_ratio=.4", "given twice"),
        ("teal:allocation=best", "accepted: uniform, greedy"),
        ("dense:keep_ratio=.5", "'keep_ratio' is unknown"),
        ("", "is no policy"),
    ],
)
def test_a_malformed_sparsity_is_refused_with_what_is_accepted(text: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(said)):
        spec(text)


def test_a_guard_is_on_or_has_settings() -> None:
    assert guard("on") == QualityGuard()
    assert guard("sample_rate=.5,window=4") == QualityGuard(sample_rate=0.5, window=4)


@pytest.mark.parametrize("text", ["", "off", "window=4.5", "rate=.5"])
def test_a_malformed_guard_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        guard(text)


def test_a_guard_of_a_dense_request_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hi", "--sparsity-guard", "on"]) == 2
    assert "--sparsity-guard needs --sparsity" in capsys.readouterr().err


def test_heads_are_listed_or_a_set() -> None:
    assert heads("L18H6,L17H3") == [(18, 6), (17, 3)]
    assert heads("retrieval") == "retrieval"
    assert heads("sha256:0abc") == "sha256:0abc"


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (needles_file, {"question": "q", "needle": "n", "answer": "a"}, {"question": "q", "needle": "n"}),
        (
            facts_file,
            {"prompt": "p", "answer": "a", "time_conditioned": False},
            {"prompt": "p", "answer": "a", "time_conditioned": "no"},
        ),
        (
            clean_corrupt_file,
            {"clean": "c", "corrupt": "d", "clean_answer": "a", "corrupt_answer": "b"},
            {"clean": ["c"], "corrupt": "d", "clean_answer": "a", "corrupt_answer": "b"},
        ),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(tmp_path: Path, read: Any, good: Any, bad: Any) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps(good))
    assert len(read(str(file))) == 1
    file.write_text(f"{json.dumps(good)}\n\n{json.dumps(bad)}\n")
    with pytest.raises(argparse.ArgumentTypeError, match=r"lines\.jsonl:3"):
        read(str(file))


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_a_text_file_without_text_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes(content)
    with pytest.raises(argparse.ArgumentTypeError, match=r"words\.txt"):
        text_file(str(file))


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"positive": "a"}',
        '{"positive": 1, "negative": "b"}',
        '{"positive": [{"role": "user", "content": 5}], "negative": "b"}',
        "[]",
    ],
)
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
        ["vectors", "extract", "joyful", "--corpus", "mine", "--data", "sentiment"],
        ["vectors", "tag", "joyful"],
        ["generate", "hi", "--sparsity", "foveal:bits=3"],
        ["generate", "hi", "--sparsity", "cats", "--sparsity-guard", "window=many"],
        ["score", "hi", " you", "--sparsity", "cats", "--sparsity-guard", "on"],
        ["sparsity"],
        ["sparsity", "calibrate", "mine", "--policy", "cats"],
        ["sparsity", "calibrate", "mine", "--policy", "a-profile", "--text", __file__],
        ["sparsity", "calibrate", "mine", "--policy", "cats", "--text", "missing.txt"],
        ["sparsity", "evaluate", "--text", __file__],
        ["sparsity", "core", "hello"],
        ["sparsity", "plot", __file__, "picture.docx"],
        ["sparsity", "plot", __file__, "missing/picture.png"],
        ["heads"],
        ["heads", "detect"],
        ["heads", "detect", "mine", "--lengths", "256;512"],
        ["heads", "detect", "mine", "--stop", "patience=3"],
        ["heads", "score", "intuition"],
        ["heads", "ablate", "L18H6,retrieval"],
        ["heads", "circuit", "ioi"],
        ["heads", "attribute", "The cat"],
        ["lens", "hello", "--neurons", "dogs"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_a_missing_file_is_named_once_and_in_words(tmp_path: Path) -> None:
    path = str(tmp_path / "missing.txt")
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        text_file(path)
    assert str(refused.value) == f"{path}: No such file or directory"


def test_a_file_that_cannot_be_read_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vectors", "put", "missing.gguf"]) == 2
    assert "missing.gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "largest"),
    [
        ("--seed", "-1", 2**64 - 1),
        ("--seed", str(2**64), 2**64 - 1),
        ("--top-k", "-1", 2**31 - 1),
        ("--max-tokens", str(2**31), 2**31 - 1),
        ("--logprobs", "two", 2**31 - 1),
    ],
)
def test_a_number_out_of_range_names_its_option_and_the_range(
    option: str, value: str, largest: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "hi", option, value])
    assert exit_.value.code == 2
    message = f"argument {option}: expected a whole number from 0 to {largest}, got {value!r}"
    assert message in capsys.readouterr().err


def test_an_offset_may_be_below_zero_and_has_a_range(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["vectors", "put", "v.gguf", "--layer-offset", "-2147483649"])
    assert exit_.value.code == 2
    assert "expected a whole number from -2147483648 to 2147483647, got '-2147483649'" in capsys.readouterr().err


def options_below(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options_below(below)
        else:
            yield action


def test_every_whole_number_of_the_command_line_has_a_range() -> None:
    actions = list(options_below(build_parser()))
    assert len(actions) > 200
    assert [action.option_strings for action in actions if action.type is int] == []


def test_a_layer_beyond_all_numbers_is_the_fault_of_its_argument() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"'v@99999999999:1': layers\[0\]: expected an int from 0"):
        steer("v@99999999999:1")
    with pytest.raises(argparse.ArgumentTypeError, match=r"layers\[0\]: expected an int from 0"):
        clamp("L99999999999N1=0")


@pytest.mark.parametrize("command", ["generate", "score", "compare", "tokenize", "detokenize", "models", "health"])
def test_every_command_can_answer_in_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "-h"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["extract", "list", "get", "put", "export", "rm", "tag"])
def test_every_action_on_vectors_can_answer_in_json(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["vectors", action, "-h"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["calibrate", "evaluate", "core", "plot"])
def test_every_action_on_sparsity_can_answer_in_json(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sparsity", action, "-h"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["list", "status", "follow", "cancel"])
def test_every_action_on_jobs_can_answer_in_json(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["jobs", action, "-h"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["detect", "score", "ablate", "circuit", "ground", "compare", "attribute"])
def test_every_action_on_heads_can_answer_in_json(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["heads", action, "-h"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "pull"])
def test_a_server_command_without_the_extra_says_what_to_install(command: str) -> None:
    code = f"import sys\nsys.modules['torch'] = None\nfrom patchclamp.cli import main\nsys.exit(main(['{command}']))\n"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "torch" in finished.stderr
    assert "pip install '.[server]'" in finished.stderr
