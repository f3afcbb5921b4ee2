"""What is checked, held and loaded before there is a server."""

import torch
from prometheus_client import CollectorRegistry

from patchclamp_server.addresses import Address, Reservation
from patchclamp_server.cpu.linear import can_be_invariant
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.progress import Progress
from patchclamp_server.rpc.config import ServerConfig
from patchclamp_server.rpc.contract import METHODS
from patchclamp_server.security.configuration import ConfigurationError
from patchclamp_server.security.metrics import SecurityMetrics
from patchclamp_server.security.security import Security


def check_files(config: ServerConfig) -> None:
    """Before the model is loaded. Raises ConfigurationError when tokens, policy or certificates cannot be used, or two
    checkpoints have one name."""
    names = [name for name, _ in config.match_models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"--match-model names {twice[0]!r} twice")
    Security(config, SecurityMetrics(CollectorRegistry()), METHODS).close()


def reserve(config: ServerConfig) -> Reservation:
    """Holds the ports that will be served on. Raises OSError when one cannot be had."""
    named = {
        "--address": config.address,
        "--metrics-address": config.metrics_address,
        "--health-address": config.health_address,
    }
    return Reservation({option: Address.parse(text) for option, text in named.items() if text})


def load(config: ServerConfig, progress: Progress | None = None) -> LoadedModel:
    """The model of `config`. Raises ModelSourceError, and ConfigurationError for what it cannot promise."""
    dtype, engine = getattr(torch, config.dtype), config.engine
    if engine.batch_invariant and (not can_be_invariant(dtype, config.device) or engine.kernels):
        raise ConfigurationError(
            "--batch-invariant on holds with --dtype float32, --device cpu and --kernels off, "
            f"got {config.dtype}, {config.device} and {'on' if engine.kernels else 'off'}"
        )
    rounds = config.activations == "int8"
    if rounds and (engine.batch_invariant is False or not can_be_invariant(dtype, config.device) or engine.kernels):
        raise ConfigurationError(
            "--activations int8 holds with --dtype float32, --device cpu, --kernels off and --batch-invariant on, "
            f"got {config.dtype}, {config.device}, {'on' if engine.kernels else 'off'} "
            f"and {'off' if engine.batch_invariant is False else 'on'}"
        )
    return load_model(
        config.model,
        dtype=dtype,
        device=config.device,
        batch_invariant=engine.batch_invariant,
        activations=torch.int8 if rounds else None,
        progress=progress,
    )
