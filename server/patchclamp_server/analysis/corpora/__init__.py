"""Statistics over a corpus of any length, by reducers on the device, in memory that does not grow with it.

    windows.py      documents → windows of tokens, tokenised one document at a time, and back from a window to its text
    run.py          the windows through the engine as low-priority requests; progress, cancellation
    checkpoint.py   what is written down between two windows, so that the same job goes on after a restart

A job over a corpus:

    firing, largest = Firing(layers), TopK(layers, 10)
    job = CorpusJob(corpus, (Reduction(Site.MLP_POST, firing), Reduction(Site.MLP_POST, largest)))
    checkpoint = job.checkpoint(store.checkpoints(), engine)
    async with aclosing(run_corpus(engine, encoder, job, checkpoint)) as progress:
        async for event in progress:
            ...
    artifact = store.put(...)        # of what firing and largest have now
    checkpoint.remove()
"""
