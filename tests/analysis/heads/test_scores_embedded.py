"""On the real embedded model: attention mass of all heads against the full matrices, and successors from its weights.

`pytest -s` prints the differences and the best heads.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_runs import started
from transformers import PreTrainedModel

from patchclamp_server.analysis.heads.scores.ov import ov_weights
from patchclamp_server.analysis.heads.scores.registry import SCORING_METHODS
from patchclamp_server.analysis.heads.scores.repeated_tokens import sequences
from patchclamp_server.analysis.heads.scores.scoring import HeadScores, Scoring
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.load import LoadedModel, load_pretrained
from patchclamp_server.text.prompt import PromptEncoder

SEQUENCES = 2
# Heads at the top whose scores are far apart.
SURE = 20


@pytest.fixture(scope="module")
def eager(embedded_dir: Path) -> PreTrainedModel:
    model, _ = load_pretrained(embedded_dir)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def engine(embedded: LoadedModel) -> Iterator[Engine]:
    # These methods are no requests, and need no KV cache.
    with started(embedded, EngineConfig(kv_cache_tokens=64)) as engine:
        yield engine


async def scored(engine: Engine, job: Scoring) -> HeadScores:
    prompts = PromptEncoder(engine.model.tokenizer, engine.model.info)
    *_, found = [event async for event in SCORING_METHODS[job.method](engine, prompts, job)]
    assert isinstance(found, HeadScores)
    return found


def shown(found: HeadScores) -> str:
    return ", ".join(f"L{layer}H{head} {float(found.scores[layer, head]):.3f}" for layer, head in found.best[:5])


@pytest.mark.parametrize("method", ["induction", "previous_token", "ngram"])
async def test_scores_and_ranking_are_those_of_full_attention_matrices(
    method: str, engine: Engine, eager: PreTrainedModel
) -> None:
    job = Scoring(method, sequences=SEQUENCES, seed=3)
    found = await scored(engine, job)

    n = 2 if method == "ngram" else 1
    prompts = PromptEncoder(engine.model.tokenizer, engine.model.info)
    means = []
    for repeated in sequences(engine.model, prompts, job, n):
        with torch.no_grad():
            attentions = eager(repeated.tokens[None], output_attentions=True).attentions
        queries = repeated.queries(n)
        keys = queries - 1 if method == "previous_token" else queries - repeated.period + 1
        means.append(torch.stack(attentions)[:, 0, :, queries, keys].mean(2))
    expected = torch.stack(means).mean(0)

    difference = float((found.scores - expected).abs().max())
    same = sum(a == b for a, b in zip(ranking(found.scores), ranking(expected), strict=True))
    print(f"\n{method}: largest difference {difference:.1e}, {same} of {expected.numel()} ranks equal;", shown(found))
    assert difference <= 1e-5
    assert ranking(found.scores)[:SURE] == ranking(expected)[:SURE]
    # All others too, unless they are closer than rounding.
    assert expected.flatten()[ranking(found.scores)].diff().max() <= 2 * difference
    assert found.scores.max() > 0.5
    assert found.control.max() < 0.1


def ranking(scores: torch.Tensor) -> list[int]:
    return scores.flatten().argsort(descending=True, stable=True).tolist()


async def test_the_best_successor_head_is_above_chance(engine: Engine) -> None:
    found = await scored(engine, Scoring("successor"))
    best = found.best[0]
    chance = found.evidence["chance"]
    print(f"\nsuccessor: {found.evidence['tokens']} tokens, chance {chance:.3f}, best {shown(found)}, ", end="")
    print(f"of random targets at most {float(found.control.max()):.3f}")
    names = {sequence["name"].split(",")[0] for sequence in found.evidence["sequences"]}
    assert {"days", "months", "numbers", "letters"} <= names
    assert found.low is not None
    # Neither by chance nor as the luckiest of all heads on random targets.
    assert found.low[best] > chance
    assert found.scores[best] > found.control.max()


def test_factors_of_a_quantised_model_are_its_weights(embedded: LoadedModel, eager: PreTrainedModel) -> None:
    assert embedded.decoder.blocks[0].qkv.matrix is not None
    info, attention = embedded.info, eager.model.layers[23].self_attn
    values, outputs = ov_weights(embedded.decoder, 23)
    expected = attention.v_proj.weight.view(info.n_kv_heads, info.head_dim, info.d_model)
    torch.testing.assert_close(
        values, expected.repeat_interleave(info.n_heads // info.n_kv_heads, 0), rtol=0, atol=1e-6
    )
    for head in range(info.n_heads):
        columns = attention.o_proj.weight[:, head * info.head_dim : (head + 1) * info.head_dim]
        torch.testing.assert_close(outputs[head], columns, rtol=0, atol=1e-6)
