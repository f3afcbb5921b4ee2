"""Retrieval heads in the demo: they are found, what they do is tested, and an answer is grounded in its prompt."""

from demo.output import show_progress
from patchclamp import Client
from patchclamp.heads import Grounding, NeedleTest

HEADS = "retrieval"
# Small enough to wait for; benchmarks/heads.py has the full measurement.
DETECTION = NeedleTest(lengths=[256, 384], depths=[0.3, 0.7], max_runs=24)
ABLATION = NeedleTest(lengths=[256], depths=[0.5], max_runs=12)
PROMPT = (
    "Here is a page of a diary.\n\nMonday. It rained, and we stayed in. Tuesday. Aunt Josefina hid the spare key under "
    "the blue flower pot behind the greenhouse. Wednesday. The cat was back.\n\nQuestion: Where did Aunt Josefina hide "
    "the spare key? Answer: Aunt Josefina hid the spare key"
)


def show_heads(client: Client) -> list[str]:
    """Prints the best heads, needles without them, and a grounded answer. Returns what should not be."""
    with client.detect_retrieval_heads(DETECTION, tags=[HEADS]) as stream:
        found = stream.result(show_progress)
    best = ", ".join(f"{score.head} {score.score:.2f}" for score in found.scores[:5])
    print(
        f"{found.successes} of {len(found.runs)} needles were answered; {found.fraction_above_threshold:.1%} of "
        f"{len(found.scores)} heads copied at least {found.threshold:.0%} of them: {best}"
    )
    ablation = client.evaluate_head_edit(HEADS, "uniform", top_k=3, test=ABLATION, random_sets=3)
    with ablation as stream:
        effect = stream.result(show_progress)
    before, after = effect.unedited, effect.edited
    print(
        f"needles answered, of {before.runs}: {before.successes}; without the 3 best heads {after.successes}, "
        f"without 3 random ones {effect.random_success_mean:.1f} on average"
    )
    answer = client.generate(PROMPT, max_tokens=16, grounding=Grounding(HEADS, top_k=5)).result()
    print(f"\n... Aunt Josefina hid the spare key{answer.text}\n  {answer.grounding}")
    problems = []
    if answer.grounding is None or not answer.grounding.ranges:
        return ["the answer was copied from the prompt, and no head was seen to do it"]
    for part in answer.grounding.ranges:
        print(f"  {part.tokens} tokens from positions {part.start} to {part.end - 1}: {part.text!r}")
    if after.successes >= before.successes:
        problems.append("without its best retrieval heads the model answered as many needles")
    return problems
