"""SearchFeatures over a real channel: equal to numpy on the activations themselves, and a planted feature is found."""

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from live import LiveServer
from small_autoencoder import SmallAutoencoder, activations, texts
from tests.rpc.statuses import failure
from torch import Tensor

from patchclamp.v1 import feature_pb2 as pb
from patchclamp.v1 import feature_pb2_grpc, tensor_pb2
from patchclamp_server.artifacts.feature_labels import label_tensors
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.sparsity.mlp import matrix
from patchclamp_server.text.prompt import PromptEncoder

CODE = "code"


@pytest.fixture(scope="module")
def server(embedded_server: LiveServer, small_autoencoder: SmallAutoencoder) -> LiveServer:
    store = store_of(embedded_server)
    info = small_autoencoder.put(store, embedded_server.model.info.fingerprint, "small")
    named = label_tensors({3: "about dogs", 200: "Dogs", 7: "numbers"})
    fingerprint = embedded_server.model.info.fingerprint
    store.put(
        ArtifactKind.FEATURE_LABELS,
        named,
        model_fingerprint=fingerprint,
        provenance={"autoencoder": info.id},
        tags=("small-labels",),
    )
    return embedded_server


@pytest.fixture(scope="module")
def stub(server: LiveServer) -> Iterator[feature_pb2_grpc.FeatureServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield feature_pb2_grpc.FeatureServiceStub(channel)


def store_of(server: LiveServer) -> ArtifactStore:
    return server.server.services.store


def by_label(per_label: int = 4) -> dict[str, tuple[str, ...]]:
    return {label: own[:per_label] for label, own in texts().items()}


def groups(chosen: dict[str, tuple[str, ...]]) -> dict[str, object]:
    return {"groups": [{"label": label, "prompts": [{"text": t} for t in own]} for label, own in chosen.items()]}


def search(stub: feature_pb2_grpc.FeatureServiceStub, **request: Any) -> pb.FoundFeatures:
    events = list(stub.SearchFeatures(pb.SearchFeaturesRequest(**{"autoencoder": "small"} | request)))
    assert [event.WhichOneof("event") for event in events[-1:]] == ["result"]
    return events[-1].result


def rows_of(server: LiveServer, chosen: dict[str, tuple[str, ...]]) -> tuple[Tensor, list[str], list[int]]:
    """Activations [tokens, width] of all texts but their first tokens, with the label and the id of each."""
    encoder = PromptEncoder(server.model.tokenizer, server.model.info)
    parts: list[Tensor] = []
    labels: list[str] = []
    ids: list[int] = []
    for label, own in chosen.items():
        for text in own:
            tokens = encoder.encode_text(text).ids
            for start in range(0, len(tokens), 512):
                window = tokens[start : start + 512]
                parts.append(activations(server.model, window)[1:])
                labels += [label] * (len(window) - 1)
                ids += window[1:]
    return torch.cat(parts), labels, ids


def expected_scores(f: np.ndarray, is_target: np.ndarray, is_other: np.ndarray) -> np.ndarray:
    target, other = f[is_target], f[is_other]
    n, m = len(target), len(other)
    within = np.sqrt((n * target.var(0) + m * other.var(0)) / (n + m))
    scores: np.ndarray = (target.mean(0) - other.mean(0)) / np.maximum(within, 1e-12)
    return scores


def test_a_contrast_equals_numpy_on_the_activations(
    server: LiveServer, stub: feature_pb2_grpc.FeatureServiceStub, small_autoencoder: SmallAutoencoder
) -> None:
    chosen = by_label()
    label = next(iter(chosen))
    found = search(stub, contrast={"texts": groups(chosen), "target": label}, top_k=8)
    x, labels, _ = rows_of(server, chosen)
    f = small_autoencoder.encode(x).double().numpy()
    is_target = np.array([each == label for each in labels])
    scores = expected_scores(f, is_target, ~is_target)
    best = np.argsort(-scores, kind="stable")[:8]
    np.testing.assert_allclose([each.score for each in found.features], scores[best], rtol=1e-3)
    assert found.features[0].feature == best[0]
    first = found.features[0]
    np.testing.assert_allclose(first.target_mean, f[is_target, best[0]].mean(), rtol=1e-3)
    np.testing.assert_allclose(first.contrast_mean, f[~is_target, best[0]].mean(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(first.rate, (f[:, best[0]] > 0).mean(), atol=2 / len(f))
    assert found.tokens == len(f)
    np.testing.assert_allclose(found.mean_active, (f > 0).sum(1).mean(), rtol=1e-3)
    assert abs(found.active_features - int((f > 0).any(0).sum())) <= 1
    y = f @ small_autoencoder.tensors["decoder"].double().numpy() + small_autoencoder.tensors["decoder_bias"].numpy()
    errors = np.square(x.double().numpy() - y).sum()
    total = np.square(x.double().numpy() - x.double().numpy().mean(0)).sum()
    np.testing.assert_allclose(found.explained_variance, 1 - errors / total, rtol=1e-3)
    # It has learned something.
    assert found.explained_variance > 0.3


def test_a_contrast_of_two_labels_leaves_out_the_others(
    server: LiveServer, stub: feature_pb2_grpc.FeatureServiceStub, small_autoencoder: SmallAutoencoder
) -> None:
    chosen = by_label(2)
    target, other, *_ = chosen
    found = search(stub, contrast={"texts": groups(chosen), "target": target, "contrast": other}, top_k=1)
    x, labels, _ = rows_of(server, chosen)
    f = small_autoencoder.encode(x).double().numpy()
    scores = expected_scores(f, np.array([e == target for e in labels]), np.array([e == other for e in labels]))
    np.testing.assert_allclose(found.features[0].score, scores.max(), rtol=1e-3)


def test_a_planted_feature_is_found_by_the_token_that_it_stands_for(
    server: LiveServer, stub: feature_pb2_grpc.FeatureServiceStub, small_autoencoder: SmallAutoencoder
) -> None:
    chosen = by_label()
    x, _, ids = rows_of(server, chosen)
    encoder = PromptEncoder(server.model.tokenizer, server.model.info)
    the = encoder.token_of(" the")
    at = np.array(ids) == the
    assert at.sum() > 5
    # A feature that reads what tells both apart best, by linear discriminant analysis, and fires half-way.
    is_the = torch.from_numpy(at)[:, None]
    centred = torch.where(is_the, x - x[at].mean(0), x - x[~at].mean(0)).double()
    within = centred.T @ centred / len(x)
    within += 0.01 * within.diagonal().mean() * torch.eye(len(within), dtype=torch.float64)
    direction = torch.linalg.solve(within, (x[at].mean(0) - x[~at].mean(0)).double()).float()
    planted = 77
    tensors = {name: tensor.clone() for name, tensor in small_autoencoder.tensors.items()}
    tensors["encoder"][planted] = direction
    half_way = (x[at].mean(0) + x[~at].mean(0)) / 2 - tensors["decoder_bias"]
    tensors["encoder_bias"][planted] = -float(half_way @ direction)
    tensors["decoder"][planted] = direction
    store, fingerprint = store_of(server), server.model.info.fingerprint
    SmallAutoencoder(tensors, small_autoencoder.provenance, x).put(store, fingerprint, "planted")
    found = search(stub, autoencoder="planted", tokens={"texts": groups(chosen), "tokens": [" the"]}, top_k=3)
    assert found.features[0].feature == planted
    along = search(stub, autoencoder="planted", direction={"values": values(direction)}, top_k=2)
    assert along.features[0].feature == planted
    assert along.features[0].score == pytest.approx(1.0, abs=1e-4)
    rows = tensors["decoder"].numpy()
    cosines = rows @ direction.numpy() / np.linalg.norm(rows, axis=1) / float(direction.norm())
    np.testing.assert_allclose(along.features[1].score, np.sort(cosines)[-2], rtol=1e-4)


def values(vector: Tensor) -> tensor_pb2.Tensor:
    data = vector.contiguous().numpy().astype("<f4").tobytes()
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=list(vector.shape), data=data)


def test_the_promoted_tokens_have_the_largest_products_with_the_decoder_row(
    server: LiveServer, stub: feature_pb2_grpc.FeatureServiceStub, small_autoencoder: SmallAutoencoder
) -> None:
    row = small_autoencoder.tensors["decoder"][200]
    found = search(stub, label="dogs", labels="small-labels").features[0]
    decoder = server.model.decoder
    scale, rows = decoder.final_norm.weight.float(), matrix(decoder.unembedding).float()
    products = (row * scale) @ rows.T
    best = products.topk(10)
    assert [token.id for token in found.promotes] == best.indices.tolist()
    np.testing.assert_allclose([token.product for token in found.promotes], best.values.numpy(), rtol=1e-3)


def test_labels_are_searched_without_regard_to_case_the_closest_first(
    stub: feature_pb2_grpc.FeatureServiceStub,
) -> None:
    found = search(stub, label="DOGS", labels="small-labels").features
    assert [(each.feature, each.label, each.score) for each in found] == [
        (200, "Dogs", 1.0),
        (3, "about dogs", pytest.approx(0.4)),
    ]
    assert list(search(stub, label="nothing", labels="small-labels").features) == []


def test_what_is_found_has_its_label(
    stub: feature_pb2_grpc.FeatureServiceStub, small_autoencoder: SmallAutoencoder
) -> None:
    row = small_autoencoder.tensors["decoder"][7]
    found = search(stub, direction={"values": values(row)}, labels="small-labels", top_k=1)
    assert [(each.feature, each.label) for each in found.features] == [(7, "numbers")]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({}, "by"),
        ({"label": "x"}, "labels"),
        ({"label": "x", "labels": "small"}, "labels"),
        ({"label": "", "labels": "small-labels"}, "label"),
        ({"autoencoder": "small-labels", "label": "x"}, "autoencoder"),
        ({"direction": {"artifact": "small"}}, "direction.artifact"),
        ({"direction": {"values": values(torch.ones(3))}}, "direction.values"),
        ({"contrast": {"texts": groups({"a": ("x y",), "b": ("z",)}), "target": "c"}}, "contrast.target"),
        (
            {"contrast": {"texts": groups({"a": ("x y",), "b": ("z",)}), "target": "a", "contrast": "a"}},
            "contrast.contrast",
        ),
        ({"contrast": {"texts": groups({"a": ("x y",)}), "target": "a"}}, "contrast.texts"),
        ({"tokens": {"texts": groups({"a": ("x y",)}), "tokens": ["two words"]}}, "tokens.tokens[0]"),
        ({"tokens": {"texts": groups({"a": ("one two",)}), "tokens": [" the"]}}, "tokens.tokens"),
        ({"tokens": {"texts": groups({"a": ("one two",)})}}, "tokens.tokens"),
        ({"label": "x", "labels": "small-labels", "top_k": 1001}, "top_k"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused_with_its_field(
    stub: feature_pb2_grpc.FeatureServiceStub, request_: dict[str, object], field: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        search(stub, **request_)
    told = failure(refused.value)
    assert told.fields == [field], told.message


def test_labels_of_another_autoencoder_are_refused(
    server: LiveServer, stub: feature_pb2_grpc.FeatureServiceStub, small_autoencoder: SmallAutoencoder
) -> None:
    small_autoencoder.with_k(8).put(store_of(server), server.model.info.fingerprint, "other")
    with pytest.raises(grpc.RpcError) as refused:
        search(stub, autoencoder="other", label="dogs", labels="small-labels")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
