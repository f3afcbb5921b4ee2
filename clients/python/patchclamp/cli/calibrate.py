"""patchclamp vectors calibrate"""

import argparse
import json
import math
from typing import Any

from patchclamp import effects, requests
from patchclamp.cli.detach import add_detach_argument, job_outcome
from patchclamp.cli.naming import add_replace_argument, note_stored
from patchclamp.cli.neurons.shown import add_picture_argument, write_picture
from patchclamp.cli.neurons.texts import add_text_arguments, line_file, texts_of
from patchclamp.cli.options import add_model_argument, connection_options, given
from patchclamp.cli.parser import count, seed
from patchclamp.cli.steering import layer_list
from patchclamp.cli.terminal import note, print_json, table
from patchclamp.client import Client
from patchclamp.names import CALIBRATION_APPLICATIONS
from patchclamp.pictures.steering import calibration_figure
from patchclamp.programs import generated
from patchclamp.results import CalibrationResult


def add_parser(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "calibrate",
        parents=[connection_options(timeout=math.inf)],
        help="what a vector does and costs by layer and strength, beside random vectors and an instruction",
    )
    parser.add_argument("vector", help="id or tag")
    parser.add_argument("--prompts", type=line_file, required=True, metavar="FILE", help="a prompt a line")
    parser.add_argument("--name", help="tag of the vector with its calibration (default: none)")
    add_replace_argument(parser)
    parser.add_argument("--layers", type=layer_list, default="all", help="such as 8-12 (default: at most 8)")
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=[],
        metavar="S",
        help="ascending, also below 0 (default: 8 above 0)",
    )
    parser.add_argument("--application", choices=CALIBRATION_APPLICATIONS, default="add", help="default: %(default)s")
    parser.add_argument("--generated", action="store_true", help="edit generated tokens alone (default: every token)")
    parser.add_argument("--instruction", default="", metavar="TEXT", help="what a user could write instead")
    parser.add_argument("--random-vectors", type=count, default=0, metavar="N", help="of equal norm (default: 3)")
    parser.add_argument("--tokens", type=count, default=0, metavar="N", help="of each text (default: 32)")
    parser.add_argument("--max-perplexity-ratio", type=float, metavar="R", help="of the safe range (default: 2)")
    parser.add_argument("--max-repetition", type=float, metavar="SHARE", help="of the safe range (default: 0.3)")
    parser.add_argument("--seed", type=seed, default=0)
    add_model_argument(parser)
    effect = parser.add_argument_group("effect (default: the projection, which says least)")
    effect.add_argument("--words", nargs="+", metavar="WORD", help="share of texts with any of them")
    effect.add_argument("--probe", metavar="PROBE", help="mean probability of a probe, by id or tag, over the tokens")
    effect.add_argument(
        "--target-texts", type=line_file, metavar="FILE", help="log-probability of these continuations, one a line"
    )
    effect.add_argument("--label", metavar="LABEL", help="probability of the label, to a classifier of labelled texts:")
    add_text_arguments(parser, required=False)
    add_picture_argument(parser, "picture of the dose-response curves")
    add_detach_argument(parser)
    parser.set_defaults(run=run)


def effect_of(args: argparse.Namespace) -> effects.EffectLike | None:
    """Returns the one effect that was asked for. ValueError for several."""
    asked = [name for name in ("words", "probe", "target_texts", "label") if getattr(args, name) is not None]
    if len(asked) > 1:
        raise ValueError(f"expected one effect, got {', '.join('--' + name.replace('_', '-') for name in asked)}")
    if args.words is not None:
        return effects.words(args.words)
    if args.probe is not None:
        return effects.probe(args.probe)
    if args.target_texts is not None:
        return effects.target_texts(args.target_texts)
    if args.label is not None:
        return effects.classifier(texts_of(args), args.label)
    return None


def run(args: argparse.Namespace) -> int:
    options: dict[str, Any] = {
        **given(args, "max_perplexity_ratio", "max_repetition"),
        "effect": effect_of(args),
        "layers": () if args.layers == "all" else args.layers,
        "strengths": args.strengths,
        "application": args.application,
        "scope": generated() if args.generated else None,
        "instruction": args.instruction,
        "random_vectors": args.random_vectors,
        "max_tokens": args.tokens,
        "seed": args.seed,
        "tags": [args.name] if args.name else [],
        "replace_tags": args.replace,
        "model": args.model,
    }
    result = job_outcome(args, Client.calibrate_vector, requests.calibrate_vector, args.vector, args.prompts, **options)
    if result is None:
        return 0
    if args.json:
        print_json(result)
    else:
        _show(args, result)
    if args.picture is not None:
        write_picture(args, calibration_figure(result, f"{args.application} {args.vector}"))
    return 0


def _show(args: argparse.Namespace, result: CalibrationResult) -> None:
    safe = {each.layer: each for each in result.safe}
    rows = []
    for point in result.points:
        of_layer = safe.get(point.layer) if point.arm == "vector" else None
        is_knee = of_layer is not None and (point.layer, point.strength) == (result.layer, result.strength)
        within = "" if of_layer is None else "yes" if of_layer.low <= point.strength <= of_layer.high else "no"
        rows.append(
            (
                point.arm,
                "" if point.arm in ("prompt", "unsteered") else point.layer,
                "" if point.arm in ("prompt", "unsteered") else f"{point.strength:g}{' *' if is_knee else ''}",
                point.effect,
                point.perplexity,
                f"{point.repetition.mean:.2f}",
                f"{point.distinct.mean:.2f}",
                f"{point.divergence.mean:.3f}",
                within,
                json.dumps(point.example[:40], ensure_ascii=False),
            )
        )
    measures = ("effect (95 %)", "perplexity (95 %)", "repetition", "distinct", "divergence", "safe", "text")
    table(("arm", "layer", "strength", *measures), rows)
    for warning in result.warnings:
        note(f"warning: {warning}")
    if result.prompt_wins:
        note("the instruction has a larger effect within the same bounds")
    knee = f"knee: layer {result.layer}, strength {result.strength:g}"
    if args.name:
        note_stored(result.artifact, f"; {knee}")
    else:
        note(f"stored without a name, as {result.artifact.id}; {knee}")
