"""Options that bound memory, and what a server with them plans, refuses and tells."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from live import LiveServer

from patchclamp import Client
from patchclamp_server.cli.commands import main
from patchclamp_server.cli.options import add_serve_arguments, config_from
from patchclamp_server.engine.memory.available import resident_memory
from patchclamp_server.engine.memory.plan import MemoryPlan
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.load import load_model
from patchclamp_server.model.quantization.card import Quality
from patchclamp_server.model.quantization.scheme import SCHEMES
from patchclamp_server.rpc.at_start import load
from patchclamp_server.rpc.config import ServerConfig
from patchclamp_server.rpc.metrics.server import Metrics

MIB, GIB = 1 << 20, 1 << 30


def parse(*arguments: str) -> ServerConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_serve_arguments(parser)
    return config_from(parser.parse_args(arguments))


def test_a_bound_on_memory_is_a_size() -> None:
    assert parse("--memory", "4GiB").memory == 4 * GIB
    with pytest.raises(argparse.ArgumentError, match="expected a number and a unit, such as 4GiB"):
        parse("--memory", "4")


def test_the_configuration_knows_whether_the_size_of_the_cache_was_given() -> None:
    assert not parse().kv_cache_tokens_given
    assert parse("--kv-cache-tokens", "65536").kv_cache_tokens_given


def test_a_scheme_of_quantising_is_one_that_there_is() -> None:
    assert parse("--quantize", "q4_k").quantize == "q4_k"
    with pytest.raises(argparse.ArgumentError, match=r"expected one of q8_0, .*, got 'q3'"):
        parse("--quantize", "q3")


def test_the_plan_is_said_before_the_model_is_loaded(tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loaded = load(parse("--model", str(tiny_llama_dir), "--kv-cache-tokens", "1024"))
    assert f"memory: {loaded.plan}; " in caplog.text
    # Keys of 8 channels and values of 16 in 2 layers and heads, of 65 blocks of 16 tokens, and 512 bytes a block.
    assert "KV cache 422 KiB (1,024 tokens)" in caplog.text
    assert 65 * (16 * 2 * 2 * (8 + 16) * 4 + 512) // 1024 == 422


def test_what_is_served_is_said_in_a_line(tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    info = load(parse("--model", str(tiny_llama_dir), "--quantize", "q8_0", "--kv-dtype", "int8")).model.info
    assert "float32 on cpu), activations float32, keys and values int8, fingerprint " in caplog.text
    assert f"{info.fingerprint}\n" in caplog.text
    assert "-quantized-q8_0-" in info.fingerprint


def test_the_engine_gets_the_cache_that_was_planned(tiny_llama_dir: Path) -> None:
    bound = resident_memory() + 2 * GIB
    loaded = load(parse("--model", str(tiny_llama_dir), "--memory", f"{bound // MIB}MiB"))
    assert loaded.config.engine.kv_cache_tokens == loaded.plan.kv_tokens > 65536
    assert loaded.plan.total <= bound


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tiny_llama_dir: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"the least KV cache takes .*: weights .*; --memory is 10.0 MiB"):
        load(parse("--model", str(tiny_llama_dir), "--memory", "10MiB"))


def test_the_program_ends_with_the_numbers(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0")
    # What this process has already is a part of the plan.
    gib = resident_memory() // GIB + 2
    bounds = ("--memory", f"{gib}GiB", "--kv-cache-tokens", "1000000000")
    assert main(["--model", str(tiny_llama_dir), *options, *bounds]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("patchclamp serve: error: the model with --kv-cache-tokens 1000000000 takes ")
    assert f"; --memory is {gib}.00 GiB; at most --kv-cache-tokens " in error


def test_prometheus_gets_the_parts_of_the_plan() -> None:
    metrics = Metrics()
    metrics.describe_memory(MemoryPlan(1, 2, 3, 4, 5, kv_blocks=6, kv_block_size=16))
    found = {
        part: metrics.registry.get_sample_value("patchclamp_memory_planned_bytes", {"part": part})
        for part in ("weights", "kv_cache", "tables", "activations", "runtime")
    }
    assert found == {"weights": 1, "kv_cache": 2, "tables": 3, "activations": 4, "runtime": 5}


def test_clients_see_the_card_of_a_quantised_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama_dir), quantize=SCHEMES["q8_0"])
    card = model.info.quantization
    assert card is not None
    measured = replace(model.info, quantization=replace(card, quality=Quality(0.01, 0.9, 1.02, 12.0, 508)))
    with LiveServer(replace(model, info=measured), tmp_path) as server, Client(server.address) as client:
        (found,) = client.models()
    assert found.fingerprint == model.info.fingerprint
    assert found.quantization is not None
    assert (found.quantization.scheme, found.quantization.bits_per_weight) == ("q8_0", 8.5)
    assert [(of.format, of.matrices) for of in found.quantization.formats] == [("q8_0", 16)]
    assert found.quantization.quality is not None
    assert found.quantization.quality.top1_agreement == 0.9


def test_a_dense_model_has_no_card(live_server: LiveServer) -> None:
    with Client(live_server.address) as client:
        assert client.models()[0].quantization is None
