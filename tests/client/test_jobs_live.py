"""Jobs from both clients and the command line, against a whole server of a tiny random llama."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer
from patience import PATIENCE_SECONDS

from patchclamp import AsyncClient, Client, PatchclampError, requests
from patchclamp.cli import main
from patchclamp.monitoring import watch_neurons
from patchclamp.results import Artifact, ExtractionResult, Progress
from patchclamp.sparsity import cats, griffin
from patchclamp_server.model.load import load_model

PAIRS = [(f"{i} good!", f"{i} bad?") for i in range(4)]
TEXT = "Green bottles are hanging on the wall. " * 8


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """With a watch that sees nothing until something is generated: a recording of it has no end."""
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("job_artifacts")) as live:
        with Client(live.address) as client:
            client.create_watch([watch_neurons("n", 0, [1])], tags=["quiet"])
            client.start_watch("quiet")
        yield live


@pytest.fixture
def client(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)
    with Client(server.address) as client:
        yield client


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"positive": good, "negative": bad}) for good, bad in PAIRS))
    return str(file)


def extraction(**options: Any) -> Any:
    return requests.extract_vectors(PAIRS, **options)


def endless() -> Any:
    return requests.record_reference("quiet", tokens=1000)


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_job_outlives_its_client_and_finds_what_a_call_finds(server: LiveServer, client: Client):
    with Client(server.address) as first:
        job = first.start_job(extraction())
        assert (job.method, job.state, job.ended) == ("SteeringService/ExtractVectors", "running", "")
    found = client.follow_job(job.id).result()
    assert found == client.extract_vectors(PAIRS).result()
    done = client.job(job.id)
    assert (done.state, done.stage, done.done, done.error) == ("succeeded", "evidence", done.total, "")
    assert done.ended > done.created


def test_a_follower_sees_the_events_of_the_method(client: Client):
    job = client.start_job(extraction(layers=[0]))
    events = list(client.follow_job(job.id))
    assert {type(event) for event in events} == {Progress, ExtractionResult}


def test_an_evaluation_is_followed_to_its_end_without_knowing_how_many_come(client: Client):
    job = client.start_job(requests.evaluate_profile([cats(keep_ratio=0.5), griffin(keep_ratio=0.5)], TEXT))
    found = client.follow_job(job.id).result()
    assert isinstance(found, tuple)
    assert [(each.index, each.policy) for each in found] == [(0, "cats"), (1, "griffin")]


def test_a_failed_job_says_why_to_whoever_asks_and_whoever_follows(client: Client):
    job = client.start_job(extraction(layers=[9]))
    with pytest.raises(PatchclampError) as caught:
        client.follow_job(job.id).result()
    assert (caught.value.code, caught.value.violations[0].field) == ("INVALID_ARGUMENT", "layers[0]")
    failed = client.job(job.id)
    assert (failed.state, failed.error_code, failed.error) == ("failed", "INVALID_ARGUMENT", caught.value.message)


def test_a_job_is_cancelled_by_its_id_and_not_by_leaving(client: Client):
    job = client.start_job(endless())
    with client.follow_job(job.id) as following:
        assert next(following) == Progress("tokens", 0, 1000)
    assert client.job(job.id).state == "running"
    assert client.cancel_job(job.id).state == "cancelled"
    with pytest.raises(PatchclampError, match="CANCELLED"):
        client.follow_job(job.id).result()


async def test_the_async_client_runs_jobs_too(server: LiveServer):
    async with AsyncClient(server.address) as client:
        job = await client.start_job(requests.record_reference("quiet", tokens=2))
        assert (await client.jobs())[0].id == job.id
        await client.generate("hello", max_tokens=4, ignore_eos=True).result()
        found = await client.follow_job(job.id).result()
        assert isinstance(found, Artifact)
        assert (await client.job(job.id)).state == "succeeded"
        assert (await client.cancel_job(job.id)).state == "succeeded"


def test_a_detached_command_is_followed_to_what_it_stored(
    client: Client, pairs: str, capsys: pytest.CaptureFixture[str]
):
    extract = ["vectors", "extract", "detached", "--pairs", pairs]
    assert main([*extract, "--detach"]) == 0
    job_id = capsys.readouterr().out.strip()
    assert main(["jobs", "follow", job_id]) == 0
    stored = client.get_artifact("detached").id
    printed = capsys.readouterr()
    assert "held-out accuracy" in printed.out
    assert f"stored as detached = {stored}" in printed.err
    again = json_of(capsys, *extract, "--layers", "1", "--replace", "--detach")["id"]
    assert main(["jobs", "follow", again]) == 0
    assert f"moved detached from {stored} (still stored)" in capsys.readouterr().err
    assert json_of(capsys, "jobs", "follow", again)["artifact"]["replaced_tags"] == {"detached": stored}


def test_jobs_are_listed_shown_and_cancelled(client: Client, capsys: pytest.CaptureFixture[str]):
    assert main(["watch", "reference", "quiet", "usual", "--tokens", "1000", "--detach"]) == 0
    job_id = capsys.readouterr().out.strip()
    assert main(["jobs", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{job_id}  MonitoringService/RecordReference  running")
    assert main(["jobs", "cancel", job_id]) == 0
    assert "cancelled" in capsys.readouterr().out
    assert json_of(capsys, "jobs", "status", job_id)["state"] == "cancelled"
    assert json_of(capsys, "jobs", "list")[0]["id"] == job_id
    assert main(["jobs", "follow", job_id]) == 1


def test_the_reason_of_a_failed_job_is_shown_and_following_it_exits_with_1(
    client: Client, capsys: pytest.CaptureFixture[str]
):
    job = client.start_job(extraction(layers=[9]))
    assert main(["jobs", "follow", job.id]) == 1
    assert "layers[0]" in capsys.readouterr().err
    assert main(["jobs", "status", job.id]) == 0
    shown = capsys.readouterr().out
    assert "failed (INVALID_ARGUMENT)" in shown
    assert "layers[0]" in shown


def test_an_interrupted_follower_leaves_the_job_running_and_says_so(client: Client):
    job = client.start_job(endless())
    follow = [sys.executable, "-m", "patchclamp", "jobs", "follow", job.id]
    # A shell that runs the tests in the background has them ignore the signal, and their children too.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(follow, stderr=subprocess.PIPE, text=True, preexec_fn=listening) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "tokens 0/1000\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert f"{job.id} goes on; `patchclamp jobs cancel {job.id}` ends it" in said
    assert client.cancel_job(job.id).state == "cancelled"


def test_a_detached_patching_is_followed_to_its_heat_maps(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "patches.jsonl"
    file.write_text(json.dumps({"clean": "It is good", "corrupt": "It is evil", "answer": "!", "other_answer": "?"}))
    patch = ["activations", "patch", str(file), "--sites", "resid_pre", "--positions", "last=-1"]
    assert main([*patch, "--detach"]) == 0
    assert main(["jobs", "follow", capsys.readouterr().out.strip()]) == 0
    followed = capsys.readouterr().out
    assert "resid_pre at last" in followed
    assert main(patch) == 0
    assert capsys.readouterr().out == followed
