"""affine: t(h) = A h + b. What it computes is compared with the oracle wherever tests/programs.py is used; here are the
refusals, and that the two forms of one matrix are one edit."""

import pytest
import torch
from engine_runs import Bench, Job, loaded
from programs import numbers, prompt, shapes

from patchclamp.v1 import program_pb2 as pb
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.edit_kinds import inline_numbers, kind_name
from patchclamp_server.interventions.kinds.affine import Affine
from patchclamp_server.interventions.program import Edit, Program
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.program import decode_program
from patchclamp_server.rpc.codecs.tensor import encode_tensor

WIDTH = shapes("llama").sites[Site.RESID_POST]
SQUARE, TALL = torch.eye(WIDTH), torch.ones(WIDTH, 2)


def program(**tensors: torch.Tensor) -> pb.Program:
    affine = pb.Affine(**{name: encode_tensor(values) for name, values in tensors.items()})
    return pb.Program(edits=[pb.Edit(site=pb.SITE_RESID_POST, layers=[1], affine=affine)])


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({}, "matrix"),
        ({"bias": SQUARE[0]}, "matrix"),
        ({"matrix": SQUARE, "left": TALL, "right": TALL}, "left"),
        ({"matrix": SQUARE, "right": TALL}, "right"),
        ({"left": TALL}, "right"),
        ({"right": TALL}, "left"),
        ({"matrix": SQUARE[0]}, "matrix.shape"),
        ({"matrix": SQUARE[1:]}, "matrix"),
        ({"matrix": SQUARE, "bias": SQUARE[0, 1:]}, "bias"),
        ({"left": TALL, "right": TALL[:, 1:]}, "right"),
        ({"left": TALL[1:], "right": TALL}, "left"),
    ],
)
def test_what_is_no_affine_map_of_the_site_is_refused_by_its_field(
    tensors: dict[str, torch.Tensor], field: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        bind(decode_program(program(**tensors)), loaded("llama").info)
    assert refused.value.field == f"program.edits[0].affine.{field}"


def test_policies_see_a_kind_of_its_own_that_brings_its_numbers() -> None:
    [edit] = decode_program(program(matrix=SQUARE)).edits
    assert kind_name(edit.kind) == "affine"
    assert inline_numbers(edit) == "affine"


@pytest.mark.parametrize("kernels", [False, True])
def test_a_matrix_and_its_factors_are_one_edit_also_side_by_side(kernels: bool) -> None:
    left, right, bias = numbers("u", WIDTH, 2) / 7, numbers("v", WIDTH, 2), 0.1 * numbers("b", WIDTH)
    kinds = [Affine(matrix=left @ right.T, bias=bias), Affine(left=left, right=right, bias=bias)]
    edits = [Edit(kind, Site.RESID_POST, layers=(1,), strength=0.4, preserve_norm=True) for kind in kinds]
    config = EngineConfig(kv_block_size=4, enable_prefix_cache=False, kernels=kernels)
    with Bench("llama", config) as bench:
        full, factors = bench.run([Job(prompt("affine", 7), Program((edit,)), max_tokens=3) for edit in edits])
    logits = [torch.stack(outcome.logits) for outcome in (full, factors)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert full.end().receipt.edits[0].rows == factors.end().receipt.edits[0].rows > 0
