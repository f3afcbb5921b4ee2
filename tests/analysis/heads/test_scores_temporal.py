"""Temporal scores against ablation by hooks in transformers."""

from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_SECONDS
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from patchclamp_server.analysis.heads.scores.registry import SCORING_METHODS
from patchclamp_server.analysis.heads.scores.scoring import Fact, HeadScores, Scoring
from patchclamp_server.analysis.heads.scores.temporal import built_in_facts
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.text.prompt import PromptEncoder

FACTS = (
    Fact("In 1920 it was", " red", True),
    Fact("1955:", " b", True),
    Fact("In 2004 he", " went", True),
    Fact("The sky is", " blue", False),
    Fact("Two and two", " four", False),
)


@pytest.fixture
def engine(tiny_llama: LoadedModel) -> Iterator[Engine]:
    engine = Engine(tiny_llama, EngineConfig(max_sequences=8))
    engine.start()
    yield engine
    engine.shutdown()


async def scored(engine: Engine, *facts: Fact) -> HeadScores:
    prompts = PromptEncoder(engine.model.tokenizer, engine.model.info)
    job = Scoring("temporal", facts=facts)
    *_, found = [event async for event in SCORING_METHODS["temporal"](engine, prompts, job)]
    assert isinstance(found, HeadScores)
    return found


@torch.no_grad()
def naive_effects(model: LlamaForCausalLM, tokens: list[int], prompt_length: int) -> Tensor:
    """log p(answer) - log p(answer without the head), [n_layers, n_heads]."""

    def log_probability() -> float:
        logits = model(torch.tensor([tokens])).logits[0].log_softmax(1)
        return sum(float(logits[i - 1, tokens[i]]) for i in range(prompt_length, len(tokens)))

    def ablate(head: int) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = inputs[0].clone()
            z[..., head * dim : (head + 1) * dim] = 0.0
            return (z,)

        return hook

    n_layers, n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    dim = model.config.hidden_size // n_heads
    known = log_probability()
    effects = torch.empty(n_layers, n_heads)
    for layer in range(n_layers):
        for head in range(n_heads):
            handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(ablate(head))
            effects[layer, head] = known - log_probability()
            handle.remove()
    return effects


async def test_scores_are_differences_of_effects_of_zeroing_a_head(engine: Engine, tiny_llama_dir: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    tokenizer = engine.model.tokenizer
    effects = []
    for fact in FACTS:
        prompt, answer = tokenizer.encode(fact.prompt), tokenizer.encode(fact.answer)
        effects.append(naive_effects(model, prompt + answer, len(prompt)))
    expected = torch.stack(effects[:3]).mean(0) - torch.stack(effects[3:]).mean(0)
    found = await scored(engine, *FACTS)
    assert (found.scores - expected).abs().max() < 1e-4
    assert expected.abs().max() > 0.01
    assert found.low is not None
    assert found.high is not None
    assert (found.low <= found.scores).all()
    assert (found.scores <= found.high).all()
    assert len(found.evidence["facts"]) == len(FACTS)


async def test_the_control_deals_the_kinds_out_at_random(engine: Engine) -> None:
    found = await scored(engine, *FACTS)
    assert not torch.equal(found.control, found.scores)
    # The largest effects are real whichever facts they are counted with.
    assert found.control.abs().max() > 0.001


async def test_ending_early_takes_all_requests_back(engine: Engine) -> None:
    prompts = PromptEncoder(engine.model.tokenizer, engine.model.info)
    async with aclosing(SCORING_METHODS["temporal"](engine, prompts, Scoring("temporal"))) as events:
        assert await anext(events) == Progress("effects", 3, 9 * len(built_in_facts()))
    assert engine.drain(timeout_seconds=PATIENCE_SECONDS)


def test_there_are_a_dozen_built_in_facts_of_each_kind() -> None:
    facts = built_in_facts()
    assert sum(fact.time_conditioned for fact in facts) >= 12
    assert sum(not fact.time_conditioned for fact in facts) >= 12
    assert len({fact.prompt for fact in facts}) == len(facts)


@pytest.mark.parametrize(
    ("facts", "field"),
    [
        (FACTS[:4], "facts"),
        ((FACTS[0], *FACTS[3:]), "facts"),
        ((*FACTS, Fact("", " red", True)), "facts[5].prompt"),
        ((*FACTS, Fact("In 1920", "", True)), "facts[5].answer"),
    ],
)
async def test_facts_of_one_kind_and_empty_ones_are_refused(
    engine: Engine, facts: tuple[Fact, ...], field: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await scored(engine, *facts)
    assert refused.value.field == field
