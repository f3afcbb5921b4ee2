"""Steer and clamp a real language model through a real server: what `make demo` runs.

    python benchmarks/demo

Starts `patchclamp serve` with the embedded model on a free port, extracts a joyful/sad vector from contrast pairs,
reads which neurons are busiest, and prints unedited and edited answers side by side, with receipts and the divergence
at every token. Exit status 0 only when every receipt shows touched activations, every steered answer differs from the
baseline, and the server ends cleanly.
"""

import json
import shlex
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

# Its modules, and those that benchmarks share.
sys.path.insert(0, str(Path(__file__).parents[1]))
from serving import serving

from demo.heads import show_heads
from demo.output import WIDTH, heading, show_progress
from demo.sparsity import show_sparsity
from patchclamp import Client, PatchclampError, Program
from patchclamp.names import MethodName
from patchclamp.programs import ProgramLike, add, clamp_neurons, read_top_neurons
from patchclamp.requests import GenerateOptions
from patchclamp.results import GenerateResult

ROOT = Path(__file__).parents[2]
PAIRS = Path("benchmarks/data/concepts/joyful_sad.jsonl")
HEADS_OFF = Path("benchmarks/data/programs/layer_15_heads_off.json")
PROMPTS = ("My day at the office was", "When she opened the door, she felt", "The weather today makes me feel")
METHOD: MethodName = "difference_of_means"
VECTOR = "joyful_sad"
# Just past the middle of 30 layers, where the vector moves the model most
# (tests/analysis/steering/test_behaviour_embedded.py).
STEERED_LAYER, STRENGTH = 16, 1.5
CLAMPED_LAYER, CLAMPED_NEURONS = 5, 8
SAMPLING: GenerateOptions = {"max_tokens": 40, "repetition_penalty": 1.1}
COLUMNS, GAP = 3, 3


@dataclass(frozen=True)
class Variant:
    """One way to run a prompt; `arguments` are those of `patchclamp generate` for the same."""

    title: str
    program: ProgramLike | None
    arguments: tuple[str, ...]

    @property
    def steers(self) -> bool:
        return "--steer" in self.arguments


def main() -> int:
    heading("1. the server: patchclamp serve (the first run fetches and converts a model of 135 million parameters)")
    started = time.monotonic()
    with serving() as server, Client(server.address) as client:
        model = client.models()[0]
        seconds = time.monotonic() - started
        print(
            f"{model.name}, {model.n_layers} layers of width {model.d_model}: "
            f"served on {server.address} after {seconds:.0f} s"
        )

        heading(f"2. a steering vector from contrast pairs ({PAIRS})")
        extract(client)

        heading(f"3. the busiest neurons of layer {CLAMPED_LAYER} while the unedited model writes")
        neurons = busiest_neurons(client)
        print(f"by mean |activation| over {len(PROMPTS)} answers: {', '.join(map(str, neurons))}")

        variants = variants_of(neurons)
        heading(f"4. {len(PROMPTS)} prompts x {len(variants)} programs, generated together in one batch")
        problems = answers(client, variants)

        heading("5. where the steered model departs from the unedited one: patchclamp compare")
        compare(client, PROMPTS[0], variants[1])

        heading("6. sparse decoding: half of the neurons, by several policies in one batch, two of them guarded")
        problems += show_sparsity(client, SAMPLING)

        heading("7. retrieval heads: found by hiding needles, tested by removing them, used to ground an answer")
        problems += show_heads(client)
    print("\nthe server has drained and ended")

    heading("by hand")
    print_commands(variants)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def options(program: ProgramLike | None) -> GenerateOptions:
    return {**SAMPLING, "program": program}


def extract(client: Client) -> None:
    """Stores the vector on the server under its tag, and prints its evidence at the layer used."""
    lines = [json.loads(line) for line in (ROOT / PAIRS).read_text(encoding="utf-8").splitlines()]
    pairs = [(line["positive"], line["negative"]) for line in lines]
    with client.extract_vectors(pairs, METHOD, tags=[VECTOR]) as stream:
        result = stream.result(show_progress)
    at = next(evidence for evidence in result.layers if evidence.layer == STEERED_LAYER)
    print(
        f"{VECTOR} from {len(pairs)} pairs; at layer {at.layer} it tells {at.heldout_accuracy:.0%} of held-out texts "
        f"apart\n(random direction: {at.random_accuracy:.0%}), norm {at.norm:.1f} beside activations of norm "
        f"{at.activation_norm:.1f}"
    )


def busiest_neurons(client: Client) -> list[int]:
    """Neurons with the largest summed |activation| over all tokens but the first, whose activations are outliers."""
    readout = read_top_neurons(2 * CLAMPED_NEURONS, layers=CLAMPED_LAYER)
    streams = [client.generate(prompt, **options(Program(readouts=[readout]))) for prompt in PROMPTS]
    activity: Counter[int] = Counter()
    for result in [stream.result() for stream in streams]:
        for value in (*result.prompt_readouts, *(r for token in result.tokens for r in token.readouts)):
            if value.position > 0:
                activity.update({i: abs(a) for i, a in zip(value.ids, value.values, strict=True)})
    return sorted(neuron for neuron, _ in activity.most_common(CLAMPED_NEURONS))


def variants_of(neurons: list[int]) -> tuple[Variant, ...]:
    joy = add(VECTOR, layers=STEERED_LAYER, strength=STRENGTH, name="joy")
    sadness = add(VECTOR, layers=STEERED_LAYER, strength=-STRENGTH, name="sadness")
    clamp = clamp_neurons(neurons, min=0.0, max=0.0, layers=CLAMPED_LAYER, name="clamp")
    heads_off = Program.from_json((ROOT / HEADS_OFF).read_text(encoding="utf-8"))
    to_joy = ("--steer", f"{VECTOR}@{STEERED_LAYER}:{STRENGTH}")
    to_sadness = ("--steer", f"{VECTOR}@{STEERED_LAYER}:{-STRENGTH}")
    to_zero = ("--clamp", f"L{CLAMPED_LAYER}N{','.join(map(str, neurons))}=0..0")
    return (
        Variant("baseline", None, ()),
        Variant(f"steered: joy +{STRENGTH}", [joy], to_joy),
        Variant(f"steered: joy -{STRENGTH}", [sadness], to_sadness),
        Variant(f"clamped: {len(neurons)} neurons at 0", [clamp], to_zero),
        Variant("layer 15 without its heads", heads_off, ("--program", str(HEADS_OFF))),
        Variant("joy and clamp together", [joy, clamp], (*to_joy, *to_zero)),
    )


def answers(client: Client, variants: tuple[Variant, ...]) -> list[str]:
    """Prints every answer with its receipt. Returns what should not be."""
    started = time.monotonic()
    # A call starts when it is made: all of them run before the first result is read.
    streams = [[client.generate(prompt, **options(v.program)) for v in variants] for prompt in PROMPTS]
    results = [[stream.result() for stream in row] for row in streams]
    seconds = time.monotonic() - started
    problems: list[str] = []
    for prompt, row in zip(PROMPTS, results, strict=True):
        print(f"\n> {prompt} ...\n")
        cells = [cell(v.title, result.text) for v, result in zip(variants, row, strict=True)]
        for start in range(0, len(cells), COLUMNS):
            print_columns(cells[start : start + COLUMNS])
        print("receipts, counted where the edit happened:")
        for variant, result in zip(variants, row, strict=True):
            for edit in result.receipt.edits:
                print(f"  {variant.title:28s} {edit}")
            problems += problems_of(prompt, variant, result, baseline=row[0])
    tokens = sum(result.usage.generated_tokens for row in results for result in row)
    print(f"\n{tokens} tokens of {sum(map(len, results))} requests in {seconds:.1f} s")
    return problems


def problems_of(prompt: str, variant: Variant, result: GenerateResult, baseline: GenerateResult) -> list[str]:
    """An edit that touched nothing, or a steered answer equal to the baseline."""
    found = [
        f"{prompt!r}, {variant.title}: the receipt of {edit.name!r} shows no touched row"
        for edit in result.receipt.edits
        if edit.rows == 0
    ]
    if variant.program is not None and not result.receipt.touched:
        found.append(f"{prompt!r}, {variant.title}: nothing was touched")
    if variant.steers and result.text == baseline.text:
        found.append(f"{prompt!r}, {variant.title}: the answer is that of the baseline")
    return found


def compare(client: Client, prompt: str, variant: Variant) -> None:
    """Prints the KL divergence at every token of the steered answer."""
    with client.compare(prompt, **options(variant.program)) as stream:
        result = stream.result()
    largest = max(at.kl for at in result.divergences) or 1.0
    print(f"{variant.title}; KL(edited||baseline) in nats at each token of: {prompt} ...\n")
    rows = [
        f"{at.text.replace(chr(10), ' / '):16.16s} {at.kl:6.3f} {'#' * round(20 * at.kl / largest):20s}"
        for at in result.divergences
    ]
    half = (len(rows) + 1) // 2
    for left, right in zip_longest(rows[:half], rows[half:], fillvalue=""):
        print(f"  {left}   {right}".rstrip())
    total = result.summary
    print(
        f"\nmean {total.mean_kl:.3f}, largest {total.max_kl:.3f} nats; both would choose the same token at "
        f"{total.top1_agreement:.0%} of {total.positions} positions"
    )


def print_commands(variants: tuple[Variant, ...]) -> None:
    """What repeats this run with the command line."""
    print("Serve in one terminal (end with Ctrl-C):\n\n  make serve\n\nand in another:\n")
    print(f"  .venv/bin/patchclamp vectors extract {VECTOR} --pairs {PAIRS}")
    for variant in variants:
        print_command("generate", variant)
    print_command("compare", variants[1])
    print()


def print_command(command: str, variant: Variant) -> None:
    sampling = [f"--{name.replace('_', '-')}={value}" for name, value in SAMPLING.items()]
    words = [".venv/bin/patchclamp", command, PROMPTS[0], *variant.arguments, *sampling]
    lines = textwrap.wrap(shlex.join(words), WIDTH - 6, break_long_words=False, break_on_hyphens=False)
    print("  " + " \\\n      ".join(lines))


def cell(title: str, text: str) -> list[str]:
    width = (WIDTH - GAP * (COLUMNS - 1)) // COLUMNS
    return [title.upper(), *textwrap.wrap(" ".join(text.split()), width)]


def print_columns(cells: list[list[str]]) -> None:
    width = (WIDTH - GAP * (COLUMNS - 1)) // COLUMNS
    for line in zip_longest(*cells, fillvalue=""):
        print((" " * GAP).join(part.ljust(width) for part in line).rstrip())
    print()


if __name__ == "__main__":
    # Piped output keeps its order beside the server's progress on standard error.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        sys.exit(main())
    except PatchclampError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
