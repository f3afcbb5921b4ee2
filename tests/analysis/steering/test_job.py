"""What a job refuses before it asks the engine for anything."""

from dataclasses import replace
from pathlib import Path

import pytest
from steering_fixtures import Recorded

from patchclamp_server.analysis.steering.examples import TokenPair
from patchclamp_server.analysis.steering.job import Extraction, extract
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder


async def test_activations_that_would_not_fit_into_memory_are_refused(
    recorded: Recorded, tiny_llama: LoadedModel, tmp_path: Path
) -> None:
    wide = replace(tiny_llama.info, sites={Site.RESID_POST: 2**30})
    pairs = (TokenPair((3,), (4,)),) * 3
    job = Extraction("difference_of_means", pairs, Site.RESID_POST, (0,), Pooling.LAST_TOKEN)
    prompts = PromptEncoder(tiny_llama.tokenizer, tiny_llama.info)
    with pytest.raises(InvalidArgument, match="send fewer pairs or name fewer layers") as refused:
        await anext(extract(recorded.engine, ArtifactStore(tmp_path), wide, prompts, job))
    assert refused.value.field == "pairs"
    assert recorded.engine.stats().steps == 0
