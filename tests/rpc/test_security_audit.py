"""The audit log of a server: who did what to the model and to the artifacts, and never what was said."""

from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from safetensors.torch import save
from secured import Stream, generation, secured, until
from test_bad_input import add, griffin

from patchclamp import Client
from patchclamp.monitoring import watch_neurons
from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1 import sparse_policy_pb2 as sparse

SECRET = "the secret of the prompt"


@pytest.fixture(scope="module")
def entries(live_server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the log holds after a server has answered calls of every kind that it records, and some it does not."""
    with secured(live_server.model, tmp_path_factory.mktemp("audit"), "research") as server:
        address, token = server.server.address, server.tokens["research"]
        with grpc.insecure_channel(address) as channel, Client(address, token=token) as client:
            client.models()
            server.generate(channel, "research", request())
            stored = client.put_artifact(save({"layer.1": torch.ones(32)}), tags=["joy"])
            server.generate(channel, "research", request(program=program.Program(edits=[steered("joy")])))
            client.tag_artifact("joy-2", "joy")
            client.untag_artifact("joy-2")
            stream = Stream(channel, server.metadata("research"), program=program.Program(edits=[steered("joy")]))
            stream.set_strength("steer", 0.25)
            stream.tokens(4)
            stream.end()
            server.generate(channel, "research", request(sparsity=sparse.Sparsity(policy=griffin())))
            server.refused(channel, "research", request(program=program.Program(edits=[add(layers=[9])])))
            client.delete_artifact(stored.id)
            client.create_watch([watch_neurons("some", 0, [1, 2])], tags=["suspects"])
            client.start_watch("suspects", "watch")
            client.stop_watch("watch")
            client.list_watches()
    assert server.audit()
    assert token not in (server.directory / "audit").read_text()
    return server.audit()


def request(**fields: Any) -> pb.GenerateRequest:
    stop = pb.StopConditions(max_tokens=8, ignore_eos=True)
    return generation(prompt=pb.Prompt(text=SECRET), stop=stop, **fields)


def steered(ref: str) -> program.Edit:
    return add(name="steer", strength=0.5, add=program.AddVector(vector=program.Vector(artifact=ref)))


def of(entries: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["method"] == method]


def test_calls_that_change_nothing_are_not_in_it(entries: list[dict[str, Any]]):
    assert not of(entries, "ModelService/ListModels")
    # Neither is one without edits, nor one that was refused before it ran.
    assert len(of(entries, "GenerationService/Generate")) == 2


def test_an_edited_request_says_who_did_what_and_what_it_touched(entries: list[dict[str, Any]]):
    entry = of(entries, "GenerationService/Generate")[0]
    [edited] = entry["programs"]
    assert (entry["tenant"], entry["code"]) == ("research", "OK")
    assert len(entry["token"]) == 12
    assert entry["time"].endswith("+00:00")
    assert edited["fingerprint"].startswith("sha256:")
    assert edited["edits"] == [{"name": "steer", "kind": "add", "site": "resid_post", "layers": [1], "strength": 0.5}]
    assert edited["touched"]
    # Every token of the prompt, and every generated one but the last, which was not put in.
    assert edited["rows"] == len(SECRET) + 7
    assert (entry["prompt_tokens"], entry["generated_tokens"]) == (len(SECRET), 8)


def test_artifacts_are_named_by_id(entries: list[dict[str, Any]]):
    entry = of(entries, "GenerationService/Generate")[0]
    stored = of(entries, "ArtifactService/Upload")[0]["changes"][0]["artifact"]
    assert stored.startswith("sha256:")
    assert entry["artifacts"] == [stored]


def test_changes_of_artifacts_are_in_it(entries: list[dict[str, Any]]):
    changes = [(c["action"], c["tags"]) for entry in entries for c in entry["changes"]]
    of_the_vector = [("put", ["joy"]), ("tag", ["joy-2"]), ("untag", ["joy-2"]), ("delete", ["joy"])]
    assert changes == [*of_the_vector, ("put", ["suspects"])]


def test_strengths_that_change_in_a_session_are_in_it(entries: list[dict[str, Any]]):
    [entry] = of(entries, "GenerationService/Session")
    assert entry["strengths"] == [{"edit": "steer", "strength": 0.25}]
    assert entry["programs"][0]["finished"] == 1


def test_a_sparse_policy_is_in_it(entries: list[dict[str, Any]]):
    entry = of(entries, "GenerationService/Generate")[1]
    assert (entry["programs"], entry["sparsity"]) == ([], [{"policy": "griffin", "profile": ""}])


def test_changes_of_watches_are_in_it(entries: list[dict[str, Any]]):
    started, stopped = of(entries, "MonitoringService/StartWatch"), of(entries, "MonitoringService/StopWatch")
    assert [entry["arguments"] for entry in started] == [{"name": "watch", "watch": "suspects"}]
    assert [entry["arguments"] for entry in stopped] == [{"name": "watch"}]
    assert of(entries, "MonitoringService/CreateWatch")
    assert not of(entries, "MonitoringService/ListWatches")


def test_no_prompt_is_in_it(entries: list[dict[str, Any]]):
    assert not any("prompts" in entry for entry in entries)
    assert SECRET not in str(entries)


def test_prompts_are_recorded_where_the_operator_asks_for_them(live_server: LiveServer, tmp_path: Path):
    edits = program.Program(edits=[add()])
    with (
        secured(live_server.model, tmp_path, "research", audit_prompts=True) as server,
        grpc.insecure_channel(server.server.address) as channel,
    ):
        server.generate(channel, "research", request(program=edits))
    assert [entry["prompts"] for entry in server.audit()] == [[SECRET]]


def test_a_full_disk_does_not_stop_serving(live_server: LiveServer, tmp_path: Path):
    edits = program.Program(edits=[add()])
    with (
        secured(live_server.model, tmp_path, "research", audit_log="/dev/full") as server,
        grpc.insecure_channel(server.server.address) as channel,
    ):
        for _ in range(2):
            assert server.generate(channel, "research", request(program=edits))
        # The line is written after the status has gone out.
        until(lambda: server.server.metric("patchclamp_audit_lines_lost_total") == 2)
