"""Neurons: found, clamped beside random ones, and counted; the embedded model behind a real server, over gRPC.

    python benchmarks/neurons [--only words relations languages decoding speed census] [--quick]
                              [--census-tokens 100000 1000000]

Each part is a module of benchmarks/neurons, which says what is measured. Whole runs of the first four are written to
benchmarks/results/neurons.json, `speed` of the census to neurons_census_speed.json, and `census`, its memory and a
kill, to neurons_census.json: that takes most of an hour, the others some ten minutes each. `--quick` makes everything
small and writes nothing. The last line is a JSON object, with null for what did not run:

    words_raised                    of 4: clamping the first neuron of a word raises it above any of 20 random ones
    relations_selective             of 4, by average precision; relations.py says what is demanded
    relations_selective_gradient    the same by gradient times activation
    languages_selective             languages.py says what is demanded
    decoding_seconds                of all neurons
    census_rss_growth_ratio         peak of memory of the longer census over that of the shorter one
    census_vs_prefill_rate          tokens a second of a census over those of plain requests with the same windows
    census_lost_checkpoints         what a kill -9 cost, in checkpoints
    decode_p99_beside_census_ratio  99th percentile between tokens of a stream beside a census over that without
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# Its modules, and those that benchmarks share.
sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import save
from serving import serving

from neurons import census, census_speed, decoding, languages, relations, words
from patchclamp import Client

EFFECTS = ("words", "relations", "languages", "decoding")
PARTS = (*EFFECTS, "speed", "census")
RANDOM_NEURONS = 20
ALL_LAYERS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument(
        "--census-tokens", type=int, nargs=2, default=census.Sizes.tokens, metavar=("SHORT", "LONG"), help="of a census"
    )
    parser.add_argument("--quick", action="store_true", help="small, and nothing is written")
    options = parser.parse_args()
    summary: dict[str, Any] = {}
    served = [part for part in EFFECTS if part in options.only]
    if served:
        effects = measure_effects(served, quick=options.quick)
        if len(served) == len(EFFECTS) and not options.quick:
            print(f"written: {save('neurons', effects).name}")
        summary |= summary_of(effects)
    if "speed" in options.only:
        quick_speed = census_speed.Sizes(windows=4, rounds=1, stream_tokens=96)
        timed = census_speed.measure(quick_speed if options.quick else census_speed.Sizes())
        if not options.quick:
            print(f"written: {save('neurons_census_speed', timed).name}")
        names = ("census_vs_prefill_rate", "decode_p99_beside_census_ratio")
        summary |= {name: round(timed[name], 3) for name in names}
    if "census" in options.only:
        short, long = options.census_tokens
        quick = census.Sizes((4_000, 16_000), killed_tokens=8_000, checkpoint_tokens=1_500)
        counted = census.measure(quick if options.quick else census.Sizes((short, long)))
        if not options.quick:
            print(f"written: {save('neurons_census', counted).name}")
        summary["census_rss_growth_ratio"] = round(counted["census_rss_growth_ratio"], 3)
        summary["census_lost_checkpoints"] = round(counted["killed"]["lost_checkpoints"], 2)
    print(json.dumps({name: summary.get(name) for name in SUMMARY}))


SUMMARY = (
    "words_raised",
    "relations_selective",
    "relations_selective_gradient",
    "languages_selective",
    "decoding_seconds",
    "census_rss_growth_ratio",
    "census_vs_prefill_rate",
    "census_lost_checkpoints",
    "decode_p99_beside_census_ratio",
)


def measure_effects(parts: list[str], *, quick: bool) -> dict[str, Any]:
    of_relations = relations.Sizes(facts=4, side_facts=2, fractions=(0.5, 1.0), random_sets=2)
    of_languages = languages.Sizes(paragraphs=1, fractions=(0.5, 1.0), random_sets=2)
    found: dict[str, Any] = {}
    with serving() as server, Client(server.address) as client:
        if "words" in parts:
            found["words"] = words.measure(client, 4 if quick else RANDOM_NEURONS)
        if "relations" in parts:
            found["relations"] = relations.measure(client, of_relations if quick else relations.Sizes())
        if "languages" in parts:
            found["languages"] = languages.measure(client, of_languages if quick else languages.Sizes())
        if "decoding" in parts:
            found["decoding"] = decoding.measure(client, 1 if quick else ALL_LAYERS)
    return found


def summary_of(effects: dict[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    if "words" in effects:
        summary["words_raised"] = sum(row["raised"] for row in effects["words"].values())
    if "relations" in effects:
        rows = effects["relations"]["relations"].values()
        summary["relations_selective"] = sum(row["average_precision"]["selective"] for row in rows)
        summary["relations_selective_gradient"] = sum(row["gradient_times_activation"]["selective"] for row in rows)
    if "languages" in effects:
        summary["languages_selective"] = sum(row["selective"] for row in effects["languages"]["languages"].values())
    if "decoding" in effects:
        summary["decoding_seconds"] = round(effects["decoding"]["seconds"], 1)
    return summary


if __name__ == "__main__":
    main()
