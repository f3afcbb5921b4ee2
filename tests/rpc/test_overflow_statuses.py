"""What clients of a server in float16 are told of a model that passes 65,504."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from live import LiveServer
from tiny_llama import byte_tokenizer, save_tiny_llama
from transformers import AutoModelForCausalLM

from patchclamp.v1 import generation_pb2, steering_pb2
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.model.load import load_model


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    directory: Path = tmp_path_factory.mktemp("planted")
    save_tiny_llama(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        # What attention writes is beyond float16, at every token.
        model.model.embed_tokens.weight[:, 0] = 60_000.0
        model.model.layers[0].self_attn.v_proj.weight.mul_(0)
        model.model.layers[0].self_attn.v_proj.weight[:, 0] = 50.0
        model.model.layers[0].self_attn.o_proj.weight.fill_(100.0)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    half = load_model(str(directory), dtype=torch.float16)
    artifacts = tmp_path_factory.mktemp("artifacts")
    with LiveServer(half, artifacts) as server, grpc.insecure_channel(server.address) as channel:
        yield channel


def assert_says_what_holds(error: grpc.RpcError) -> None:
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "attn_out of layer 0 passes 65,504, the largest number of float16" in error.details()
    assert "bfloat16 and float32 hold more" in error.details()
    assert "too strong" not in error.details()


def test_an_unsteered_generation_is_told_which_dtype_holds(channel: grpc.Channel) -> None:
    request = generation_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text="hello"))
    with pytest.raises(grpc.RpcError) as error:
        list(GenerationServiceStub(channel).Generate(request))
    assert_says_what_holds(error.value)


def test_an_extraction_is_told_which_dtype_holds(channel: grpc.Channel) -> None:
    prompt = generation_pb2.Prompt
    pairs = [
        steering_pb2.ContrastPair(positive=prompt(text=f"yes {i}"), negative=prompt(text=f"no {i}")) for i in range(8)
    ]
    request = steering_pb2.ExtractVectorsRequest(method=steering_pb2.EXTRACTION_METHOD_DIFFERENCE_OF_MEANS, pairs=pairs)
    with pytest.raises(grpc.RpcError) as error:
        list(SteeringServiceStub(channel).ExtractVectors(request))
    assert_says_what_holds(error.value)
