"""patch: t(h) is a row of another run. What it computes is compared with the oracle wherever tests/programs.py is used;
here are stored sources, refusals, the places that positions find, and what the prefix cache may share."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import Bench, Job, Outcome, loaded
from oracle import oracle_logits
from programs import numbers, prompt, shapes, source_rows
from tiny_models import FAMILIES, tiny_model
from torch import Tensor

from patchclamp.v1 import program_pb2 as pb
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.kept_rows import KeptRows
from patchclamp_server.engine.request import Reduction, Request, StopParams
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.edit_kinds import inline_numbers, kind_name
from patchclamp_server.interventions.kinds.patch import Patch, SourceRows
from patchclamp_server.interventions.placing import placed
from patchclamp_server.interventions.program import Edit, Program, Scope, TokenSelector
from patchclamp_server.interventions.scopes import SequenceTokens, scope_mask
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.program import decode_program

S = shapes("llama")
WIDTH, FINGERPRINT = S.sites[Site.RESID_POST], loaded("llama").info.fingerprint
CONFIG = EngineConfig(kv_block_size=4, kv_cache_tokens=1024)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# Text 0 has rows of 3 of its 4 tokens, text 2 of all 6.
STORED = {
    "text": ints(0, 0, 0, *[2] * 6),
    "position": ints(0, 1, 3, *range(6)),
    "token": ints(*range(10, 19)),
    "length": ints(4, 4, 4, *[6] * 6),
    "resid_post.0": numbers("stored 0", 9, WIDTH),
    "resid_post.1": numbers("stored 1", 9, WIDTH),
    "attn_z.1": numbers("stored z", 9, S.sites[Site.ATTN_Z] + 1),
}


def rotation(seed: str, rank: int) -> Tensor:
    rows: Tensor = torch.linalg.qr(numbers(seed, WIDTH, rank))[0].T.contiguous()
    return rows


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(str(tmp_path))
    store.put(ArtifactKind.ACTIVATIONS, STORED, model_fingerprint=FINGERPRINT, tags=("run",))
    store.put(ArtifactKind.ACTIVATIONS, STORED, model_fingerprint="another", tags=("foreign",))
    plane = {f"layer.{layer}.rotation": rotation(f"plane {layer}", 2) for layer in (0, 1)}
    narrow = {"layer.1.rotation": torch.eye(WIDTH - 1)[:1]}
    for tag, tensors in (("plane", plane), ("narrow", narrow)):
        store.put(ArtifactKind.SUBSPACE, tensors, model_fingerprint=FINGERPRINT, site=Site.RESID_POST, tags=(tag,))
    vectors = {"layer.0": numbers("v", WIDTH)}
    store.put(ArtifactKind.VECTOR, vectors, model_fingerprint=FINGERPRINT, site=Site.RESID_POST, tags=("vector",))
    return store


def message(site: str = "SITE_RESID_POST", layers: Sequence[int] = (1,), **fields: Any) -> pb.Program:
    pairs = [pb.PatchPosition(position=p, source=s) for p, s in fields.pop("positions", ())]
    patch = pb.Patch(**{"activations": "run", **fields}, positions=pairs)
    return pb.Program(edits=[pb.Edit(site=pb.Site.Value(site), layers=layers, patch=patch)])


def payload(bound: Any, layer: int = 1) -> tuple[list[int], Tensor, Tensor]:
    positions, rows, mask = bound.edits[0].payload[layer]
    return positions.tolist(), rows, mask


@pytest.mark.parametrize(
    ("fields", "positions", "rows"),
    [
        ({}, [0, 1, 3], [0, 1, 2]),
        ({"text": 2}, [*range(6)], [3, 4, 5, 6, 7, 8]),
        ({"text": 2, "positions": [(-1, -1), (4, 0), (2, 5), (0, -6)]}, [-1, 4, 2, 0], [8, 3, 8, 3]),
        ({"positions": [(7, -1), (6, 1)]}, [7, 6], [2, 1]),
    ],
)
def test_rows_of_a_stored_text_are_mapped_by_their_positions(
    store: ArtifactStore, fields: dict[str, Any], positions: list[int], rows: list[int]
) -> None:
    bound = bind(decode_program(message(layers=(0, 1), **fields)), loaded("llama").info, store)
    for layer in (0, 1):
        own, taken, mask = payload(bound, layer)
        assert own == positions
        assert torch.equal(taken, STORED[f"resid_post.{layer}"][rows])
        assert mask.tolist() == [1.0] * WIDTH


def test_another_layer_of_the_source_may_be_taken_everywhere(store: ArtifactStore) -> None:
    bound = bind(decode_program(message(layers=(2, 1), source_layer=0)), loaded("llama").info, store)
    for layer in (1, 2):
        assert torch.equal(payload(bound, layer)[1], STORED["resid_post.0"][:3])


@pytest.mark.parametrize(
    ("fields", "field", "error"),
    [
        ({"activations": ""}, "activations", InvalidArgument),
        ({"activations": "nothing"}, "activations", NotFound),
        ({"activations": "vector"}, "activations", InvalidArgument),
        ({"activations": "foreign"}, "activations", FailedPrecondition),
        ({"text": 1}, "text", InvalidArgument),
        ({"text": 2**32 - 1}, "text", InvalidArgument),
        ({"site": "SITE_RESID_PRE"}, "activations", InvalidArgument),
        ({"layers": (0, 2)}, "activations", InvalidArgument),
        ({"source_layer": 2}, "source_layer", InvalidArgument),
        ({"site": "SITE_ATTN_Z"}, "activations", InvalidArgument),
        ({"positions": [(0, 2)]}, "positions[0].source", InvalidArgument),
        ({"positions": [(0, 0), (1, -5)]}, "positions[1].source", InvalidArgument),
        ({"positions": [(-11, 0)]}, "positions[0].position", InvalidArgument),
        ({"positions": [(1 << 40, 0)]}, "positions[0].position", InvalidArgument),
        ({"positions": [(3, 0), (2, 1), (3, 1)]}, "positions[2].position", InvalidArgument),
        ({"units": [WIDTH]}, "units[0]", InvalidArgument),
        ({"units": [1, 1]}, "units[1]", InvalidArgument),
        ({"heads": [0]}, "heads", InvalidArgument),
        ({"heads": [S.n_heads], "site": "SITE_ATTN_Z"}, "heads[0]", InvalidArgument),
        ({"heads": [0], "units": [0]}, "heads", InvalidArgument),
        ({"subspace": "nothing"}, "subspace", NotFound),
        ({"subspace": "vector"}, "subspace", InvalidArgument),
        ({"subspace": "narrow"}, "subspace", InvalidArgument),
        ({"subspace": "plane", "layers": (2,), "source_layer": 0}, "subspace", InvalidArgument),
        ({"subspace": "plane", "units": [0]}, "subspace", InvalidArgument),
        ({"subspace": "plane", "heads": [0], "site": "SITE_ATTN_Z"}, "subspace", InvalidArgument),
    ],
)
def test_what_is_no_patch_is_refused_by_its_field(
    store: ArtifactStore, fields: dict[str, Any], field: str, error: type[Exception]
) -> None:
    with pytest.raises(error) as refused:
        bind(decode_program(message(**fields)), loaded("llama").info, store, prompt_length=10)
    assert refused.value.field == f"program.edits[0].patch.{field}"  # type: ignore[attr-defined]


def test_a_stored_subspace_is_that_of_each_layer(store: ArtifactStore) -> None:
    bound = bind(decode_program(message(layers=(0, 1), subspace="plane")), loaded("llama").info, store)
    for layer in (0, 1):
        assert torch.equal(payload(bound, layer)[2], rotation(f"plane {layer}", 2))
    whole = bind(decode_program(message(layers=(0, 1))), loaded("llama").info, store)
    assert bound.edits[0].fingerprint != whole.edits[0].fingerprint


def test_a_patch_of_more_than_banks_should_hold_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchclamp_server.interventions.kinds.patch.MAX_NUMBERS", 20 * WIDTH)
    source = SourceRows(torch.arange(11), 11, {})
    with pytest.raises(InvalidArgument, match="at most 10 positions for 2 layers, got 11") as refused:
        bind(patching(source, layers=(0, 1)), loaded("llama").info)
    assert refused.value.field == "program.edits[0].patch.activations"


def test_policies_see_a_kind_of_its_own_that_brings_no_numbers() -> None:
    [edit] = decode_program(message()).edits
    assert (kind_name(edit.kind), inline_numbers(edit)) == ("patch", "")


def patching(source: SourceRows, site: Site = Site.RESID_POST, **fields: Any) -> Program:
    names = ("positions", "units", "heads", "rotation", "source_layer")
    kind = Patch(source=source, **{name: fields.pop(name) for name in names if name in fields})
    fields.setdefault("layers", (1,))
    return Program((Edit(kind, site, "patch", **fields),))


@pytest.mark.parametrize("length", [1, 3, 5, 9, 30])
def test_positions_find_their_tokens_in_a_prompt_of_any_length(length: int) -> None:
    source = source_rows("placed", WIDTH)
    pairs = ((3, 0), (-1, 1), (-3, 2), (8, 3), (0, 11))
    scope = Scope(exclude=(TokenSelector(token_ids=(5,)),))
    bound = placed(bind(patching(source, positions=pairs, scope=scope), loaded("llama").info), length)
    expected = {}
    for position, wanted in pairs:
        at = position if position >= 0 else length + position
        if at >= 0:
            expected[at] = source.positions.tolist().index(wanted)
    positions, rows, _ = payload(bound)
    assert positions == sorted(expected)
    assert torch.equal(rows, source.rows[1][[expected[p] for p in positions]])
    every = torch.arange(40).numpy()
    tokens = torch.where(torch.arange(40) == 3, 5, 6).numpy()
    mask = scope_mask(bound.edits[0].scope, SequenceTokens(length, None), every, tokens)
    assert mask.nonzero()[0].tolist() == [p for p in positions if p != 3]


def test_tokens_that_get_other_rows_in_a_longer_prompt_have_another_fingerprint() -> None:
    source, scope = source_rows("shared", WIDTH), Scope((TokenSelector(token_ids=(7,)),))
    bound = bind(patching(source, positions=((-1, 0), (-2, 1)), scope=scope), loaded("llama").info)
    shorter, longer = placed(bound, 8).edits[0], placed(bound, 9).edits[0]
    assert shorter.fingerprint != longer.fingerprint
    assert placed(bound, 8).edits[0].fingerprint == shorter.fingerprint


def test_prompts_that_begin_alike_and_are_patched_from_their_ends_share_no_wrong_block() -> None:
    """Token 7 of the shorter prompt is its last one, of the longer one the last but one."""
    source, scope = source_rows("ends", WIDTH), Scope((TokenSelector(token_ids=(9,)),))
    program = patching(source, positions=((-1, 0), (-2, 1)), scope=scope)
    start = (*prompt("ends", 20)[:7], 9)
    jobs = [Job(start, program), Job((*start, 11), program), Job(start, program)]
    with Bench("llama", CONFIG) as bench:
        outcomes = [bench.run([job])[0] for job in jobs]
    for job, outcome in zip(jobs, outcomes, strict=True):
        want = oracle_logits(tiny_model("llama"), job.prompt, program)[-1]
        torch.testing.assert_close(outcome.logits[0], want, rtol=1e-4, atol=1e-4)


def captured(family: str, tokens: tuple[int, ...], site: Site) -> SourceRows:
    info = loaded(family).info
    kept = KeptRows(tuple(range(info.n_layers)))
    outcome = Outcome()
    engine = Engine(loaded(family), CONFIG)
    request = Request(tokens, outcome.on_event, stop=StopParams(max_tokens=0), reductions=(Reduction(site, kept),))
    engine.submit(request)
    while engine.step():
        pass
    outcome.end()
    return SourceRows(torch.arange(len(tokens)), len(tokens), {layer: kept.rows(layer) for layer in kept.layers})


@pytest.mark.parametrize(("family", "kernels"), [*((family, False) for family in FAMILIES), ("llama", True)])
def test_patching_all_of_the_residual_stream_after_a_layer_gives_the_logits_of_the_source(
    family: str, kernels: bool
) -> None:
    clean, corrupt = prompt(f"{family} clean", 11), prompt(f"{family} corrupt", 11)
    config = replace(CONFIG, kernels=kernels, enable_prefix_cache=False)
    last = loaded(family).info.n_layers - 1
    program = patching(captured(family, clean, Site.RESID_POST), layers=(last,))
    runs = [(clean, None), (corrupt, program), (corrupt, None)]
    with Bench(family, config) as bench:
        source, patched, plain = bench.run([Job(tokens, own, 2) for tokens, own in runs])
        [alone] = bench.run([Job(corrupt, None, 2)])
    if kernels:
        torch.testing.assert_close(patched.logits[0], source.logits[0], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(patched.logits[0], source.logits[0])
    assert torch.equal(torch.stack(plain.logits), torch.stack(alone.logits))
    assert patched.end().receipt.edits[0].rows == len(clean)
    assert not torch.equal(patched.logits[0], plain.logits[0])


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
def test_patching_heads_leaves_the_other_heads_alone(kernels: bool) -> None:
    source = captured("llama", prompt("source of heads", 9), Site.ATTN_Z)
    tokens, heads = prompt("heads", 9), (2, 0)
    program = patching(source, Site.ATTN_Z, heads=heads)
    with Bench("llama", replace(CONFIG, kernels=kernels)) as bench:
        [outcome] = bench.run([Job(tokens, program)])
    want = oracle_logits(tiny_model("llama"), tokens, program)[-1]
    torch.testing.assert_close(outcome.logits[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
def test_patches_of_a_batch_put_their_own_rows_at_their_own_positions(kernels: bool) -> None:
    jobs = [
        Job(prompt(f"batch {i}", 9), patching(source_rows(f"batch {i}", WIDTH), positions=positions, units=units), 2)
        for i, (positions, units) in enumerate(
            [(((1, 0), (4, 2)), ()), (((4, 1), (-1, 3)), (0, 5, 9)), (((1, 3), (2, 2), (4, 0)), ())]
        )
    ]
    with Bench("llama", replace(CONFIG, kernels=kernels)) as bench:
        outcomes = bench.run(jobs)
    for job, outcome in zip(jobs, outcomes, strict=True):
        want = oracle_logits(tiny_model("llama"), job.prompt, job.program)[-1]
        torch.testing.assert_close(outcome.logits[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
def test_patches_in_subspaces_of_any_rank_run_beside_others_in_one_batch(kernels: bool) -> None:
    source = source_rows("subspaces", WIDTH)
    pairs = ((3, 0), (-1, 1), (0, 11), (9, 2))
    programs = [
        patching(source, positions=pairs, rotation=rotation("one", 1), layers=(0, 1)),
        patching(source, positions=pairs, layers=(0, 1)),
        patching(source, positions=((-2, 5),), rotation=rotation("five", 5), strength=0.4, preserve_norm=True),
        patching(source, positions=pairs, units=(0, 3, 4)),
        None,
    ]
    jobs = [Job(prompt(f"subspace {i}", 7 + i), program, 3) for i, program in enumerate(programs)]
    with Bench("llama", replace(CONFIG, kernels=kernels, max_tokens_per_step=16)) as bench:
        outcomes = bench.run(jobs)
    for job, outcome in zip(jobs, outcomes, strict=True):
        tokens = (*job.prompt, *outcome.tokens)
        logits = oracle_logits(tiny_model("llama"), tokens[:-1], job.program, len(job.prompt))
        want = logits[len(job.prompt) - 1 :]
        torch.testing.assert_close(torch.stack(outcome.logits), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reuse", [False, True])
def test_the_receipt_counts_the_rows_that_have_a_source(reuse: bool) -> None:
    program = patching(source_rows("receipt", WIDTH), positions=((1, 0), (5, 2), (-1, 3), (40, 1)), layers=(0, 2))
    with Bench("llama", replace(CONFIG, enable_prefix_cache=reuse)) as bench:
        for turn in range(2):
            [outcome] = bench.run([Job(prompt("receipt", 10), program)])
            [edit] = outcome.end().receipt.edits
            assert edit.rows + edit.rows_from_cache == 6
            assert edit.rows_from_cache == (4 if reuse and turn else 0)
