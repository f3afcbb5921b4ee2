"""The readout of activations gives the rows of plain transformers with naive hooks, on both executors."""

from collections.abc import Iterator

import pytest
from engine_runs import Bench, Job, assert_same
from programs import GENERATED, PROMPT, edit, prompt, readout_kind, shapes
from test_against_oracle import BLOCK, config

from patchclamp_kernels.runtime import reference_only
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import ActivationReadout, Program, Readout, Scope, TokenSelector
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import PUBLIC_SITES, Site

LAST = Scope((TokenSelector(last_k=1),))
INFO = ModelInfo(
    "m",
    "sha256:m",
    "llama",
    64,
    8192,
    16,
    2,
    2,
    4,
    32,
    64,
    "float32",
    "cpu",
    {Site.RESID_POST: 8192, Site.MLP_POST: 16},
)


@pytest.fixture(autouse=True)
def references() -> Iterator[None]:
    with reference_only():
        yield


def jobs(family: str, length: int = 17) -> list[Job]:
    """Several programs that read, each at other sites and tokens, beside one that does not."""
    s = shapes(family)
    sites = [site for site in PUBLIC_SITES if site in s.sites]
    every = tuple(
        Readout(readout_kind(name, site, s), site, f"{name} {site.value}", layers=(0, s.n_layers - 1), scope=scope)
        for name, scope in (("activations", PROMPT), ("some activations", GENERATED))
        for site in sites
    )
    end = Readout(ActivationReadout(), Site.RESID_POST, "end", layers=(1,), scope=LAST)
    added = edit("add", Site.RESID_POST, s, layers=(1,), strength=0.8)
    programs = [Program((added,), every), Program(readouts=(end,)), None, Program((added,), (end,))]
    return [Job(prompt(f"{family} {i}", length), program, max_tokens=3) for i, program in enumerate(programs)]


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_rows_and_units_of_a_mixed_batch_in_chunks(family: str, kernels: bool) -> None:
    asked = jobs(family)
    with Bench(family, config(max_tokens_per_step=9, kernels=kernels, decode_graphs=kernels)) as bench:
        for job, outcome in zip(asked, bench.run(asked), strict=True):
            assert_same(family, job, outcome)


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
def test_requests_of_a_batch_read_their_own_units_of_one_place(kernels: bool) -> None:
    asked = [
        Job(
            prompt(f"own units {i}", 9 + i),
            Program(readouts=(Readout(ActivationReadout(units), Site.RESID_POST, "units", layers=(1,)),)),
            max_tokens=3,
        )
        for i, units in enumerate([(3, 0, 7), (), (5,), (1, 2)])
    ]
    with Bench("llama", config(kernels=kernels)) as bench:
        for job, outcome in zip(asked, bench.run(asked), strict=True):
            assert_same("llama", job, outcome)


def test_a_prompt_from_the_prefix_cache_gives_the_rows_in_scope() -> None:
    s = shapes("llama")
    read = Readout(ActivationReadout(), Site.MLP_OUT, "rows", layers=(0,), scope=Scope())
    tokens = prompt("twice", 4 * BLOCK + 1)
    plain, reading = Job(tokens, None, max_tokens=2), Job(tokens, Program(readouts=(read,)), max_tokens=2)
    assert Site.MLP_OUT in s.sites
    with Bench("llama", EngineConfig(kv_block_size=BLOCK)) as bench:
        bench.run([plain])
        [outcome] = bench.run([reading])
    assert_same("llama", reading, outcome)


def test_more_numbers_of_a_token_than_fit_a_message_are_refused() -> None:
    whole = Readout(ActivationReadout(), Site.RESID_POST, "all", all_layers=True)
    few = Readout(ActivationReadout((1, 2)), Site.RESID_POST, "few", all_layers=True)
    bind(Program(readouts=(few,)), INFO)
    with pytest.raises(InvalidArgument, match=r"program\.readouts\[1\]\.activations: 524\d+ numbers of one token"):
        bind(Program(readouts=(few, whole)), INFO)


@pytest.mark.parametrize(
    ("units", "message"), [((16,), r"units\[0\]: unknown unit 16"), ((3, 3), "units: a unit is named twice")]
)
def test_units_that_the_site_does_not_have_are_refused(units: tuple[int, ...], message: str) -> None:
    readout = Readout(ActivationReadout(units), Site.MLP_POST, "rows", layers=(0,))
    with pytest.raises(InvalidArgument, match=message):
        bind(Program(readouts=(readout,)), INFO)
