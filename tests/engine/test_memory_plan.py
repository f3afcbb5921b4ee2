"""Plans of memory: by hand for a small model, against a process that serves, and within bounds."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import memory_worker
import pytest
import torch
from tiny_llama import save_tiny_llama
from tiny_models import CONTEXT, LAYERS, VOCAB, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from patchclamp_server.cpu.stored import Format
from patchclamp_server.engine.memory.available import Available
from patchclamp_server.engine.memory.fit import LEAST_TOKENS, KvSize, fit
from patchclamp_server.engine.memory.plan import MemoryPlan, PlanOptions, block_bytes, plan
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.spec import DecoderSpec, read_spec
from patchclamp_server.model.stored_tensors import StoredTensor

MIB = 1 << 20
OPTIONS = PlanOptions(
    kv_block_size=16,
    kv_dtype=torch.float32,
    max_tokens_per_step=32,
    max_sequences=4,
    dtype=torch.float32,
    device="cpu",
    runtime=100 * MIB,
)
TENSORS = [
    StoredTensor("embed", Format.Q8_0, (1024, 512)),
    StoredTensor("down", Format.Q4_K, (64, 512)),
    StoredTensor("norm", Format.F32, (512,)),
]
WEIGHTS = 1024 * 16 * 34 + 64 * 2 * 144 + 2048
PLENTY = Available(64 << 30, "MemAvailable")


def spec(family: str = "qwen3") -> DecoderSpec:
    return read_spec(tiny_model(family).config)


def test_weights_are_the_bytes_of_their_formats() -> None:
    assert plan(spec(), TENSORS, 64, OPTIONS).weights == WEIGHTS


def test_matrices_that_are_held_otherwise_have_so_many_bytes_a_weight() -> None:
    held = plan(spec(), TENSORS, 64, replace(OPTIONS, bytes_per_weight=4)).weights
    assert held == 4 * (1024 * 512 + 64 * 512) + 2048


def test_the_kv_cache_has_whole_blocks_and_the_one_that_is_never_given_out() -> None:
    made = plan(spec(), TENSORS, 16 * 10 + 15, OPTIONS)
    assert (made.kv_blocks, made.kv_tokens) == (10, 160)
    assert made.kv_cache == 11 * block_bytes(spec(), OPTIONS)


def test_a_block_of_int8_has_scales_beside_its_codes() -> None:
    whole = block_bytes(spec(), OPTIONS)
    small = block_bytes(spec(), replace(OPTIONS, kv_dtype=torch.int8))
    # Keys and values of 16 tokens and 2 heads of 16 channels, in all layers.
    assert whole - small == 2 * LAYERS * 16 * 2 * (16 * 3 - 4)


def test_each_kind_of_rotary_table_counts_and_learned_positions_are_tensors() -> None:
    table = 2 * CONTEXT * 16 * 4
    tables = {family: plan(spec(family), [], 64, OPTIONS).tables for family in ("qwen3", "gemma3", "gpt2")}
    assert tables["gemma3"] - tables["qwen3"] == table
    assert tables["gpt2"] < tables["qwen3"]


def test_logits_of_all_rows_are_planned_for() -> None:
    more = plan(spec(), [], 64, replace(OPTIONS, max_tokens_per_step=33)).activations
    assert more - plan(spec(), [], 64, OPTIONS).activations > VOCAB * 4


def test_the_plan_says_its_parts_in_one_line() -> None:
    made = plan(spec(), TENSORS, 160, OPTIONS)
    assert sum(made.parts.values()) == made.total
    assert "weights 564 KiB, KV cache " in str(made)
    assert "(160 tokens), tables " in str(made)


def fitted(room: int, *, tokens: int = 65536, given: bool = False, memory: int | None = None) -> MemoryPlan:
    available = Available(room, "MemAvailable")
    return fit(spec(), TENSORS, KvSize(tokens, given), OPTIONS, available, memory)


def test_a_cache_that_was_not_asked_for_is_as_large_as_fits() -> None:
    room = plan(spec(), TENSORS, 1000 * 16, OPTIONS).total
    assert fitted(room).kv_blocks == 1000
    assert fitted(room - 1).kv_blocks == 999
    assert fitted(1 << 40).kv_tokens == 65536


def test_a_bound_on_memory_leaves_its_rest_to_the_cache() -> None:
    made = fitted(1 << 40, memory=2 << 30)
    left = (2 << 30) - made.total
    assert 0 <= left < block_bytes(spec(), OPTIONS)
    assert made.kv_tokens > 65536


def test_a_cache_that_was_asked_for_wins_over_the_rest_of_the_bound() -> None:
    assert fitted(1 << 40, tokens=320, given=True, memory=2 << 30).kv_tokens == 320


def test_a_cache_beyond_the_bound_is_refused_with_both_numbers() -> None:
    wanted = (
        r"with --kv-cache-tokens 800000 takes .*KV cache .*; --memory is 128 MiB; at most --kv-cache-tokens \d+ fit"
    )
    with pytest.raises(ModelSourceError, match=wanted) as refused:
        fitted(1 << 40, tokens=800_000, given=True, memory=128 * MIB)
    most = int(str(refused.value).split("--kv-cache-tokens ")[-1].split()[0])
    assert fitted(1 << 40, tokens=most, given=True, memory=128 * MIB).total <= 128 * MIB


def test_a_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ModelSourceError, match=r"takes 10\d MiB: weights .*; 100 MiB are available \(MemAvailable\)"):
        fitted(100 * MIB)


def test_the_least_cache_still_fits() -> None:
    room = plan(spec(), TENSORS, LEAST_TOKENS, OPTIONS).total
    assert fitted(room).kv_tokens == LEAST_TOKENS
    with pytest.raises(ModelSourceError, match="with the least KV cache"):
        fitted(room - 1)


def test_a_bound_above_what_there_is_is_refused_with_both_numbers() -> None:
    with pytest.raises(ModelSourceError, match=r"--memory asks for 4.00 GiB, and 2.00 GiB are available"):
        fitted(2 << 30, memory=4 << 30)


# The middle one has 31 million weights, and 4,096 tokens of KV cache are 32 MiB.
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
MIDDLE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192, **_HEADS}


@pytest.mark.parametrize("sizes", [{}, MIDDLE], ids=["tiny", "middle"])
def test_a_process_that_serves_takes_what_was_planned_within_a_tenth(sizes: dict[str, int], tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, context=2048)
    if sizes:
        LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path, **sizes)).save_pretrained(tmp_path)
    program = [sys.executable, memory_worker.__file__, str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert abs(measured["resident"] - measured["planned"]) <= 0.1 * measured["planned"], measured
