"""Turns messages of SparsityService into dataclasses of analysis/sparsity/job.py and back. Refusals name fields."""

from collections.abc import Sequence

import torch
from torch import Tensor

from patchclamp.v1 import sparsity_pb2 as pb
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.sparsity.calibrate import CALIBRATIONS, MAX_TOKENS, most_tokens
from patchclamp_server.analysis.sparsity.core_neurons import jaccard
from patchclamp_server.analysis.sparsity.job import CalibratedProfile, Calibration, Evaluation, Text
from patchclamp_server.analysis.sparsity.quality_card import QualityCard
from patchclamp_server.analysis.sparsity.speed import SpeedCard
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count, distinct, required
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.artifact import decode_description, decode_label, encode_artifact
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.message_size import within_a_message
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.rpc.codecs.sparsity import decode_policy, decode_unguarded, policy_path, policy_paths
from patchclamp_server.sparsity.binder import Binder, Bound
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.text.prompt import PromptEncoder

DEFAULT_DOCUMENT_TOKENS = 512
# Half of the tokens are the prompt, and at least one of the others is scored.
MIN_DOCUMENT_TOKENS = 4
DEFAULT_HOLDOUT_FRACTION = 0.25
MAX_EVALUATIONS = 64
MAX_PROMPTS = 64


def decode_calibration(
    request: pb.CalibrateProfileRequest, prompts: PromptEncoder, info: ModelInfo, model: SparseModel
) -> Calibration:
    """Returns a checked job. Tokenises the text: call it in a thread."""
    required(request, "policy", "")
    policy = decode_policy(request.policy, "policy")
    if policy.name not in CALIBRATIONS:
        message = f"needs no profile; these do: {', '.join(CALIBRATIONS)}"
        raise InvalidArgument(policy_path(policy, "policy"), message)
    if request.policy.static_set.neuron_set:
        raise InvalidArgument("policy.static_set.neuron_set", "calibration finds the set; leave it empty")
    with policy_paths(policy, "policy"):
        policy.keep_by_layer(info.n_layers)
    fraction = request.holdout_fraction if request.HasField("holdout_fraction") else DEFAULT_HOLDOUT_FRACTION
    if not 0 < fraction < 1:
        raise InvalidArgument("holdout_fraction", f"expected a number between 0 and 1, both excluded, got {fraction:g}")
    description, tags = decode_label(request)
    text = decode_text(request.text, prompts, info, most_tokens(policy, model))
    n = len(text.documents)
    if n < 2:
        raise InvalidArgument(
            "text.texts",
            f"one document of {text.documents.shape[1]} tokens: calibration and its quality card need one each",
        )
    heldout = min(max(1, round(n * fraction)), n - 1)
    return Calibration(policy, text, heldout, description, tags)


def decode_evaluation(
    request: pb.EvaluateProfileRequest, prompts: PromptEncoder, info: ModelInfo, binder: Binder
) -> tuple[list[Bound], Text]:
    """Returns what is measured, and on what. Tokenises and binds: call it in a thread."""
    if not 1 <= len(request.sparsities) <= MAX_EVALUATIONS:
        raise InvalidArgument("sparsities", f"expected 1 to {MAX_EVALUATIONS}, got {len(request.sparsities)}")
    bound = [decode_unguarded(sparsity, binder, f"sparsities[{i}]") for i, sparsity in enumerate(request.sparsities)]
    return bound, decode_text(request.text, prompts, info, MAX_TOKENS)


def decode_core_request(
    request: pb.PredictCoreNeuronsRequest, prompts: PromptEncoder, info: ModelInfo, binder: Binder
) -> tuple[Bound, list[tuple[int, ...]], tuple[int, ...]]:
    """Returns the policy, each prompt's tokens and the layers asked for. Tokenises and binds: call it in a thread."""
    required(request, "sparsity", "")
    bound = decode_unguarded(request.sparsity, binder, "sparsity")
    if not bound.policy.fixes_sets:
        message = (
            f"{bound.policy.name} chooses neurons for every token; expected a policy that fixes a set after the prompt"
        )
        raise InvalidArgument("sparsity", message)
    if not 1 <= len(request.prompts) <= MAX_PROMPTS:
        raise InvalidArgument("prompts", f"expected 1 to {MAX_PROMPTS}, got {len(request.prompts)}")
    for i, layer in enumerate(request.layers):
        count(layer, f"layers[{i}]", high=info.n_layers - 1)
    layers = distinct(request.layers, "layers") or tuple(range(info.n_layers))
    tokens = [decode_prompt(prompt, prompts, f"prompts[{i}]").ids for i, prompt in enumerate(request.prompts)]
    return bound, tokens, layers


def decode_text(proto: pb.SparsityText, prompts: PromptEncoder, info: ModelInfo, most: int) -> Text:
    """Cuts texts into documents of one length, of at most `most` tokens in all, each with the special tokens that begin
    a text."""
    longest = info.context_length
    tokens = min(DEFAULT_DOCUMENT_TOKENS, longest)
    if proto.document_tokens:
        tokens = count(proto.document_tokens, "text.document_tokens", low=MIN_DOCUMENT_TOKENS, high=longest)
    description = decode_description(proto.description, "text.description")
    if not proto.texts:
        raise InvalidArgument("text.texts", "expected at least one text")
    start = prompts.text_start
    documents: list[tuple[int, ...]] = []
    longest_text = 0
    for i, text in enumerate(proto.texts):
        ids = prompts.encode_body(text, f"text.texts[{i}]", most_tokens=most)
        longest_text = max(longest_text, len(ids))
        room = tokens - len(start)
        documents += [start + ids[i : i + room] for i in range(0, len(ids) - room + 1, room)]
        if len(documents) * tokens > most:
            message = f"more than {most // tokens} documents of {tokens} tokens, which is what is accepted here"
            raise InvalidArgument("text.texts", message)
    if not documents:
        message = f"no text fills a document of {tokens} tokens; the longest has {longest_text}"
        raise InvalidArgument("text.texts", message)
    return Text(torch.tensor(documents), description)


def encode_profile(event: Progress | CalibratedProfile) -> pb.CalibrateProfileResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.CalibrateProfileResponse)
    profile = pb.CalibratedProfile(
        artifact=encode_artifact(event.artifact),
        quality=encode_card(event.quality),
        random_control=encode_card(event.random_control),
    )
    return pb.CalibrateProfileResponse(result=profile)


def encode_evaluation(event: Progress | Evaluation) -> pb.EvaluateProfileResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.EvaluateProfileResponse)
    evaluation = pb.SparsityEvaluation(
        index=event.index,
        policy=event.policy,
        keep_ratio=event.keep_ratio,
        quality=encode_card(event.quality),
        random_control=encode_card(event.random_control),
        speed=None if event.speed is None else encode_speed(event.speed),
    )
    return pb.EvaluateProfileResponse(evaluation=evaluation)


def encode_card(card: QualityCard) -> pb.QualityCard:
    return pb.QualityCard(
        perplexity_ratio=card.perplexity_ratio,
        divergence=card.divergence,
        top1_agreement=card.top1_agreement,
        sparsity=card.sparsity,
        bytes_read_16=card.bytes_read_16,
        documents=card.documents,
        scored_tokens=card.scored_tokens,
        dense_perplexity=card.dense_perplexity,
    )


def encode_speed(card: SpeedCard) -> pb.SpeedCard:
    return pb.SpeedCard(
        dense_seconds_per_token=card.dense_seconds_per_token,
        sparse_seconds_per_token=card.sparse_seconds_per_token,
        speedup=card.speedup,
        tokens=card.tokens,
    )


def encode_cores(cores: Sequence[Sequence[Tensor]], layers: Sequence[int]) -> pb.PredictCoreNeuronsResponse:
    """Returns the sets by prompt and layer. Raises InvalidArgument for more than a client takes in one message."""
    response = pb.PredictCoreNeuronsResponse()
    for sets in cores:
        neurons = [pb.LayerNeurons(layer=layer, neurons=sets[layer].tolist()) for layer in layers]
        response.prompts.append(pb.CoreNeurons(layers=neurons))
    for i, first in enumerate(cores):
        for j in range(i + 1, len(cores)):
            shares = [jaccard(first[layer], cores[j][layer]) for layer in layers]
            mean = sum(shares) / len(shares)
            response.overlaps.append(pb.CoreOverlap(first=i, second=j, jaccard=shares, mean_jaccard=mean))
    within_a_message(response, "layers", "name fewer layers or prompts")
    return response
