"""What is checked, held and loaded before there is a server."""

import logging
from dataclasses import replace
from typing import NamedTuple

import torch
from prometheus_client import CollectorRegistry

from patchclamp_server.addresses import Address, Reservation
from patchclamp_server.cpu.linear import can_be_invariant
from patchclamp_server.engine.memory.available import available_memory
from patchclamp_server.engine.memory.fit import KvSize, fit
from patchclamp_server.engine.memory.options import plan_options
from patchclamp_server.engine.memory.plan import MemoryPlan
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.progress import Progress
from patchclamp_server.model.quantization.scheme import SCHEMES
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.model.stored_tensors import StoredTensor
from patchclamp_server.rpc.config import ServerConfig
from patchclamp_server.rpc.contract import METHODS
from patchclamp_server.security.configuration import ConfigurationError
from patchclamp_server.security.metrics import SecurityMetrics
from patchclamp_server.security.security import Security

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model, the configuration with the KV cache that fits beside it, and the memory that this takes."""

    model: LoadedModel
    config: ServerConfig
    plan: MemoryPlan


def check_files(config: ServerConfig) -> None:
    """Before the model is loaded. Raises ConfigurationError when tokens, policy or certificates cannot be used, or two
    checkpoints have one name."""
    names = [name for name, _ in config.match_models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"--match-model names {twice[0]!r} twice")
    security = Security(config, SecurityMetrics(CollectorRegistry()), METHODS)
    security.close()
    if config.http and security.names_by_certificate:
        raise ConfigurationError("--http needs --tokens: callers of HTTP are not known by their certificates")


def reserve(config: ServerConfig) -> Reservation:
    """Holds the ports that will be served on. Raises OSError when one cannot be had."""
    named = {
        "--address": config.address,
        "--metrics-address": config.metrics_address,
        "--health-address": config.health_address,
        "--http": config.http,
    }
    return Reservation({option: Address.parse(text) for option, text in named.items() if text})


def load(config: ServerConfig, progress: Progress | None = None) -> Loaded:
    """Plans the memory, says it, and loads the model of `config`. Raises ModelSourceError, also for what does not fit,
    and ConfigurationError for what it cannot promise."""
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
    if engine.kv_dtype not in ("model", config.dtype) and (
        config.dtype != "float32" or torch.device(config.device).type != "cpu" or engine.kernels
    ):
        raise ConfigurationError(
            f"--kv-dtype {engine.kv_dtype} holds with --dtype float32, --device cpu and --kernels off, "
            f"got {config.dtype}, {config.device} and {'on' if engine.kernels else 'off'}; "
            "--kv-dtype model is accepted everywhere"
        )
    plans: list[MemoryPlan] = []

    def admit(spec: DecoderSpec, tensors: list[StoredTensor]) -> None:
        available = available_memory(config.device)
        size = KvSize(engine.kv_cache_tokens, config.kv_cache_tokens_given)
        options = plan_options(engine, dtype, config.device)
        plans.append(fit(spec, tensors, size, options, available, config.memory))
        logger.info("memory: %s; %s", plans[0], available)

    model = load_model(
        config.model,
        dtype=dtype,
        device=config.device,
        batch_invariant=engine.batch_invariant,
        quantize=SCHEMES[config.quantize] if config.quantize else None,
        admit=admit,
        activations=torch.int8 if rounds else None,
        progress=progress,
    )
    info = model.info
    logger.info(
        "model: %s (%s, %s on %s), activations %s, keys and values %s, fingerprint %s",
        *(info.name, info.architecture, info.dtype, info.device, info.activations),
        *(info.dtype if engine.kv_dtype == "model" else engine.kv_dtype, info.fingerprint),
    )
    planned = replace(config, engine=replace(engine, kv_cache_tokens=plans[0].kv_tokens))
    return Loaded(model, planned, plans[0])
