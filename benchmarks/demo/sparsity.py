"""Sparse decoding in the demo: a profile is calibrated, and requests of several policies decode in one batch."""

from pathlib import Path

from demo.output import show_progress
from patchclamp import Client
from patchclamp.requests import GenerateOptions
from patchclamp.sparsity import QualityGuard, Sparsity, SparsityLike, cats, fovea, griffin

# Public-domain prose, of which another part is what needles are hidden in.
TEXT = Path(__file__).parents[2] / "server/patchclamp_server/analysis/data/ordinary.txt"
PROFILE = "prose"
PROMPT = "Once upon a time there was a king who had"


def show_sparsity(client: Client, sampling: GenerateOptions) -> list[str]:
    """Prints the quality card and the texts with their reports. Returns what should not be."""
    policy = fovea(keep_ratio=0.5, uniform_budget=True)
    text = TEXT.read_text(encoding="utf-8")
    text = text[: len(text) // 3]  # about 13 documents: less than a minute
    job = client.calibrate_profile(policy, text, document_tokens=256, tags=[PROFILE], text_description=TEXT.name)
    with job as stream:
        profile = stream.result(show_progress)
    quality, control = profile.quality, profile.random_control
    print(
        f"fovea at keep 0.5, on {quality.scored_tokens} tokens that calibration did not see: perplexity "
        f"x{quality.perplexity_ratio:.3f} of dense,\nthe same most likely token at {quality.top1_agreement:.0%}; "
        f"a random half of the neurons: x{control.perplexity_ratio:.1f}, {control.top1_agreement:.0%}\n"
    )
    guarded = Sparsity(PROFILE, guard=QualityGuard(sample_rate=0.25, window=4))
    strict = Sparsity(policy=griffin(keep_ratio=0.1), guard=QualityGuard(max_divergence=0.5, sample_rate=0.5, window=2))
    asked: list[SparsityLike | None] = [None, guarded, cats(keep_ratio=0.5), griffin(keep_ratio=0.5), strict]
    streams = [client.generate(PROMPT, **sampling, sparsity=each) for each in asked]
    problems = []
    for each, stream in zip(asked, streams, strict=True):
        result = stream.result()
        print(f"{PROMPT}{result.text}".replace("\n", " "))
        print(f"  {result.sparsity or 'dense'}\n")
        if each is not None and (result.sparsity is None or result.sparsity.sparse_tokens == 0):
            problems.append("a sparse request computed no token sparsely")
        if each is strict and result.sparsity is not None:
            guard = result.sparsity.guard
            if guard is None or guard.dense_from is None:
                problems.append("a tenth of the neurons drifted from the dense model, and the guard let it")
    return problems
