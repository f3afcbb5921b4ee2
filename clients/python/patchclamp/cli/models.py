"""patchclamp models, patchclamp health"""

import argparse

from patchclamp.cli.options import connect, connection_options
from patchclamp.cli.terminal import heading, print_json
from patchclamp.results.models import Quantization


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    models = commands.add_parser("models", parents=[connection_options()], help="what is served")
    models.set_defaults(run=run_models)
    health = commands.add_parser("health", parents=[connection_options()], help="exit status 0 when serving")
    health.add_argument("service", nargs="?", default="", help="full name of a service; default: the whole server")
    health.set_defaults(run=run_health)


def run_models(args: argparse.Namespace) -> int:
    with connect(args) as client:
        models = client.models()
    if args.json:
        print_json(models)
        return 0
    for model in models:
        rounded = " with int8 activations" if model.activations == "int8" else ""
        heading(f"{model.name} ({model.architecture}, {model.dtype}{rounded} on {model.device})")
        print(f"  fingerprint  {model.fingerprint}")
        print(f"  layers       {model.n_layers}, d_model {model.d_model}, d_ff {model.d_ff}")
        print(f"  heads        {model.n_heads} ({model.n_kv_heads} key-value) of {model.head_dim}")
        print(f"  vocabulary   {model.vocab_size}, context {model.context_length}")
        print(f"  sites        {', '.join(f'{site} [{width}]' for site, width in model.sites.items())}")
        if model.quantization is not None:
            print(f"  quantised    {_quantization(model.quantization)}")
        print(f"  chat         {'yes' if model.has_chat_template else 'no template'}")
    return 0


def _quantization(card: Quantization) -> str:
    text = f"{card.scheme}, {card.bits_per_weight:.2f} bits a weight"
    if card.quality is None:
        return f"{text}; quality not measured"
    quality = card.quality
    return (
        f"{text}; KL {quality.divergence:.3g} nats, same first choice {quality.top1_agreement:.1%}, "
        f"perplexity x {quality.perplexity_ratio:.3f}"
    )


def run_health(args: argparse.Namespace) -> int:
    with connect(args) as client:
        status = client.health(args.service)
    if args.json:
        print_json({"service": args.service, "status": status})
    else:
        print(status)
    return 0 if status == "serving" else 1
