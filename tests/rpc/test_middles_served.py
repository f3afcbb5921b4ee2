"""Words keep their spaces through a real channel, with a SentencePiece vocabulary as Llama 2's."""

from collections.abc import Iterator
from itertools import takewhile

import grpc
import pytest
import torch
from live import LiveServer
from text_tokenizers import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import head_pb2
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.model.load import load_model
from patchclamp_server.rpc.codecs.circuit import decode_attribution, decode_circuit
from patchclamp_server.text.prompt import PromptEncoder

OWN = tokenizer("llama2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(vocab_size=len(OWN), max_position_embeddings=64, **sizes)
        LlamaForCausalLM(config).save_pretrained(directory)
    OWN.save_pretrained(directory)
    with LiveServer(load_model(str(directory)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture
def stub(server: LiveServer) -> Iterator[GenerationServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield GenerationServiceStub(channel)


@pytest.fixture
def prompts(server: LiveServer) -> PromptEncoder:
    return PromptEncoder(OWN, server.model.info)


def test_a_continuation_is_scored_as_it_stands_in_the_whole_text(stub: GenerationServiceStub) -> None:
    score = stub.Score(pb.ScoreRequest(prompt={"text": "once upon"}, text=" a time"))
    whole = OWN("once upon a time")["input_ids"]
    assert [token.id for token in score.tokens] == whole[len(OWN("once upon")["input_ids"]) :]


@pytest.mark.parametrize("prompt", ["once upon", ""])
def test_generated_text_is_what_transformers_adds_to_the_prompt(stub: GenerationServiceStub, prompt: str) -> None:
    request = pb.GenerateRequest(
        prompt={"text": prompt}, sampling={"temperature": 2.0, "seed": 3}, stop={"max_tokens": 40, "ignore_eos": True}
    )
    answer = list(stub.Generate(request))
    # Of byte tokens that make no character, transformers gives up all that stand together.
    ids = [token.id for part in answer for token in part.tokens]
    words = takewhile(lambda id: not OWN.convert_ids_to_tokens(id).startswith("<0x"), ids)
    before = OWN(prompt)["input_ids"]
    whole = OWN.decode([*before, *words], skip_special_tokens=True)
    assert len(whole) > len(prompt)
    assert (prompt + "".join(part.text for part in answer)).startswith(whole)


def test_answers_of_attributions_and_circuits_are_words_in_a_text(server: LiveServer, prompts: PromptEncoder) -> None:
    [mary] = OWN("gave Mary")["input_ids"][len(OWN("gave")["input_ids"]) :]
    asked = head_pb2.AttributeLogitsRequest(prompt={"text": "once upon"}, target=" Mary")
    assert decode_attribution(asked, prompts, server.model.info).target == mary
    text = pb.Prompt(text="once upon")
    pair = head_pb2.CleanCorruptPair(clean=text, corrupt=text, clean_answer=" Mary", corrupt_answer=" time")
    search = head_pb2.FindCircuitRequest(method="CIRCUIT_METHOD_MEAN_ABLATION", pairs=[pair])
    assert decode_circuit(search, prompts, server.model.info).pairs[0].clean_answer == mary
