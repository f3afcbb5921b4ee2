"""Gradients at the exclusive door: beside a stream, bounded in memory, paid for, and ended with their caller."""

import asyncio
import weakref
from typing import Any

import pytest
import torch
from engine_runs import Outcome, loaded, started
from tiny_models import FAMILIES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchclamp_server.analysis.neurons.batches import needed_bytes
from patchclamp_server.analysis.neurons.gradients import gradient_times_activation, site_gradients
from patchclamp_server.analysis.neurons.integrated import integrated_gradients
from patchclamp_server.analysis.neurons.targets import Example, LogProbability
from patchclamp_server.analysis.requests import result_of
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Slice, at_once
from patchclamp_server.engine.request import Request, StopParams
from patchclamp_server.errors import InvalidArgument

EXAMPLE = Example(tuple(range(5, 25)), LogProbability((40, 41)))


def streamed(engine: Engine) -> list[Tensor]:
    """Logits of a request, step by step, with whatever else is with the engine."""
    logits: list[Tensor] = []
    engine.on_logits = lambda request, position, values: logits.append(values.clone())
    outcome = Outcome()
    engine.submit(Request((5, 6, 7), outcome.on_event, stop=StopParams(max_tokens=12, ignore_eos=True)))
    while engine.step():
        pass
    assert len(outcome.tokens) == len(logits) == 12
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_beside_gradients_is_bit_for_bit_what_it_is_alone(family: str) -> None:
    alone = streamed(Engine(loaded(family)))
    engine, told, ended = Engine(loaded(family)), list[Any](), list[BaseException | None]()

    def work() -> Any:
        yield (yield from site_gradients(loaded(family).decoder, EXAMPLE))
        yield (yield from integrated_gradients(loaded(family).decoder, EXAMPLE, 1, max_steps=21))

    engine.enter(work(), told.append, ended.append)
    beside = streamed(engine)
    assert ended == [None]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(beside, alone, strict=True))
    assert torch.equal(told[0].gradients, at_once(site_gradients(loaded(family).decoder, EXAMPLE)).gradients)


async def test_gradients_come_from_the_thread_of_the_engine() -> None:
    with started(loaded("llama")) as engine:
        found = await result_of(engine, site_gradients(engine.model.decoder, EXAMPLE))
    assert torch.equal(found.gradients, at_once(site_gradients(loaded("llama").decoder, EXAMPLE)).gradients)


async def test_cancelled_gradients_leave_the_engine_to_others() -> None:
    with started(loaded("llama")) as engine:
        endless = integrated_gradients(engine.model.decoder, EXAMPLE, 0, tolerance=1e-12, max_steps=10**6)
        task = asyncio.create_task(result_of(engine, endless))
        while not engine.exclusive.busy:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine.exclusive.busy
        await result_of(engine, site_gradients(engine.model.decoder, EXAMPLE))


def test_a_token_is_charged_once_forwards_and_twice_for_the_way_back() -> None:
    slices, paid = gradient_times_activation(loaded("llama").decoder, [EXAMPLE] * 3), 0
    with torch.inference_mode():
        told = next(slices)
        for _ in range(10**4):
            paid += told.tokens if isinstance(told, Slice) else 0
            try:
                told = slices.send(told.rows) if isinstance(told, Slice) else next(slices)
            except StopIteration:
                break
    assert paid == 3 * 3 * len(EXAMPLE.tokens)


class Living(TorchDispatchMode):
    """The most bytes of tensors that operators made and that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                self._known.add(key)
                size = tensor.untyped_storage().nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(tensor.untyped_storage(), self._free, key, size)
        return made

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_the_bound_is_known_before_anything_is_computed_and_names_the_prompt() -> None:
    decoder = loaded("llama").decoder
    needed = needed_bytes([EXAMPLE], decoder.spec)
    with pytest.raises(InvalidArgument, match="accepted: fewer tokens") as refused:
        next(gradient_times_activation(decoder, [Example((5,), EXAMPLE.target), EXAMPLE], max_bytes=needed - 1))
    assert refused.value.field == "examples[1].prompt"
    assert at_once(gradient_times_activation(decoder, [EXAMPLE] * 9, max_bytes=needed)).tokens == 9 * 21


def test_what_is_kept_of_layers_counts_too() -> None:
    decoder = loaded("llama").decoder
    room = needed_bytes([EXAMPLE], decoder.spec) + 8 * 21 * decoder.spec.d_ff
    assert at_once(site_gradients(decoder, EXAMPLE, layers=[1], max_bytes=room)).layers == (1,)
    with pytest.raises(InvalidArgument) as refused:
        next(site_gradients(decoder, EXAMPLE, layers=[1, 2], max_bytes=room))
    assert refused.value.field == "examples[0].prompt"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_need_no_more_memory_than_the_bound_counts(family: str) -> None:
    decoder, example = loaded(family).decoder, Example(tuple(range(3, 203)), LogProbability((40, 41, 42)))
    with Living() as living:
        at_once(gradient_times_activation(decoder, [example]))
    assert living.most <= needed_bytes([example], decoder.spec)


def test_memory_does_not_grow_with_the_number_of_examples() -> None:
    decoder, most = loaded("llama").decoder, []
    for n in (4, 40):
        with Living() as living:
            at_once(gradient_times_activation(decoder, [Example(EXAMPLE.prompt * 8, EXAMPLE.target)] * n))
        most.append(living.most)
    assert most[1] <= 1.05 * most[0]


def test_memory_does_not_grow_with_the_steps_of_a_path() -> None:
    decoder, most = loaded("gemma2").decoder, []
    for steps in (35, 315):
        with Living() as living:
            found = at_once(integrated_gradients(decoder, EXAMPLE, 0, tolerance=1e-9, max_steps=steps))
        assert found.steps == steps
        most.append(living.most)
    assert most[1] <= 1.1 * most[0]
