"""Nuclear norms from the factors against those of the whole products."""

import pytest
import torch
from engine_runs import loaded, started
from tiny_models import FAMILIES, tiny_model

from patchclamp_server.analysis.heads.scores.ov import ov_weights
from patchclamp_server.analysis.heads.scores.ov_nuclear_norm import nuclear_norms
from patchclamp_server.analysis.heads.scores.registry import SCORING_METHODS
from patchclamp_server.analysis.heads.scores.scoring import HeadScores, Scoring
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.text.prompt import PromptEncoder


def test_the_norm_of_a_product_is_the_sum_of_its_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(3, 17, 5, generator=generator, dtype=torch.float64)
    right = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(left @ right, "nuc")
    torch.testing.assert_close(nuclear_norms(left, right), expected)


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_head_has_the_norm_of_what_its_weights_write(family: str) -> None:
    model = loaded(family)
    job = Scoring("ov_nuclear_norm")
    encoder = PromptEncoder(model.tokenizer, model.info)
    with started(model) as engine:
        events = [event async for event in SCORING_METHODS[job.method](engine, encoder, job)]
    *progress, found = events
    assert progress == [Progress("layers", i + 1, model.info.n_layers) for i in range(model.info.n_layers)]
    assert isinstance(found, HeadScores)
    for layer in range(model.info.n_layers):
        values, outputs = ov_weights(model.decoder, layer)
        expected = torch.linalg.matrix_norm((outputs @ values).double(), "nuc").float()
        torch.testing.assert_close(found.scores[layer], expected, rtol=1e-5, atol=0.0)
    assert found.low is None


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_write_what_the_attention_block_writes_of_a_single_token(family: str) -> None:
    """With one token, each head attends to it alone: outputs and biases add up to what the module returns."""
    model, decoder = tiny_model(family), loaded(family).decoder
    spec, names = decoder.spec, decoder.spec.family
    kept = {}

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        kept["z"], kept["out"] = inputs[0][0, 0], output[0, 0]

    block = list(model.get_submodule(names.layers))[1]
    normalised = {}
    handles = [
        block.get_submodule(names.attn_output).register_forward_hook(keep),
        block.get_submodule(names.attn_norm).register_forward_hook(
            lambda module, inputs, output: normalised.update(x=output.reshape(-1, spec.d_model)[0])
        ),
    ]
    with torch.no_grad():
        model(torch.tensor([[7]]))
        for handle in handles:
            handle.remove()
        values, outputs = ov_weights(decoder, 1)
        z = (values @ normalised["x"]).flatten()
        value_bias = decoder.blocks[1].qkv.bias
        if value_bias is not None:
            own = value_bias[(spec.n_heads + spec.n_kv_heads) * spec.head_dim :].view(spec.n_kv_heads, spec.head_dim)
            z = z + own.repeat_interleave(spec.n_heads // spec.n_kv_heads, 0).flatten()
        torch.testing.assert_close(z, kept["z"])
        out = (outputs @ z.view(spec.n_heads, spec.head_dim, 1)).sum(0)[:, 0]
        bias = decoder.blocks[1].attn_output.bias
        torch.testing.assert_close(out if bias is None else out + bias, kept["out"], rtol=1e-4, atol=1e-5)


async def test_the_control_is_of_random_factors_as_large() -> None:
    model = loaded("qwen3")
    job = Scoring("ov_nuclear_norm")
    prompts = PromptEncoder(model.tokenizer, model.info)
    with started(model) as engine:
        *_, found = [event async for event in SCORING_METHODS[job.method](engine, prompts, job)]
    assert isinstance(found, HeadScores)
    # These weights are random themselves.
    ratio = found.scores / found.control
    assert ratio.min() > 0.9
    assert ratio.max() < 1.1
