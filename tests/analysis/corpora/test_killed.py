"""A process that is killed in the middle of a job."""

import os
import signal
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import corpus_worker
from corpus_runs import Asked, assert_equal, corpus, word_encoder
from engine_runs import loaded, started

from patchclamp_server.analysis.corpora.run import run_corpus
from patchclamp_server.artifacts.store import ArtifactStore


async def test_a_process_that_is_killed_loses_no_more_than_what_came_after_its_last_checkpoint(tmp_path: Path) -> None:
    program = [sys.executable, corpus_worker.__file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        tokens = kept = 0
        checkpoints = set[int]()
        for line in process.stdout:
            tokens, kept = map(int, line.split())
            checkpoints |= {kept} - {0}
            if len(checkpoints) == 2 and tokens > kept:
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert tokens > kept > 0

    whole, again = Asked(), Asked()
    with started(loaded("llama")) as engine:
        job = again.job(corpus(*corpus_worker.LENGTHS))
        checkpoint = job.checkpoint(ArtifactStore(tmp_path).checkpoints(), engine, corpus_worker.OFTEN)
        async with aclosing(run_corpus(engine, word_encoder(), job, checkpoint)) as events:
            first = await anext(events)
            finished = [event async for event in events]
        async for _ in run_corpus(engine, word_encoder(), whole.job(corpus(*corpus_worker.LENGTHS))):
            pass
    assert (first.resumed_tokens, first.tokens, first.refused) == (kept, kept, "")
    assert finished[-1].tokens > tokens
    assert_equal(again, whole)
