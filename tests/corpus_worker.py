"""A process that runs a job over a corpus, to be killed: python corpus_worker.py STORE. Prints its progress, and stands
still once it has windows behind its second checkpoint."""

import asyncio
import sys
import threading

from corpus_runs import Asked, corpus, word_encoder
from engine_runs import loaded, started

from patchclamp_server.analysis.corpora.checkpoint import CheckpointPolicy
from patchclamp_server.analysis.corpora.run import run_corpus
from patchclamp_server.artifacts.store import ArtifactStore

LENGTHS = (3, 20, 7, 1, 30, 15, 9, 40, 40, 40)
OFTEN = CheckpointPolicy(every_tokens=30, every_seconds=1e9)


async def work(store: str) -> None:
    with started(loaded("llama")) as engine:
        job, checkpoints = Asked().job(corpus(*LENGTHS)), list[int]()
        checkpoint = job.checkpoint(ArtifactStore(store).checkpoints(), engine, OFTEN)
        async for event in run_corpus(engine, word_encoder(), job, checkpoint):
            print(event.tokens, event.kept_tokens, flush=True)
            if event.kept_tokens not in (0, *checkpoints):
                checkpoints.append(event.kept_tokens)
            if len(checkpoints) == 2 and event.tokens > event.kept_tokens:
                threading.Event().wait()


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1]))
