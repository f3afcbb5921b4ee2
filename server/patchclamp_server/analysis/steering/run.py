"""The job of each method of ExtractVectors."""

from collections.abc import AsyncGenerator
from typing import TypeAlias

from patchclamp_server.analysis.exclusive import ExclusiveJobs
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.causal_inner_product import CausalInnerProduct, causal_inner_product
from patchclamp_server.analysis.steering.definition import DefinitionVector, definition_vector
from patchclamp_server.analysis.steering.job import Extraction, extract
from patchclamp_server.analysis.steering.reft_r1.job import ReftR1, reft_r1
from patchclamp_server.analysis.steering.result import Result
from patchclamp_server.analysis.steering.task_vector import TaskVector, task_vector
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.text.prompt import PromptEncoder

ExtractionJob: TypeAlias = Extraction | TaskVector | DefinitionVector | CausalInnerProduct | ReftR1


def run(
    engine: Engine,
    store: ArtifactStore,
    info: ModelInfo,
    prompts: PromptEncoder,
    door: ExclusiveJobs,
    job: ExtractionJob,
) -> AsyncGenerator[Progress | Result, None]:
    """Returns the events of a job; one that works at the engine's exclusive door waits for its turn."""
    match job:
        case Extraction():
            return extract(engine, store, info, prompts, job)
        case TaskVector():
            return task_vector(engine, store, info, job)
        case DefinitionVector():
            return definition_vector(engine, store, info, job)
        case CausalInnerProduct():
            return door.follow(causal_inner_product(engine, store, info, job))
        case ReftR1():
            return door.follow(reft_r1(engine, store, info, prompts, job))
