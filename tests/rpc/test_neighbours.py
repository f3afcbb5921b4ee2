"""Nothing that a request says fails or changes what others get, whatever the model, its tokenizer and the request."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import LiveServer
from statuses import failure
from text_tokenizers import WORDS, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import head_pb2, model_pb2, program_pb2, sparse_policy_pb2, sparsity_pb2, steering_pb2, tensor_pb2
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.head_pb2_grpc import HeadServiceStub
from patchclamp.v1.model_pb2_grpc import ModelServiceStub
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceStub
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.model.load import load_model

CODES = grpc.StatusCode
ANSWERS = {CODES.OK, CODES.INVALID_ARGUMENT, CODES.FAILED_PRECONDITION, CODES.ABORTED, CODES.RESOURCE_EXHAUSTED}
CONTEXT, WIDTH, LAYERS = 64, 16, 2
# A tokenizer, and rows of the embedding: fewer than it has tokens, or a few.
MODELS = {"llama2": 300, "gemma": 430, "byte level with a space": 8}
NEIGHBOUR = pb.GenerateRequest(
    prompt={"tokens": {"ids": [1, 5, 6]}}, stop={"max_tokens": 24, "ignore_eos": True}, logprobs=1
)


@pytest.fixture(scope="module", params=MODELS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=MODELS[request.param],
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    own = tokenizer(request.param)
    own.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    )
    with LiveServer(load_model(str(directory)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server: LiveServer) -> list[tuple[int, float]]:
    return neighbour(server)


def neighbour(server: LiveServer) -> list[tuple[int, float]]:
    with grpc.insecure_channel(server.address) as channel:
        answer = list(GenerationServiceStub(channel).Generate(NEIGHBOUR))
    return [(token.id, round(token.logprob, 4)) for part in answer for token in part.tokens]


IDS = st.one_of(st.integers(0, 7), st.integers(0, 500), st.sampled_from([2**31, 2**32 - 1]))
TEXTS = st.lists(st.sampled_from([*WORDS, " ", "</s>", "<s>", "<unk>", "é", "\0", "🦜", ""]), max_size=12).map("".join)
POSITIONS = st.integers(-80, 80)
PROMPTS = st.one_of(
    TEXTS.map(lambda text: pb.Prompt(text=text)),
    st.lists(IDS, max_size=8).map(lambda ids: pb.Prompt(tokens={"ids": ids})),
    st.lists(st.integers(3, 7), min_size=1, max_size=CONTEXT + 2).map(lambda ids: pb.Prompt(tokens={"ids": ids})),
    st.lists(st.tuples(st.sampled_from(("user", "tool", "assistant", "</s>")), TEXTS), max_size=4).map(
        lambda turns: pb.Prompt(chat={"messages": [{"role": role, "content": text} for role, text in turns]})
    ),
)
VALUES = st.sampled_from([0.0, 1.0, -3.0, 1e30, 3e38, float("inf"), float("nan")])


@st.composite
def vectors(draw: st.DrawFn) -> program_pb2.Vector:
    width = draw(st.sampled_from([WIDTH] * 4 + [0, 1, WIDTH - 1, 2 * WIDTH]))
    data = torch.full((width,), draw(VALUES)).numpy().tobytes()
    return program_pb2.Vector(values=tensor_pb2.Tensor(dtype="DATA_TYPE_FLOAT32", shape=[width], data=data))


@st.composite
def scopes(draw: st.DrawFn) -> program_pb2.Scope:
    selector: dict[str, Any] = {}
    if draw(st.booleans()):
        selector["positions"] = {"start": draw(POSITIONS), "end": draw(POSITIONS)}
    if draw(st.booleans()):
        selector["token_ids"] = draw(st.lists(IDS, max_size=3))
    if draw(st.booleans()):
        selector["last_k"] = draw(st.integers(0, 80))
    return program_pb2.Scope(include=[selector])


@st.composite
def programs(draw: st.DrawFn) -> program_pb2.Program:
    layers = draw(st.lists(st.integers(0, LAYERS), max_size=2))
    sites = st.sampled_from(("SITE_RESID_PRE", "SITE_RESID_POST", "SITE_MLP_POST", "SITE_MLP_GATE", "SITE_ATTN_Z"))
    edit = program_pb2.Edit(site=draw(sites), layers=layers, strength=draw(VALUES), scope=draw(scopes()))
    match draw(st.sampled_from(("add", "neurons", "heads", "rotate"))):
        case "add":
            edit.add.vector.CopyFrom(draw(vectors()))
        case "neurons":
            edit.neurons.neurons.extend(draw(st.lists(st.integers(0, 30), max_size=3)))
            edit.neurons.scale.values.append(draw(VALUES))
        case "heads":
            edit.heads.heads.extend(draw(st.lists(st.integers(0, 3), max_size=2)))
            edit.heads.scale = draw(VALUES)
        case _:
            edit.rotate_towards.vector.CopyFrom(draw(vectors()))
            edit.rotate_towards.radians = draw(VALUES)
    k = draw(st.sampled_from((0, 1, 5, 20, 64, 500)))
    readouts = [
        program_pb2.Readout(site="SITE_RESID_POST", layers=layers, logit_lens={"k": k}),
        program_pb2.Readout(site="SITE_MLP_POST", layers=layers, top_neurons={"k": k}, scope=draw(scopes())),
    ]
    return program_pb2.Program(
        edits=[edit] if draw(st.booleans()) else [], readouts=draw(st.lists(st.sampled_from(readouts), max_size=2))
    )


@st.composite
def generations(draw: st.DrawFn) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=draw(PROMPTS),
        program=draw(programs()),
        sampling={
            "temperature": draw(st.sampled_from((0.0, 1e-300, 0.7, 1e300))),
            "top_k": draw(st.sampled_from((0, 1, 7, 2**31))),
            "repetition_penalty": draw(st.sampled_from((1.0, 1e-6, 1e6))),
            "presence_penalty": draw(st.sampled_from((0.0, -1e6, 1e6))),
            "seed": draw(st.integers(0, 2**64 - 1)),
        },
        stop={
            "max_tokens": draw(st.sampled_from((0, 1, 5, 2**31 - 1))),
            "token_ids": draw(st.lists(IDS, max_size=2)),
            "strings": draw(st.lists(TEXTS, max_size=2)),
        },
        logprobs=draw(st.sampled_from((0, 1, 20))),
    )


@st.composite
def calls(draw: st.DrawFn) -> tuple[type, str, Any]:
    """Stub, method and message of a call that has text or ids somewhere."""
    text, prompt, ids = draw(TEXTS), draw(PROMPTS), draw(st.lists(IDS, max_size=3))
    policy = sparse_policy_pb2.SparsePolicy(griffin=sparse_policy_pb2.GriffinPolicy(), keep_ratio=0.5)
    pair = {"clean": prompt, "corrupt": draw(PROMPTS), "clean_answer": text, "corrupt_answer": draw(TEXTS)}
    facts = [{"prompt": draw(TEXTS), "answer": text, "time_conditioned": i < 2} for i in range(4)]
    needle = {"question": draw(TEXTS), "needle": text, "answer": text[:3]}
    test = {"haystacks": [draw(TEXTS) * 4], "needles": [needle], "lengths": [40], "depths": [0.5], "max_runs": 1}
    selected = {"heads": {"heads": [{"layer": 0, "head": 0}]}}
    some: list[tuple[type, str, Any]] = [
        (GenerationServiceStub, "Score", pb.ScoreRequest(prompt=prompt, text=text, top_logprobs=20)),
        (
            GenerationServiceStub,
            "Score",
            pb.ScoreRequest(prompt=prompt, tokens={"ids": ids}),
        ),
        (GenerationServiceStub, "Compare", pb.CompareRequest(request=draw(generations()))),
        (ModelServiceStub, "Tokenize", model_pb2.TokenizeRequest(prompt=prompt)),
        (HeadServiceStub, "AttributeLogits", head_pb2.AttributeLogitsRequest(prompt=prompt, target=text)),
        (
            HeadServiceStub,
            "FindCircuit",
            head_pb2.FindCircuitRequest(
                method="CIRCUIT_METHOD_MEAN_ABLATION", pairs=[pair], circuit_size=1, random_sets=1
            ),
        ),
        (
            HeadServiceStub,
            "ScoreHeads",
            head_pb2.ScoreHeadsRequest(method="HEAD_SCORE_METHOD_TEMPORAL", facts=facts),
        ),
        (
            HeadServiceStub,
            "EvaluateHeadEdit",
            head_pb2.EvaluateHeadEditRequest(
                heads=selected, mode="HEAD_EDIT_MODE_SCALE", random_sets=1, test=test, texts=[text]
            ),
        ),
        (
            SparsityServiceStub,
            "EvaluateProfile",
            sparsity_pb2.EvaluateProfileRequest(
                sparsities=[{"policy": policy}], text={"texts": [text * 3], "document_tokens": 8}
            ),
        ),
        (
            SparsityServiceStub,
            "PredictCoreNeurons",
            sparsity_pb2.PredictCoreNeuronsRequest(sparsity={"policy": policy}, prompts=[prompt], layers=[0]),
        ),
        (
            SteeringServiceStub,
            "ExtractVectors",
            steering_pb2.ExtractVectorsRequest(
                method="EXTRACTION_METHOD_DIFFERENCE_OF_MEANS",
                pairs=[{"positive": prompt, "negative": {"text": "once"}}] * 4,
            ),
        ),
    ]
    return draw(st.sampled_from(some))


def status(server: LiveServer, stub: type, method: str, message: Any) -> tuple[CODES, str]:
    with grpc.insecure_channel(server.address) as channel:
        try:
            answer = getattr(stub(channel), method)(message)
            if isinstance(answer, grpc.Call):
                list(answer)
        except grpc.RpcError as error:
            return failure(error).code, failure(error).message
    return CODES.OK, ""


@given(data=st.data())
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
def test_neighbours_of_any_requests_get_what_they_get_alone(
    server: LiveServer, undisturbed: list[tuple[int, float]], data: st.DataObject
) -> None:
    hostile: list[tuple[type, str, Any]] = [
        (GenerationServiceStub, "Generate", request) for request in data.draw(st.lists(generations(), max_size=3))
    ]
    hostile += data.draw(st.lists(calls(), min_size=1, max_size=2))
    with ThreadPoolExecutor(len(hostile) + 1) as pool:
        beside = pool.submit(neighbour, server)
        answers = [(call, pool.submit(status, server, *call)) for call in hostile]
    for call, answer in answers:
        code, message = answer.result()
        assert code in ANSWERS, f"{call} ended with {code}: {message}"
    assert beside.result() == undisturbed
    assert server.server.engine.stats().failed_steps == 0
