"""How a call becomes a job of analysis, whatever the service: what is refused first, how it ends, and what it tells."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import descriptor_pool, message_factory

from patchclamp.v1 import head_pb2 as pb
from patchclamp_server.analysis.exclusive import ExclusiveJobs
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, ArtifactKind, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import AlreadyExists, InvalidArgument, NotFound
from patchclamp_server.model.load import load_model
from patchclamp_server.rpc.call.analysis_jobs import AnalysisJobs
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.rpc.contract import SERVICES
from patchclamp_server.text.prompt import PromptEncoder


@dataclass(frozen=True)
class Counting:
    """A job of a few steps."""

    steps: int = 3
    tags: Tags = NO_TAGS


@pytest.fixture(scope="module")
def jobs(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnalysisJobs]:
    model = load_model(str(tiny_llama_dir))
    prompts = PromptEncoder(model.tokenizer, model.info)
    store = ArtifactStore(str(tmp_path_factory.mktemp("artifacts")))
    yield AnalysisJobs(Engine(model), prompts, store, model.info, ExclusiveJobs())
    prompts.close()


class Counted:
    """A job's work, which tells how far it came."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.begun = 0
        self.closed = False

    async def __call__(self, job: Counting) -> AsyncGenerator[Progress, None]:
        self.begun += 1
        try:
            for step in range(job.steps):
                yield Progress("steps", step + 1, job.steps)
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


def encode(event: Progress) -> pb.FindCircuitResponse:
    return encode_progress(event, pb.FindCircuitResponse)


@pytest.mark.parametrize("exclusive", [False, True])
async def test_every_event_of_a_job_is_a_response(jobs: AnalysisJobs, exclusive: bool) -> None:
    responses = jobs.stream(pb.FindCircuitRequest(), Counting, Counted(), encode, exclusive=exclusive)

    told = [(r.progress.stage, r.progress.done, r.progress.total) async for r in responses]

    assert told == [("steps", 1, 3), ("steps", 2, 3), ("steps", 3, 3)]


@pytest.mark.parametrize("exclusive", [False, True])
async def test_a_job_is_closed_with_the_stream_of_its_responses(jobs: AnalysisJobs, exclusive: bool) -> None:
    work = Counted()
    responses: Any = jobs.stream(pb.FindCircuitRequest(), Counting, work, encode, exclusive=exclusive)

    async with aclosing(responses):
        await anext(responses)

    assert work.closed


async def test_a_job_for_another_model_is_not_decoded(jobs: AnalysisJobs) -> None:
    def decode() -> Counting:
        raise AssertionError

    with pytest.raises(NotFound, match="model"):
        await jobs.begin(pb.FindCircuitRequest(model="another"), decode)


async def test_a_job_whose_tag_is_taken_does_not_begin(jobs: AnalysisJobs) -> None:
    taken = {"model_fingerprint": jobs.model.fingerprint, "tags": Tags(("taken",))}
    jobs.store.put(ArtifactKind.HEAD_SET, {"scores": torch.ones(2, 4)}, **taken)
    work = Counted()

    with pytest.raises(AlreadyExists, match=r"tags\[0\]"):
        _ = [
            response
            async for response in jobs.stream(
                pb.FindCircuitRequest(), lambda: Counting(tags=Tags(("taken",))), work, encode
            )
        ]

    assert work.begun == 0


@pytest.mark.parametrize(("field", "named"), [("prompt", "facts"), ("prompt.text", "prompt.text"), ("seed", "seed")])
async def test_an_error_of_the_engine_names_the_field_of_the_job(jobs: AnalysisJobs, field: str, named: str) -> None:
    work = Counted(InvalidArgument(field, "too long"))

    with pytest.raises(InvalidArgument) as refused:
        _ = [
            response
            async for response in jobs.stream(
                pb.FindCircuitRequest(), Counting, work, encode, fields={"prompt": "facts"}
            )
        ]

    assert refused.value.field == named


def responses_with_stages() -> list[Any]:
    pool = descriptor_pool.Default()
    methods = [method for name in SERVICES for method in pool.FindServiceByName(name).methods]
    found = []
    for method in methods:
        progress = method.output_type.fields_by_name.get("progress")
        if progress is not None and "stage" in progress.message_type.fields_by_name:
            found.append(message_factory.GetMessageClass(method.output_type))
    return found


@pytest.mark.parametrize("response", responses_with_stages(), ids=lambda response: str(response.DESCRIPTOR.name))
def test_progress_of_every_job_is_encoded_alike(response: Any) -> None:
    told = encode_progress(Progress("layers", 2, 5), response)

    assert type(told) is response
    assert (told.progress.stage, told.progress.done, told.progress.total) == ("layers", 2, 5)


def test_there_are_jobs_that_report_stages() -> None:
    assert len(responses_with_stages()) >= 7
