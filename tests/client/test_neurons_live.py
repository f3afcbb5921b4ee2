"""Neuron sets from the client and the command line, against a whole server of a tiny random llama (2 x 64 neurons)."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import LiveServer

from patchclamp import AsyncClient, Client, PatchclampError, requests
from patchclamp.cli import main
from patchclamp.neurons import FactsTest, TextsTest
from patchclamp.programs import set_neurons
from patchclamp.results import FoundNeurons, NeuronEditPoint
from patchclamp_server.model.load import load_model

SETS = {"one": {"0": [1, 2, 3], "1": [5]}, "two": {"1": [5, 6], "0": [3]}}


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One of its own, with imported neuron sets in its store."""
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("neuron_artifacts")) as live:
        with Client(live.address) as client:
            for tag, lists in SETS.items():
                data = json.dumps(lists).encode()
                client.put_artifact(data, kind="neuron_set", format="neuron_set_json", tags=[tag])
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def test_a_neuron_set_in_json_comes_back_as_it_was_sent(client: Client):
    assert json.loads(client.download_artifact("one", "neuron_set_json")) == SETS["one"]
    assert client.get_artifact("one").kind == "neuron_set"


def test_an_imported_set_is_clamped_in_the_next_call(client: Client):
    options = {"max_tokens": 4, "ignore_eos": True}
    result = client.generate("hello", program=set_neurons("one", 3.0, name="one"), **options).result()  # type: ignore[arg-type]
    assert [(edit.name, edit.rows > 0) for edit in result.receipt.edits] == [("one", True)]


def test_neuron_sets_are_compared(client: Client):
    [found] = client.compare_neuron_sets(["one", "two"])
    assert (found.common, found.jaccard, found.overlap_coefficient) == (2, 2 / 5, 2 / 3)
    assert [(each.layer, each.neurons) for each in found.common_by_layer] == [(0, 1), (1, 1)]
    assert 0.0 < found.expected_common < 1.0
    assert 0.0 < found.p_value < 0.05


def test_the_best_of_sets_without_scores_are_refused_by_field(client: Client):
    with pytest.raises(PatchclampError) as refused:
        client.compare_neuron_sets(["one", "two"], top_k=2)
    assert (refused.value.code, refused.value.violations[0].field) == ("FAILED_PRECONDITION", "top_k")


async def test_the_async_client_does_the_same(server: LiveServer):
    async with AsyncClient(server.address) as client:
        [found] = await client.compare_neuron_sets(["one", "two"])
    assert found.common == 2


@pytest.fixture
def command_line(server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("command_line")
def test_the_command_line_tells_neurons_from_head_scores_in_json(capsys: pytest.CaptureFixture[str]):
    Path("neurons.json").write_text('{"0": [1, 7]}')
    heads = {f"{layer}-{head}": [0.5] for layer in range(2) for head in range(4)}
    Path("heads.json").write_text(json.dumps(heads))
    assert main(["vectors", "put", "neurons.json", "--name", "by-hand"]) == 0
    assert "neuron_set" in capsys.readouterr().out
    assert main(["vectors", "put", "heads.json", "--name", "heads"]) == 0
    assert "head_set" in capsys.readouterr().out
    for ref, held in (("by-hand", {"0": [1, 7]}), ("heads", heads)):
        assert main(["vectors", "export", ref, "-o", "back.json"]) == 0
        assert json.loads(Path("back.json").read_text()) == held
    assert main(["neurons", "compare", "by-hand", "one"]) == 0
    assert "by-hand, one" in capsys.readouterr().out


@pytest.mark.usefixtures("command_line")
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"layer": [1]}', "3"])
def test_json_of_neither_kind_is_refused_before_it_is_sent(content: str, capsys: pytest.CaptureFixture[str]):
    Path("file.json").write_text(content)
    assert main(["vectors", "put", "file.json"]) == 2
    assert capsys.readouterr().err.startswith("error: file.json: ")


@pytest.mark.usefixtures("command_line")
def test_an_artifact_that_json_cannot_hold_is_told_what_can(client: Client, capsys: pytest.CaptureFixture[str]):
    pairs = [("good day", "bad day"), ("good tea", "bad tea"), ("good idea", "bad idea"), ("good dog", "bad dog")]
    client.extract_vectors(pairs, layers=[0], tags=["joy"]).result()
    assert main(["vectors", "export", "joy", "-o", "joy.json"]) == 2
    said = "JSON holds a head_set or neuron_set or feature_labels, not a vector"
    assert capsys.readouterr().err == f"error: joy.json: {said}\n"


def test_neurons_of_a_word_are_found_decoded_and_clamped_in_the_next_call(client: Client):
    found = client.find_neurons("a", top_k=3, value=5.0, tags=["letter"], replace_tags=True).result().found
    assert (found.neurons, len(found.best), found.artifact.tags) == (3, 3, ("letter",))
    assert [each.score for each in found.best] == sorted((each.score for each in found.best), reverse=True)
    assert {abs(each.value or 0.0) for each in found.best} == {5.0}
    decoded = client.decode_neurons("letter", top_k=1, tokens=4).result()
    assert [each.neuron for each in decoded] == [found.best[0].neuron]
    assert [len(row.top) for row in decoded[0].rows] == [4] * len(decoded[0].rows)
    result = client.generate("hello", program=set_neurons("letter", name="letter"), max_tokens=4).result()
    assert [edit.name for edit in result.receipt.edits] == ["letter"]


def test_an_edit_of_neurons_is_measured_beside_random_sets(client: Client):
    events: list[object] = []
    facts, prose = FactsTest("facts", [("ab", "c"), ("de", "f")]), TextsTest("prose", "The rain in Spain. " * 4)
    stream = client.evaluate_neuron_edit("one", "zero", facts, sides=prose, fractions=[0.5, 1], random_sets=2)
    effect = stream.result(events.append)
    points = [event for event in events if isinstance(event, NeuronEditPoint)]
    assert [(each.fraction, each.neurons) for each in points] == [(0.5, 2), (1.0, 4)]
    assert set(effect.neurons) == {(0, 1), (0, 2), (0, 3), (1, 5)}
    measured = [(each.test, each.side, each.metric) for each in effect.points[1].measurements]
    assert {("facts", False, "accuracy"), ("prose", True, "divergence")} <= set(measured)
    assert all(len(each.random) == 2 for each in effect.points[1].measurements)


def test_a_call_that_is_a_job_is_followed_to_what_it_found(client: Client):
    job = client.start_job(requests.find_neurons("a", top_k=2, tags=["by-job"], replace_tags=True))
    assert job.method == "NeuronService/FindNeurons"
    found = client.follow_job(job.id).result()
    assert isinstance(found, FoundNeurons)
    assert found.found.artifact.tags == ("by-job",)


@pytest.mark.usefixtures("command_line")
def test_the_command_line_finds_decodes_and_tests_neurons(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    Path("facts.tsv").write_text("ab\tc\nde\tf\n")
    assert main(["neurons", "find", "a", "--name", "found", "--top", "3", "--picture", "layers.png"]) == 0
    assert "stored as found = sha256:" in capsys.readouterr().err
    assert main(["neurons", "decode", "found", "--top", "1", "--weights", "down"]) == 0
    assert "down" in capsys.readouterr().out
    evaluate = ["--target", "facts.tsv", "--fractions", "1", "--random-sets", "2", "--picture", "dose.png"]
    assert main(["neurons", "evaluate", "found", "--mode", "clamp", *evaluate]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert Path("layers.png").exists()
    assert Path("dose.png").exists()


@pytest.mark.usefixtures("command_line")
def test_a_census_that_is_followed_ends_with_its_table_and_the_names_of_its_sets(capsys: pytest.CaptureFixture[str]):
    Path("rain.txt").write_text("the cat sat on the mat and it rained\n" * 8)
    census = ["neurons", "census", "usual", "--texts", "rain.txt", "--rare-below", "0.4", "--always-from", "0.6"]
    assert main([*census, "--detach"]) == 0
    job_id = capsys.readouterr().out.strip()
    assert main(["jobs", "follow", job_id]) == 0
    printed = capsys.readouterr()
    assert "always on" in printed.out
    assert "stored as usual-rare = sha256:" in printed.err
    assert "stored as usual-always = sha256:" in printed.err


@pytest.mark.usefixtures("command_line")
def test_a_stored_set_is_clamped_by_its_name_on_the_command_line(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "hello", "--clamp", "one=3,generated", "--max-tokens", "3", "--ignore-eos"]) == 0
    assert "one: " in capsys.readouterr().err


@pytest.mark.usefixtures("command_line")
def test_a_set_without_values_is_named_where_it_is_to_be_set_to_them(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "hello", "--clamp", "one", "--max-tokens", "3"]) == 1
    assert "a value is needed: one carries none of its own" in capsys.readouterr().err
