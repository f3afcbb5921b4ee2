"""Every class of bad input, through a real channel: the right status code and the path of the field."""

import math
import struct
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from live import LiveServer
from statuses import failure

from patchclamp import Client, PatchclampError
from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1 import sparse_policy_pb2 as sparse
from patchclamp.v1 import tensor_pb2 as tensor

WIDTH, LAYERS, NEURONS, CONTEXT = 32, 2, 64, 256  # of the tiny llama
NAN, INF = math.nan, math.inf


def floats(*values: float, shape: tuple[int, ...] | None = None) -> tensor.Tensor:
    data = struct.pack(f"<{len(values)}f", *values)
    return tensor.Tensor(dtype=tensor.DATA_TYPE_FLOAT32, shape=shape or (len(values),), data=data)


def vector(*values: float) -> program.Vector:
    return program.Vector(values=floats(*(values or [1.0] * WIDTH)))


def add(**fields: Any) -> program.Edit:
    """An edit that is right, but for `fields`."""
    right = {"site": program.SITE_RESID_POST, "layers": [1], "add": program.AddVector(vector=vector())}
    return program.Edit(**{**right, **fields})


def neurons(edit: program.NeuronEdit, **fields: Any) -> program.Edit:
    return program.Edit(**{"site": program.SITE_MLP_POST, "layers": [0], "neurons": edit, **fields})


def scale(*ids: int) -> program.NeuronEdit:
    return program.NeuronEdit(neurons=ids, scale=program.NeuronValues(values=[0.0]))


def condition(**fields: Any) -> program.Condition:
    right = {
        "site": program.SITE_RESID_PRE,
        "layer": 0,
        "vector": vector(),
        "comparison": program.COMPARISON_ABOVE,
    }
    return program.Condition(**{**right, **fields})


def scoped(*include: program.TokenSelector, exclude: tuple[program.TokenSelector, ...] = ()) -> program.Edit:
    return add(scope=program.Scope(include=include, exclude=exclude))


def edited(*edits: program.Edit) -> pb.GenerateRequest:
    return request(program=program.Program(edits=edits))


def reading(**fields: Any) -> pb.GenerateRequest:
    right = {"site": program.SITE_RESID_POST, "layers": [0]}
    return request(program=program.Program(readouts=[program.Readout(**{**right, **fields})]))


def griffin(**fields: Any) -> sparse.SparsePolicy:
    return sparse.SparsePolicy(griffin=sparse.GriffinPolicy(), **fields)


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"prompt": pb.Prompt(text="hello"), **fields})


def confident(**fields: Any) -> pb.GenerateRequest:
    return request(confidence=pb.Confidence(**fields))


INVALID: dict[str, tuple[pb.GenerateRequest, str]] = {
    # Prompts
    "no prompt": (pb.GenerateRequest(), "prompt.form"),
    "empty text": (request(prompt=pb.Prompt(text="")), "prompt.text"),
    "empty chat": (request(prompt=pb.Prompt(chat=pb.ChatMessages())), "prompt.chat.messages"),
    "message without a role": (
        request(prompt=pb.Prompt(chat=pb.ChatMessages(messages=[pb.ChatMessage(content="x")]))),
        "prompt.chat.messages[0].role",
    ),
    "no tokens": (request(prompt=pb.Prompt(tokens=pb.TokenIds())), "prompt.tokens.ids"),
    "token outside the vocabulary": (
        request(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[1, 999_999]))),
        "prompt.tokens.ids[1]",
    ),
    "over-long prompt": (request(prompt=pb.Prompt(text="x" * (CONTEXT + 1))), "prompt.text"),
    # Sampling, stop conditions and the rest of the request
    "negative temperature": (request(sampling=pb.Sampling(temperature=-1)), "sampling.temperature"),
    "temperature that is no number": (request(sampling=pb.Sampling(temperature=NAN)), "sampling.temperature"),
    "top_p of zero": (request(sampling=pb.Sampling(top_p=0)), "sampling.top_p"),
    "top_p above one": (request(sampling=pb.Sampling(top_p=1.5)), "sampling.top_p"),
    "top_p that is no number": (request(sampling=pb.Sampling(top_p=NAN)), "sampling.top_p"),
    "min_p above one": (request(sampling=pb.Sampling(min_p=2)), "sampling.min_p"),
    "a penalty that no logit survives": (
        request(sampling=pb.Sampling(presence_penalty=1e300)),
        "sampling.presence_penalty",
    ),
    "repetition penalty of zero": (request(sampling=pb.Sampling(repetition_penalty=0)), "sampling.repetition_penalty"),
    "infinite penalty": (request(sampling=pb.Sampling(presence_penalty=INF)), "sampling.presence_penalty"),
    "too many stop strings": (request(stop=pb.StopConditions(strings=["x"] * 17)), "stop.strings"),
    "empty stop string": (request(stop=pb.StopConditions(strings=["x", ""])), "stop.strings[1]"),
    "a stop string as long as a book": (request(stop=pb.StopConditions(strings=["x", "y" * 5000])), "stop.strings[1]"),
    "unknown stop token": (request(stop=pb.StopConditions(token_ids=[999_999])), "stop.token_ids[0]"),
    "too many logprobs": (request(logprobs=21), "logprobs"),
    "unknown priority": (request(priority=9), "priority"),
    # Where an edit goes
    "no site": (edited(add(site=0)), "program.edits[0].site"),
    "unknown site": (edited(add(site=99)), "program.edits[0].site"),
    "no layers": (edited(add(layers=[])), "program.edits[0].layers"),
    "unknown layer": (edited(add(), add(layers=[0, LAYERS])), "program.edits[1].layers[1]"),
    "layer given twice": (edited(add(layers=[1, 0, 1])), "program.edits[0].layers[2]"),
    "layers and all_layers": (edited(add(all_layers=True)), "program.edits[0].all_layers"),
    "two edits of one name": (edited(add(name="a"), add(name="b"), add(name="a")), "program.edits[2].name"),
    # Kinds and numbers
    "no kind": (edited(program.Edit(site=1, layers=[0])), "program.edits[0].kind"),
    "strength that is no number": (edited(add(strength=NAN)), "program.edits[0].strength"),
    "infinite strength": (edited(add(strength=INF)), "program.edits[0].strength"),
    "no vector": (edited(add(add=program.AddVector())), "program.edits[0].add.vector"),
    "vector without a source": (
        edited(add(add=program.AddVector(vector=program.Vector()))),
        "program.edits[0].add.vector.source",
    ),
    "artifact without a name": (
        edited(add(add=program.AddVector(vector=program.Vector(artifact="")))),
        "program.edits[0].add.vector.artifact",
    ),
    "wrong width": (edited(add(add=program.AddVector(vector=vector(1, 2)))), "program.edits[0].add.vector.values"),
    "NaN in a vector": (
        edited(add(add=program.AddVector(vector=vector(*[NAN] * WIDTH)))),
        "program.edits[0].add.vector.values",
    ),
    "Inf in a vector": (
        edited(add(project_out=program.ProjectOut(vector=vector(*[INF] * WIDTH)))),
        "program.edits[0].project_out.vector.values",
    ),
    "zero vector as a direction": (
        edited(add(project_out=program.ProjectOut(vector=vector(*[0.0] * WIDTH)))),
        "program.edits[0].project_out.vector.values",
    ),
    "bytes that do not fill the shape": (
        edited(add(add=program.AddVector(vector=program.Vector(values=floats(1, 2, shape=(WIDTH,)))))),
        "program.edits[0].add.vector.values.data",
    ),
    "tensor without a type": (
        edited(add(add=program.AddVector(vector=program.Vector(values=tensor.Tensor(shape=[1], data=b"1234"))))),
        "program.edits[0].add.vector.values.dtype",
    ),
    "negative dimension": (
        edited(add(add=program.AddVector(vector=program.Vector(values=floats(1.0, shape=(-1,)))))),
        "program.edits[0].add.vector.values.shape[0]",
    ),
    "too many dimensions": (
        edited(add(add=program.AddVector(vector=program.Vector(values=floats(1.0, shape=(1, 1, 1)))))),
        "program.edits[0].add.vector.values.shape",
    ),
    "row of an artifact for plain values": (
        edited(add(add=program.AddVector(vector=program.Vector(values=floats(*[1.0] * WIDTH), artifact_layer=1)))),
        "program.edits[0].add.vector.artifact_layer",
    ),
    "cap without a bound": (
        edited(add(cap_projection=program.CapProjection(vector=vector()))),
        "program.edits[0].cap_projection.min",
    ),
    "cap with crossed bounds": (
        edited(add(cap_projection=program.CapProjection(vector=vector(), min=2, max=1))),
        "program.edits[0].cap_projection.max",
    ),
    "target that is no number": (
        edited(add(set_projection=program.SetProjection(vector=vector(), target=NAN))),
        "program.edits[0].set_projection.target",
    ),
    "negative angle": (
        edited(add(rotate_towards=program.RotateTowards(vector=vector(), radians=-0.1))),
        "program.edits[0].rotate_towards.radians",
    ),
    "low rank without a bias": (
        edited(add(low_rank=program.LowRank(rotation=floats(*[1.0] * WIDTH, shape=(1, WIDTH))))),
        "program.edits[0].low_rank.weight",
    ),
    # Neurons and heads
    "unknown neuron": (edited(neurons(scale(0, NEURONS))), "program.edits[0].neurons.neurons[1]"),
    "no neurons": (edited(neurons(scale())), "program.edits[0].neurons.neurons"),
    "neuron given twice": (edited(neurons(scale(3, 3))), "program.edits[0].neurons.neurons[1]"),
    "neurons at another site": (edited(neurons(scale(0), site=program.SITE_RESID_PRE)), "program.edits[0].site"),
    "neurons without an operation": (edited(neurons(program.NeuronEdit(neurons=[1]))), "program.edits[0].neurons.op"),
    "wrong number of values": (
        edited(neurons(program.NeuronEdit(neurons=[1, 2, 3], set=program.NeuronValues(values=[1, 2])))),
        "program.edits[0].neurons.set.values",
    ),
    "value that is no number": (
        edited(neurons(program.NeuronEdit(neurons=[1], add=program.NeuronValues(values=[NAN])))),
        "program.edits[0].neurons.add.values[0]",
    ),
    "clamp that is no number": (
        edited(neurons(program.NeuronEdit(neurons=[1], clamp=program.NeuronBounds(max=NAN)))),
        "program.edits[0].neurons.clamp.max",
    ),
    "norm of neurons preserved": (edited(neurons(scale(0), preserve_norm=True)), "program.edits[0].preserve_norm"),
    "unknown head": (
        edited(program.Edit(site=program.SITE_ATTN_Z, layers=[0], heads=program.HeadEdit(heads=[4], scale=0))),
        "program.edits[0].heads.heads[0]",
    ),
    "head scale that no number of the model holds": (
        edited(program.Edit(site=program.SITE_ATTN_Z, layers=[0], heads=program.HeadEdit(heads=[0], scale=1e300))),
        "program.edits",
    ),
    "head scale that is no number": (
        edited(program.Edit(site=program.SITE_ATTN_Z, layers=[0], heads=program.HeadEdit(heads=[0], scale=NAN))),
        "program.edits[0].heads.scale",
    ),
    # Scopes
    "contradictory phases": (
        edited(
            scoped(
                program.TokenSelector(phase=program.PHASE_PROMPT),
                exclude=(program.TokenSelector(phase=program.PHASE_PROMPT),),
            )
        ),
        "program.edits[0].scope.exclude",
    ),
    "empty range of positions": (
        edited(scoped(program.TokenSelector(positions=program.PositionRange(start=4, end=2)))),
        "program.edits[0].scope.include[0].positions",
    ),
    "last tokens of the prompt among the generated": (
        edited(scoped(program.TokenSelector(phase=program.PHASE_GENERATED, last_k=2))),
        "program.edits[0].scope.include[0].last_k",
    ),
    "role without a chat": (
        edited(scoped(program.TokenSelector(role="user"))),
        "program.edits[0].scope.include[0].role",
    ),
    "unknown phase": (edited(scoped(program.TokenSelector(phase=7))), "program.edits[0].scope.include[0].phase"),
    "unknown token in a scope": (
        edited(scoped(program.TokenSelector(token_ids=[999_999]))),
        "program.edits[0].scope.include[0].token_ids[0]",
    ),
    # Gates, aborts and readouts
    "gate without a condition": (edited(add(gate=program.Gate())), "program.edits[0].gate.condition"),
    "gate without a comparison": (
        edited(add(gate=program.Gate(condition=condition(comparison=0)))),
        "program.edits[0].gate.condition.comparison",
    ),
    "gate on a later site": (
        edited(add(gate=program.Gate(condition=condition(site=program.SITE_RESID_POST, layer=1)))),
        "program.edits[0].gate.condition",
    ),
    "threshold that is no number": (
        request(program=program.Program(abort_when=[program.AbortCondition(condition=condition(threshold=NAN))])),
        "program.abort_when[0].condition.threshold",
    ),
    "abort without a vector": (
        request(program=program.Program(abort_when=[program.AbortCondition(condition=program.Condition(site=1))])),
        "program.abort_when[0].condition.vector",
    ),
    "readout without a kind": (reading(), "program.readouts[0].kind"),
    "readout of an unknown layer": (
        reading(layers=[7], logit_lens=program.LogitLensReadout(k=1)),
        "program.readouts[0].layers[0]",
    ),
    "lens of nothing": (reading(logit_lens=program.LogitLensReadout()), "program.readouts[0].logit_lens.k"),
    "lens of the largest and of tokens": (
        reading(logit_lens=program.LogitLensReadout(k=1, token_ids=[1])),
        "program.readouts[0].logit_lens.token_ids",
    ),
    "lens of a token that is not there": (
        reading(logit_lens=program.LogitLensReadout(token_ids=[1, 999_999])),
        "program.readouts[0].logit_lens.token_ids[1]",
    ),
    "lens of a token twice": (
        reading(logit_lens=program.LogitLensReadout(token_ids=[1, 1])),
        "program.readouts[0].logit_lens.token_ids[1]",
    ),
    "lens of more tokens than are read": (
        reading(logit_lens=program.LogitLensReadout(token_ids=range(257))),
        "program.readouts[0].logit_lens.token_ids",
    ),
    "lens of neurons without neurons": (
        reading(site=program.SITE_MLP_POST, logit_lens=program.LogitLensReadout(k=1)),
        "program.readouts[0].logit_lens.neurons",
    ),
    "lens of neurons where there are none": (
        reading(site=program.SITE_MLP_OUT, logit_lens=program.LogitLensReadout(k=1, neurons=[1])),
        "program.readouts[0].logit_lens.neurons",
    ),
    "lens of more neurons than are read": (
        reading(site=program.SITE_MLP_POST, logit_lens=program.LogitLensReadout(k=1, neurons=range(65))),
        "program.readouts[0].logit_lens.neurons",
    ),
    "lens of heads": (
        reading(site=program.SITE_ATTN_Z, logit_lens=program.LogitLensReadout(k=1)),
        "program.readouts[0].site",
    ),
    "top zero neurons": (
        reading(site=program.SITE_MLP_POST, top_neurons=program.TopNeuronsReadout(k=0)),
        "program.readouts[0].top_neurons.k",
    ),
    "projection on no vector": (
        reading(projection=program.ProjectionReadout()),
        "program.readouts[0].projection.vectors",
    ),
    "readout of an unknown head": (
        reading(site=program.SITE_ATTN_Z, heads=program.HeadReadout(heads=[0, 4])),
        "program.readouts[0].heads.heads[1]",
    ),
    "readout of a head given twice": (
        reading(site=program.SITE_ATTN_Z, heads=program.HeadReadout(heads=[3, 3])),
        "program.readouts[0].heads.heads[1]",
    ),
    "readout of heads where there are none": (
        reading(site=program.SITE_MLP_POST, heads=program.HeadReadout(heads=[0])),
        "program.readouts[0].site",
    ),
    # Sparse inference and grounding
    "sparsity of nothing": (request(sparsity=sparse.Sparsity()), "sparsity"),
    "sparsity by a control": (
        request(sparsity=sparse.Sparsity(policy=sparse.SparsePolicy(oracle=sparse.OraclePolicy()))),
        "sparsity.policy.oracle",
    ),
    "share of neurons above one": (
        request(sparsity=sparse.Sparsity(policy=griffin(keep_ratio=1.5))),
        "sparsity.policy.keep_ratio",
    ),
    "share of neurons that is no number": (
        request(sparsity=sparse.Sparsity(policy=griffin(keep_ratio=NAN))),
        "sparsity.policy.keep_ratio",
    ),
    "shares of too many layers": (
        request(sparsity=sparse.Sparsity(policy=griffin(layer_keep_ratios=[0.5] * (LAYERS + 1)))),
        "sparsity.policy.layer_keep_ratios",
    ),
    "guard that allows nothing": (
        request(sparsity=sparse.Sparsity(policy=griffin(), guard=sparse.QualityGuard(max_divergence=0))),
        "sparsity.guard.max_divergence",
    ),
    "guard without a window": (
        request(sparsity=sparse.Sparsity(policy=griffin(), guard=sparse.QualityGuard(max_divergence=1, window=0))),
        "sparsity.guard.window",
    ),
    # Confidence
    "confidence of a layer that is not there": (confident(layers=[0, LAYERS]), "confidence.layers[1]"),
    "confidence of a layer twice": (confident(layers=[0, 0]), "confidence.layers[1]"),
    "confidence of the last layer alone": (confident(layers=[LAYERS - 1]), "confidence.layers"),
    "confidence in one option": (confident(options=[" yes"]), "confidence.options"),
    "confidence in more options than are read": (
        confident(options=[chr(33 + i) for i in range(65)]),
        "confidence.options",
    ),
    "confidence in an empty option": (confident(options=["yes", ""]), "confidence.options[1]"),
    "confidence in options of one first token": (confident(options=["yes", "no", "you"]), "confidence.options[2]"),
    "thresholds without options": (confident(thresholds=[0.5] * LAYERS), "confidence.thresholds"),
    "thresholds of three options": (
        confident(options=["a", "b", "c"], thresholds=[0.5] * LAYERS),
        "confidence.thresholds",
    ),
    "thresholds of too few layers": (confident(options=["a", "b"], thresholds=[0.5]), "confidence.thresholds"),
    "a threshold that is no probability": (
        confident(layers=[0], options=["a", "b"], thresholds=[1.5]),
        "confidence.thresholds[0]",
    ),
    "a threshold that is no number": (
        confident(layers=[0], options=["a", "b"], thresholds=[NAN]),
        "confidence.thresholds[0]",
    ),
    "grounding without a head set": (request(grounding=pb.Grounding(top_k=3)), "grounding.head_set"),
    "projection of the wrong width": (
        reading(projection=program.ProjectionReadout(vectors=[vector(1.0)])),
        "program.readouts[0].projection.vectors[0].values",
    ),
}


def refusal(call: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        list(call())
    return failure(caught.value)


@pytest.mark.parametrize(("bad", "field"), INVALID.values(), ids=INVALID.keys())
def test_is_refused_with_the_path_of_the_field(channel: grpc.Channel, bad: pb.GenerateRequest, field: str):
    refused = refusal(lambda: generation_pb2_grpc.GenerationServiceStub(channel).Generate(bad))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == [field]
    assert refused.reason == "INVALID_FIELD"
    assert refused.message.startswith(f"{field}: ")


# Field 1 of StopConditions (max_tokens), 2 of Sampling (top_k), as another language's int would send -1.
MINUS_ONE = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
NEGATIVE = {
    "stop.max_tokens": b"\x2a\x0b\x08" + MINUS_ONE,
    "sampling.top_k": b"\x22\x0b\x10" + MINUS_ONE,
}


@pytest.mark.parametrize(("field", "wire"), NEGATIVE.items(), ids=NEGATIVE.keys())
def test_a_negative_budget_on_the_wire_is_refused(channel: grpc.Channel, field: str, wire: bytes):
    generate = channel.unary_stream("/patchclamp.v1.GenerationService/Generate")
    refused = refusal(lambda: generate(request().SerializeToString() + wire))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == [field]


def test_paths_inside_compare_begin_with_its_request(channel: grpc.Channel):
    bad = pb.CompareRequest(request=edited(add(strength=NAN)))
    refused = refusal(lambda: generation_pb2_grpc.GenerationServiceStub(channel).Compare(bad))
    assert refused.fields == ["request.program.edits[0].strength"]


def test_a_score_without_a_continuation_is_refused(channel: grpc.Channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    refused = refusal(lambda: [stub.Score(pb.ScoreRequest(prompt=pb.Prompt(text="x")))])
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["continuation"])


def test_a_score_beyond_the_context_is_refused(channel: grpc.Channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    refused = refusal(lambda: [stub.Score(pb.ScoreRequest(prompt=pb.Prompt(text="x"), text="y" * CONTEXT))])
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["text"])


def test_another_model_is_not_found(channel: grpc.Channel):
    refused = refusal(lambda: generation_pb2_grpc.GenerationServiceStub(channel).Generate(request(model="gpt-17")))
    assert refused.code is grpc.StatusCode.NOT_FOUND
    assert refused.details["ErrorInfo"].metadata["field"] == "model"


def test_tokenize_refuses_an_empty_prompt(channel: grpc.Channel):
    stub = model_pb2_grpc.ModelServiceStub(channel)
    refused = refusal(lambda: [stub.Tokenize(model_pb2.TokenizeRequest(prompt=pb.Prompt(text="")))])
    assert refused.fields == ["prompt.text"]


def test_an_unknown_artifact_is_not_found(channel: grpc.Channel):
    bad = edited(add(add=program.AddVector(vector=program.Vector(artifact="no-such-tag"))))
    refused = refusal(lambda: generation_pb2_grpc.GenerationServiceStub(channel).Generate(bad))
    assert refused.code is grpc.StatusCode.NOT_FOUND
    assert refused.details["ErrorInfo"].metadata["field"] == "program.edits[0].add.vector.artifact"


def test_an_artifact_of_another_model_fails_its_precondition(live_server: Any, channel: grpc.Channel):
    import torch

    from patchclamp_server.artifacts.store import ArtifactStore
    from patchclamp_server.artifacts.types import ArtifactKind
    from patchclamp_server.model.sites import Site

    ArtifactStore(live_server.server.config.artifacts_url).put(
        ArtifactKind.VECTOR,
        {"layer.1": torch.ones(WIDTH)},
        model_fingerprint="sha256:" + "0" * 64,
        site=Site.RESID_POST,
        tags=("foreign",),
    )
    bad = edited(add(add=program.AddVector(vector=program.Vector(artifact="foreign"))))
    refused = refusal(lambda: generation_pb2_grpc.GenerationServiceStub(channel).Generate(bad))
    assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
    [violation] = refused.details["PreconditionFailure"].violations
    assert violation.subject == "program.edits[0].add.vector.artifact"


def test_an_oversized_message_is_refused_by_grpc_itself(channel: grpc.Channel):
    bad = request(prompt=pb.Prompt(text="x" * (4 * 1024 * 1024 + 1)))
    refused = refusal(lambda: generation_pb2_grpc.GenerationServiceStub(channel).Generate(bad))
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in refused.message


def test_the_client_says_how_large_an_oversized_message_was_and_what_to_do(live_server: LiveServer):
    with Client(live_server.address) as client, pytest.raises(PatchclampError) as caught:
        client.tokenize("x" * (4 * 1024 * 1024 + 1))
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert caught.value.message == (
        "the request has 4,194,315 bytes and the server takes 4,194,304 at once: "
        "send it in parts, or serve with a larger --max-message-bytes"
    )
