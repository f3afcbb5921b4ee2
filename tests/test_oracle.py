"""The oracle checked against plain generation, against hand computations, and against itself."""

import math
from typing import Any

import pytest
import torch
from oracle import OracleResult, oracle_logits, run_oracle
from oracle_formulas import edited, in_scope
from programs import EDIT_KINDS, abort, edit, mixed, one_of_each_kind, prompt, shapes, sites_of
from tiny_models import FAMILIES, WINDOW, tiny_model
from torch import Tensor, tensor

from patchclamp_server.interventions.kinds.rotate_in_plane import RotateInPlane
from patchclamp_server.interventions.program import (
    AddVector,
    CapProjection,
    Comparison,
    Condition,
    Edit,
    Gate,
    HeadEdit,
    HeadReadout,
    LogitLensReadout,
    LowRank,
    NeuronEdit,
    NeuronOp,
    Phase,
    PositionRange,
    Program,
    ProjectionReadout,
    ProjectOut,
    Readout,
    ReplaceVector,
    RotateTowards,
    Scope,
    SetProjection,
    TokenSelector,
    Vector,
)
from patchclamp_server.model.sites import Site

PROMPT = prompt("oracle", 18)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(family: str, program: Program | None, new: int = 3) -> OracleResult:
    return run_oracle(tiny_model(family), PROMPT, program, new)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_program_it_is_plain_generation(family: str) -> None:
    result = run(family, None, new=10)
    model: Any = tiny_model(family)
    out = model.generate(
        tensor([PROMPT]), max_new_tokens=10, do_sample=False, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert result.tokens == tuple(out.sequences[0, len(PROMPT) :].tolist())
    torch.testing.assert_close(result.logits, torch.cat(out.logits), rtol=1e-5, atol=1e-5)
    assert len(set(result.tokens)) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_changes_the_logits_at_every_site_it_may_have(family: str) -> None:
    model, s = tiny_model(family), shapes(family)
    plain = oracle_logits(model, PROMPT, None)
    for kind in EDIT_KINDS:
        for site in sites_of(kind, s):
            changed = oracle_logits(model, PROMPT, Program((edit(kind, site, s),)))
            assert (changed - plain).abs().max() > 1e-2 * plain.abs().max(), f"{kind} at {site.value}"


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_zero_is_no_program_bit_for_bit(family: str) -> None:
    s = shapes(family)
    edits = tuple(
        edit(kind, site, s, name=f"{kind} {site}", strength=0.0, all_layers=True)
        for kind in EDIT_KINDS
        for site in sites_of(kind, s)
    )
    result = run(family, Program(edits), new=1)
    assert torch.equal(result.all_logits, run(family, None, new=1).all_logits)
    assert all(count.mean_relative_change == 0.0 for count in result.receipts)


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_at_different_sites_commute_and_adds_at_one_site_do(family: str) -> None:
    s = shapes(family)
    a, b = edit("rotate_towards", Site.RESID_PRE, s, name="a"), edit("neurons_scale", Site.MLP_POST, s, name="b")
    assert torch.equal(run(family, Program((a, b)), 1).logits, run(family, Program((b, a)), 1).logits)
    a, b = edit("add", Site.RESID_POST, s, "a", name="a"), edit("add", Site.RESID_POST, s, "b", name="b")
    ab, ba = run(family, Program((a, b)), 1).logits, run(family, Program((b, a)), 1).logits
    torch.testing.assert_close(ab, ba, rtol=1e-5, atol=1e-5)


def test_edits_of_one_site_are_applied_in_listed_order() -> None:
    s = shapes("llama")
    a, b = edit("add", Site.RESID_POST, s, name="a"), edit("replace", Site.RESID_POST, s, name="b")
    replaced_last, added_last = run("llama", Program((a, b)), 1), run("llama", Program((b, a)), 1)
    assert not torch.allclose(replaced_last.logits, added_last.logits)
    torch.testing.assert_close(replaced_last.logits, run("llama", Program((b,)), 1).logits)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_neox"])
def test_the_middle_of_the_residual_stream_is_what_enters_plus_what_attention_adds(family: str) -> None:
    """An edit of resid_mid must reach the residual too: adding v there is adding v to attn_out."""
    s = shapes(family)
    at_out, at_mid = edit("add", Site.ATTN_OUT, s), edit("add", Site.ATTN_OUT, s)
    at_mid = Edit(at_mid.kind, Site.RESID_MID, layers=(1,))
    expected = run(family, Program((at_out,)), 1).logits
    torch.testing.assert_close(run(family, Program((at_mid,)), 1).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_to_the_mlp_output_is_adding_to_the_end_of_its_block_and_to_the_start_of_the_next(family: str) -> None:
    s = shapes(family)
    kind = edit("add", Site.MLP_OUT, s).kind
    logits = [
        run(family, Program((Edit(kind, site, layers=(layer,)),)), 1).logits
        for site, layer in ((Site.MLP_OUT, 1), (Site.RESID_POST, 1), (Site.RESID_PRE, 2))
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], logits[2], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_logit_lens_is_the_model_itself(family: str) -> None:
    last = shapes(family).n_layers - 1
    readout = Readout(LogitLensReadout(3), Site.RESID_POST, layers=(last,))
    result = run(family, Program(readouts=(readout,)), 1)
    top = torch.log_softmax(result.all_logits[-1], dim=-1).topk(3)
    assert result.readouts[-1].ids == tuple(top.indices.tolist())
    assert result.readouts[-1].values == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_depend_on_the_past_alone(family: str) -> None:
    """A full recompute of a longer sequence leaves the logits of its beginning as they were."""
    for name, program in (mixed(shapes(family)) | one_of_each_kind(shapes(family))).items():
        result = run(family, program, new=4)
        scale = result.logits.abs().max()
        behind = result.all_logits[len(PROMPT) - 1 :]
        assert (result.logits - behind).abs().max() < 1e-5 * scale, name


# Formulas, by hand, on h = (3, 4).
H = tensor([3.0, 4.0], dtype=torch.float64)
X = Vector(values=tensor([2.0, 0.0]))
HAND_COMPUTED: dict[str, tuple[Edit, list[float]]] = {
    "add": (Edit(AddVector(X), Site.RESID_PRE), [5.0, 4.0]),
    "add half": (Edit(AddVector(X), Site.RESID_PRE, strength=0.5), [4.0, 4.0]),
    "add the unit vector": (Edit(AddVector(Vector(values=X.values, unit=True)), Site.RESID_PRE), [4.0, 4.0]),
    "project out": (Edit(ProjectOut(X), Site.RESID_PRE), [0.0, 4.0]),
    "project out, same norm": (Edit(ProjectOut(X), Site.RESID_PRE, preserve_norm=True), [0.0, 5.0]),
    "cap above": (Edit(CapProjection(X, max=1.0), Site.RESID_PRE), [1.0, 4.0]),
    "cap below": (Edit(CapProjection(X, min=3.5), Site.RESID_PRE), [3.5, 4.0]),
    "cap that holds": (Edit(CapProjection(X, min=-1.0, max=3.5), Site.RESID_PRE), [3.0, 4.0]),
    "set projection": (Edit(SetProjection(X, -7.0), Site.RESID_PRE), [-7.0, 4.0]),
    "replace": (Edit(ReplaceVector(X), Site.RESID_PRE), [2.0, 0.0]),
    "rotate a quarter past the vector": (Edit(RotateTowards(X, math.pi / 2), Site.RESID_PRE), [5.0, 0.0]),
    "rotate parallel": (Edit(RotateTowards(Vector(values=tensor([6.0, 8.0])), 1.0), Site.RESID_PRE), [3.0, 4.0]),
    "rotate backwards": (
        Edit(RotateTowards(Vector(values=tensor([-4.0, 3.0])), math.pi / 4), Site.RESID_PRE),
        [-(0.5**0.5), 7 * 0.5**0.5],
    ),
    "turn by a quarter in a plane": (
        Edit(RotateInPlane(math.pi / 2, plane=tensor([[2.0, 0.0], [5.0, 3.0]])), Site.RESID_PRE),
        [-4.0, 3.0],
    ),
    "turn by half about a centre": (
        Edit(RotateInPlane(math.pi, plane=tensor([[1.0, 0.0], [0.0, 1.0]]), centre=tensor([1.0, 0.0])), Site.RESID_PRE),
        [-1.0, -4.0],
    ),
    "low rank": (
        Edit(LowRank(tensor([[0.0, 1.0]]), tensor([[1.0, 0.0]]), tensor([0.5])), Site.RESID_PRE),
        [3.0, 3.5],
    ),
    "neuron set": (Edit(NeuronEdit((1,), op=NeuronOp.SET, values=(9.0,)), Site.MLP_POST), [3.0, 9.0]),
    "neuron scale": (Edit(NeuronEdit((0, 1), op=NeuronOp.SCALE, values=(2.0, -1.0)), Site.MLP_POST), [6.0, -4.0]),
    "neuron add": (Edit(NeuronEdit((1, 0), op=NeuronOp.ADD, values=(1.0,)), Site.MLP_POST), [4.0, 5.0]),
    "neuron clamp": (Edit(NeuronEdit((0, 1), op=NeuronOp.CLAMP, min=3.2, max=3.8), Site.MLP_POST), [3.2, 3.8]),
    "head scale": (Edit(HeadEdit((1,), scale=0.0), Site.ATTN_Z), [3.0, 0.0]),
    "head mean": (Edit(HeadEdit((1, 0), mean=tensor([[8.0], [6.0]])), Site.ATTN_Z), [6.0, 8.0]),
}


@pytest.mark.parametrize("name", HAND_COMPUTED)
def test_the_formula_is_the_one_computed_by_hand(name: str) -> None:
    case, expected = HAND_COMPUTED[name]
    result: Tensor = edited(case, case.strength, H, (0,), 0, {}, n_heads=2)
    assert result.tolist() == pytest.approx(expected, abs=1e-6)


def embedded(tokens: tuple[int, ...]) -> Tensor:
    """Embeddings [T, d_model] of the tiny llama: its resid_pre at layer 0."""
    table = tiny_model("llama").get_parameter("model.embed_tokens.weight")
    return table.detach()[list(tokens)]


def test_the_receipt_is_the_one_computed_by_hand() -> None:
    direction = torch.zeros(48)
    direction[0] = 3.0
    scope = Scope(include=(TokenSelector(positions=PositionRange(0, 2)),))
    by_three = Edit(AddVector(Vector(values=direction)), Site.RESID_PRE, layers=(0,), scope=scope)
    result = run("llama", Program((by_three,)))
    embeddings = embedded(PROMPT[:2])
    assert result.receipts[0].rows == 2
    assert result.receipts[0].mean_relative_change == pytest.approx(float((3.0 / embeddings.norm(dim=-1)).mean()))
    assert result.receipts[0].gate_firings == 0


def gated(latched: bool, scope: Scope | None = None) -> OracleResult:
    """Layer 1 is edited where the first coordinate of the embedding is positive."""
    direction = torch.zeros(48)
    direction[0] = 2.0
    condition = Condition(Site.RESID_PRE, 0, Vector(values=direction), Comparison.ABOVE, 0.0, scope=scope or Scope())
    gate = Gate(condition, latched)
    return run("llama", Program((edit("add", Site.RESID_PRE, shapes("llama"), layers=(1, 2), gate=gate),)))


def positive_positions(result: OracleResult) -> list[int]:
    first_coordinates = embedded(PROMPT + result.tokens[:-1])[:, 0].tolist()
    return [position for position, value in enumerate(first_coordinates) if value > 0]


def test_a_gate_per_token_opens_where_its_condition_holds() -> None:
    result = gated(latched=False)
    open_at = positive_positions(result)
    assert 0 < len(open_at) < len(PROMPT)
    assert (result.receipts[0].rows, result.receipts[0].gate_firings) == (2 * len(open_at), 2 * len(open_at))


def test_a_latched_gate_stays_open_from_the_token_that_opened_it() -> None:
    result = gated(latched=True)
    first = positive_positions(result)[0]
    assert result.receipts[0].first_open == first
    assert result.receipts[0].rows == 2 * (len(PROMPT) + 2 - first)


def test_a_gate_does_not_examine_tokens_outside_its_scope() -> None:
    late = Scope(include=(TokenSelector(positions=PositionRange(9, None)),))
    result = gated(latched=True, scope=late)
    assert result.receipts[0].first_open == next(p for p in positive_positions(result) if p >= 9)


def test_an_abort_condition_ends_the_sequence_at_the_token_that_fires() -> None:
    s = shapes("llama")
    assert run("llama", abort(s, threshold=1e6), 6).aborted_at is None
    result = run("llama", abort(s, threshold=-1e6), 6)
    assert (result.aborted_at, result.aborted_by, len(result.tokens)) == (len(PROMPT), "too much", 1)


def test_a_strength_changes_from_the_position_it_is_given_for() -> None:
    s = shapes("llama")
    program = Program((edit("add", Site.RESID_POST, s, name="steer", strength=0.0),))
    changed = {"steer": {len(PROMPT) + 1: 2.0}}
    result = run_oracle(tiny_model("llama"), PROMPT, program, 4, strengths_by_position=changed)
    plain = run("llama", None, 4)
    assert torch.equal(result.logits[:2], plain.logits[:2])
    assert not torch.allclose(result.logits[2], plain.logits[2])


def test_a_projection_readout_is_taken_after_the_edits_of_its_site() -> None:
    s = shapes("llama")
    replaced = edit("replace", Site.RESID_POST, s, layers=(0,))
    assert isinstance(replaced.kind, ReplaceVector)
    probe = Vector(values=torch.ones(48))
    readout = Readout(ProjectionReadout((probe,)), Site.RESID_POST, "probe", layers=(0,))
    result = run("llama", Program((replaced,), (readout,)), 1)
    assert replaced.kind.vector.values is not None
    expected = float(replaced.kind.vector.values.sum()) / 48**0.5
    assert [value.values[0] for value in result.readouts] == pytest.approx([expected] * len(PROMPT), rel=1e-5)


SCOPE_CASES = {
    "all": (Scope(), range(10)),
    "prompt": (Scope((TokenSelector(phase=Phase.PROMPT),)), range(6)),
    "generated": (Scope((TokenSelector(phase=Phase.GENERATED),)), range(6, 10)),
    "range": (Scope((TokenSelector(positions=PositionRange(2, 8)),)), range(2, 8)),
    "relative range": (Scope((TokenSelector(positions=PositionRange(-4, -1)),)), range(2, 5)),
    "open relative range": (Scope((TokenSelector(positions=PositionRange(-2)),)), range(4, 10)),
    "last of the prompt": (Scope((TokenSelector(last_k=2),)), range(4, 6)),
    "token ids": (Scope((TokenSelector(token_ids=(7,)),)), (1, 8)),
    "role": (Scope((TokenSelector(role="user"),)), (2, 3)),
    "fields are and": (Scope((TokenSelector(phase=Phase.GENERATED, token_ids=(7,)),)), (8,)),
    "includes are or": (Scope((TokenSelector(last_k=1), TokenSelector(token_ids=(7,)))), (1, 5, 8)),
    "exclude wins": (Scope((TokenSelector(last_k=3),), (TokenSelector(role="user"),)), (4, 5)),
}


@pytest.mark.parametrize("name", SCOPE_CASES)
def test_a_scope_holds_the_tokens_it_describes(name: str) -> None:
    scope, expected = SCOPE_CASES[name]
    tokens = (5, 7, 9, 9, 9, 9, 9, 9, 7, 9)
    roles = ("system", "system", "user", "user", "assistant", "assistant")
    held = [position for position in range(10) if in_scope(scope, position, tokens, 6, roles)]
    assert held == list(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_head_looks_at_every_visible_token_alike(family: str) -> None:
    """Its weights are one over the tokens it sees, whatever the window; those of its neighbour are not."""
    uniform = Edit(HeadEdit((2,), uniform=True), Site.ATTN_Z, "uniform", layers=(0,))
    where = Readout(HeadReadout((2, 1)), Site.ATTN_Z, "where", layers=(0,))
    values = run(family, Program((uniform,), (where,)), new=1).readouts
    slides = family in ("mistral", "gemma2", "gemma3", "phi3")
    for value in values:
        first = max(0, value.position - WINDOW + 1) if slides else 0
        assert value.ids[0] == first
        assert value.values[0] == pytest.approx(1 / (value.position + 1 - first))
    assert any(value.values[1] > 1.5 * value.values[0] for value in values)


def test_half_a_strength_halves_the_query() -> None:
    half = Edit(HeadEdit((0, 1, 2, 3), uniform=True), Site.ATTN_Z, "half", layers=(1,), strength=0.5)
    assert run("llama", Program((half,))).receipts[0].mean_relative_change == pytest.approx(0.5)
