"""Task and definition vectors, and how they are judged, against plain transformers with hooks."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine_runs import loaded, started
from oracle_sites import attach
from programs import prompt
from tiny_models import tiny_model
from torch import Tensor

from patchclamp_server.analysis.steering.definition import DefinitionPrompts, DefinitionVector, definition_vector
from patchclamp_server.analysis.steering.result import Result
from patchclamp_server.analysis.steering.task_vector import TaskPrompts, TaskVector, task_vector
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.model.sites import Site

SITE, LAYERS = Site.RESID_POST, (0, 2)
Prompts = tuple[tuple[int, ...], ...]


def prompts(name: str, n: int) -> Prompts:
    return tuple(prompt(f"{name} {i}", 6 + i % 3) for i in range(n))


@torch.no_grad()
def run(tokens: Sequence[int], layer: int, replaced: Tensor | None = None) -> tuple[Tensor, int]:
    """The state of the last token at a layer, which `replaced` takes the place of, and the likeliest next token."""
    kept: list[Tensor] = []

    def visit(site: Site, at: int, x: Tensor) -> Tensor:
        if (site, at) == (SITE, layer):
            if replaced is not None:
                x = x.clone()
                x[..., -1, :] = replaced
            kept.append(x.reshape(len(tokens), -1)[-1].clone())
        return x

    model = tiny_model("llama")
    hooks = attach(model, visit)
    logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return kept[0], int(logits[0, -1].argmax())


def states(of: Prompts, layer: int) -> Tensor:
    return torch.stack([run(tokens, layer)[0] for tokens in of])


def said(of: Prompts, layer: int, replaced: Tensor | None = None) -> list[int]:
    return [run(tokens, layer, replaced)[1] for tokens in of]


async def test_a_task_vector_and_its_control_are_judged_by_what_is_said_once_they_replace_the_state(
    tmp_path: Path,
) -> None:
    demonstrated, exchanged = prompts("demonstrated", 4), prompts("exchanged", 4)
    asked, shown = prompts("asked", 10), prompts("shown", 10)
    vectors = {layer: states(demonstrated, layer).mean(0) for layer in LAYERS}
    controls = {layer: states(exchanged, layer).mean(0) for layer in LAYERS}
    # Four answers are those of the vector, three of the control, two of no edit and one of demonstrations.
    sources = [said(asked, 2, vectors[2]), said(asked, 2, controls[2]), said(asked, 2), said(shown, 2)]
    answers = tuple(sources[which][i] for i, which in enumerate((0, 1, 2, 0, 1, 0, 3, 2, 0, 1)))
    job = TaskVector(TaskPrompts(demonstrated, exchanged, asked, shown, answers), (), SITE, LAYERS)
    store, model = ArtifactStore(tmp_path), loaded("llama")
    with started(model) as engine:
        *_, result = [event async for event in task_vector(engine, store, model.info, job)]
    assert isinstance(result, Result)

    def share(found: list[int]) -> float:
        return sum(a == b for a, b in zip(found, answers, strict=True)) / len(answers)

    for layer, evidence in zip(LAYERS, result.layers, strict=True):
        own = store.get(result.artifact.id).direction(layer)
        torch.testing.assert_close(own, vectors[layer], rtol=1e-4, atol=1e-5)
        assert evidence.heldout_accuracy == share(said(asked, layer, vectors[layer]))
        assert evidence.random_accuracy == share(said(asked, layer, controls[layer]))
        assert evidence.norm == pytest.approx(float(vectors[layer].norm()), rel=1e-4)
        assert evidence.activation_norm == pytest.approx(float(states(asked, layer).norm(dim=1).mean()), rel=1e-4)
    figures = [result.layers[1].heldout_accuracy, result.layers[1].random_accuracy, *result.baselines.values()]
    assert result.baselines == {"unedited": share(said(asked, 2)), "demonstrations": share(said(shown, 2))}
    assert len(set(figures)) > 2


async def test_a_definition_vector_is_judged_by_its_nearest_words_with_and_without_demonstrations(
    tmp_path: Path,
) -> None:
    # Of two sets the first four prompts end alike, of the bare ones the first one alone.
    definitions, bare = prompts("definitions", 6), prompts("bare", 6)
    words = tuple((*own[:1], *tokens[-4:]) if i < 4 else own for i, (tokens, own) in enumerate(ends(definitions)))
    bare_words = tuple((*own[:1], *tokens[-4:]) if i < 1 else own for i, (tokens, own) in enumerate(ends(bare)))
    defined = prompt("defined", 7)
    given = DefinitionPrompts(defined, definitions, words, bare, bare_words, 3)
    job = DefinitionVector(given, (), "what it is", SITE, LAYERS)
    store, model = ArtifactStore(tmp_path), loaded("llama")
    with started(model) as engine:
        *_, result = [event async for event in definition_vector(engine, store, model.info, job)]
    assert isinstance(result, Result)

    def nearest(a: Prompts, b: Prompts, layer: int) -> float:
        own, others = (x - x.mean(0) for x in (states(a, layer).double(), states(b, layer).double()))
        cosines = torch.stack([torch.cosine_similarity(row, others, dim=1) for row in own])
        return float((cosines.argmax(1) == torch.arange(len(own))).double().mean())

    for layer, evidence in zip(LAYERS, result.layers, strict=True):
        own = store.get(result.artifact.id).direction(layer)
        torch.testing.assert_close(own, states((defined,), layer)[0], rtol=1e-4, atol=1e-5)
        assert evidence.heldout_accuracy == pytest.approx(nearest(definitions, words, layer))
        assert evidence.activation_norm == pytest.approx(float(states(definitions, layer).norm(dim=1).mean()), rel=1e-4)
    baseline = nearest(bare, bare_words, result.best_layer)
    assert result.baselines == {"without_demonstrations": pytest.approx(baseline)}
    assert result.layers[0].heldout_accuracy != baseline


def ends(of: Prompts) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each prompt beside another one."""
    return [(tokens, prompt(f"word {i} {tokens}", 7)) for i, tokens in enumerate(of)]
