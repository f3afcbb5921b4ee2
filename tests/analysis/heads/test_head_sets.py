"""Head sets: which heads a selection names, and how alike two sets are."""

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from patchclamp_server.analysis.heads.sets.overlap import compare, rank_correlation
from patchclamp_server.artifacts.head_sets import Head, HeadSelection, select
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound, RequestError
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import LoadedModel

# The tiny llama has two layers of four heads.
SCORES = [[0.0, 0.3, 0.1, 0.0], [0.5, 0.0, 0.3, 0.05]]


@pytest.fixture
def info(tiny_llama: LoadedModel) -> ModelInfo:
    return tiny_llama.info


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def put(store: ArtifactStore, tag: str, scores: list[list[float]], model: str, **evidence: object) -> None:
    store.put(
        ArtifactKind.HEAD_SET, {"scores": torch.tensor(scores)}, model_fingerprint=model, evidence=evidence, tags=(tag,)
    )


def test_the_threshold_of_the_set_chooses_its_heads_best_first(store: ArtifactStore, info: ModelInfo) -> None:
    put(store, "found", SCORES, info.fingerprint, threshold=0.3)
    assert select(HeadSelection(head_set="found"), store, info, "heads") == (Head(1, 0), Head(0, 1), Head(1, 2))


def test_a_set_that_names_no_threshold_has_that_of_retrieval_heads(store: ArtifactStore, info: ModelInfo) -> None:
    put(store, "imported", SCORES, info.fingerprint)
    chosen = select(HeadSelection(head_set="imported"), store, info, "heads")
    assert chosen == (Head(1, 0), Head(0, 1), Head(1, 2), Head(0, 2))


def test_top_k_takes_the_best_whatever_the_threshold(store: ArtifactStore, info: ModelInfo) -> None:
    put(store, "found", SCORES, info.fingerprint, threshold=0.9)
    chosen = select(HeadSelection(head_set="found", top_k=5), store, info, "heads")
    assert chosen[3:] == (Head(0, 2), Head(1, 3))


def test_listed_heads_are_taken_as_they_are(store: ArtifactStore, info: ModelInfo) -> None:
    heads = (Head(1, 3), Head(0, 0))
    assert select(HeadSelection(heads=heads), store, info, "heads") == heads


@pytest.mark.parametrize(
    ("selection", "error", "field"),
    [
        (HeadSelection(), InvalidArgument, "heads"),
        (HeadSelection(heads=(Head(0, 0),), head_set="found"), InvalidArgument, "heads"),
        (HeadSelection(heads=(Head(0, 0),), top_k=1), InvalidArgument, "heads.top_k"),
        (HeadSelection(heads=(Head(0, 0), Head(2, 0))), InvalidArgument, "heads.heads.heads[1].layer"),
        (HeadSelection(heads=(Head(0, 4),)), InvalidArgument, "heads.heads.heads[0].head"),
        (HeadSelection(heads=(Head(0, 1), Head(0, 1))), InvalidArgument, "heads.heads.heads[1]"),
        (HeadSelection(head_set="found", top_k=9), InvalidArgument, "heads.top_k"),
        (HeadSelection(head_set="absent"), NotFound, "heads.head_set"),
        (HeadSelection(head_set="vector"), InvalidArgument, "heads.head_set"),
        (HeadSelection(head_set="high"), FailedPrecondition, "heads.head_set"),
        (HeadSelection(head_set="foreign"), FailedPrecondition, "heads.head_set"),
        (HeadSelection(head_set="smaller"), FailedPrecondition, "heads.head_set"),
    ],
)
def test_a_selection_that_names_no_heads_of_the_model_is_refused_by_field(
    store: ArtifactStore, info: ModelInfo, selection: HeadSelection, error: type[RequestError], field: str
) -> None:
    put(store, "found", SCORES, info.fingerprint, threshold=0.3)
    put(store, "high", SCORES, info.fingerprint, threshold=0.9)
    put(store, "foreign", SCORES, "another model")
    put(store, "smaller", SCORES[:1], info.fingerprint)
    vector = {"layer.0": torch.ones(4)}
    store.put(
        ArtifactKind.VECTOR, vector, model_fingerprint=info.fingerprint, site=next(iter(info.sites)), tags=("vector",)
    )
    with pytest.raises(error) as refused:
        select(selection, store, info, "heads")
    assert refused.value.field == field


def test_sets_are_compared_by_their_heads_and_by_all_scores(store: ArtifactStore) -> None:
    put(store, "a", SCORES, "base", threshold=0.3)
    put(store, "b", [[0.0, 0.4, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0]], "instruct", threshold=0.1)
    [found] = compare(["a", "b"], 0, store)
    assert (found.first, found.second, found.common) == (0, 1, 2)
    assert found.jaccard == pytest.approx(2 / 3)
    assert found.overlap_coefficient == 1.0
    assert found.expected_common == pytest.approx(3 * 2 / 8)
    [by_rank] = compare(["a", "b"], 1, store)
    assert (by_rank.common, by_rank.jaccard, by_rank.expected_common) == (0, 0.0, pytest.approx(1 / 8))


def test_every_pair_is_compared_once(store: ArtifactStore) -> None:
    for tag in "abc":
        put(store, tag, SCORES, tag)
    assert [(c.first, c.second) for c in compare(["a", "b", "c"], 0, store)] == [(0, 1), (0, 2), (1, 2)]


def test_expected_common_is_the_mean_over_random_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [len({*torch.randperm(8, generator=generator)[:3].tolist()} & {*range(2)}) for _ in range(4000)]
    assert sum(draws) / len(draws) == pytest.approx(3 * 2 / 8, abs=0.03)


@pytest.mark.parametrize(
    ("refs", "top_k", "field"),
    [
        (["a"], 0, "head_sets"),
        (["a", "small"], 0, "head_sets[1]"),
        (["a", "a"], 9, "top_k"),
        (["high", "a"], 0, "head_sets[0]"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused_by_field(
    store: ArtifactStore, refs: list[str], top_k: int, field: str
) -> None:
    put(store, "a", SCORES, "m")
    put(store, "small", SCORES[:1], "m")
    put(store, "high", SCORES, "m", threshold=0.9)
    with pytest.raises(RequestError) as refused:
        compare(refs, top_k, store)
    assert refused.value.field == field


def test_rank_correlation_is_spearmans_with_ties() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randint(0, 5, (2, 6, 9), generator=generator)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a.flatten(), b.flatten()).statistic, abs=1e-12)
    assert rank_correlation(a, a) == pytest.approx(1.0)
    assert rank_correlation(a, torch.zeros(6, 9)) == 0.0
