"""Places of a tenant's calls: who waits, in which order, who is sent away and until when."""

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest

from patchclamp_server.errors import PermissionDenied, QuotaExceeded
from patchclamp_server.security.policy import TenantRules
from patchclamp_server.security.running_call import RunningCall
from patchclamp_server.security.tenants import Tenant, killed


class Calls:
    """Calls of one tenant, which run until they are told to end."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.begun: list[int] = []
        self._ends: dict[int, asyncio.Event] = {}

    def start(self, number: int) -> "asyncio.Task[None]":
        self._ends[number] = asyncio.Event()
        return asyncio.create_task(self._run(number))

    async def end(self, number: int) -> None:
        self._ends[number].set()
        await settle()

    async def _run(self, number: int) -> None:
        call = RunningCall()
        with call.ending_with(killed()):
            async with self.tenant.call(call):
                self.begun.append(number)
                await self._ends[number].wait()


async def settle() -> None:
    """Until every task waits for something that does not come by itself."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_calls_beyond_the_limit_wait_and_begin_in_the_order_in_which_they_came():
    calls = Calls(Tenant("t", TenantRules(max_concurrent=2)))
    tasks = [calls.start(i) for i in range(5)]
    await settle()
    assert calls.begun == [0, 1]
    for ended, begun in ((1, 2), (0, 3), (2, 4)):
        await calls.end(ended)
        assert calls.begun[-1] == begun
    await calls.end(3)
    await calls.end(4)
    await asyncio.gather(*tasks)
    assert not calls.tenant.running
    assert not calls.tenant.waiting


async def test_a_call_that_comes_while_others_wait_goes_behind_them():
    """Also in the moment in which a place is free that the first of them has not taken yet."""
    calls = Calls(Tenant("t", TenantRules(max_concurrent=1)))
    tasks = [calls.start(i) for i in range(2)]
    await settle()
    calls.tenant.running.clear()
    tasks.append(calls.start(2))
    await settle()
    assert calls.begun == [0]
    for i in range(3):
        await calls.end(i)
    await asyncio.gather(*tasks)
    assert calls.begun == [0, 1, 2]


async def test_the_line_is_bounded():
    calls = Calls(Tenant("t", TenantRules(max_concurrent=1, max_waiting=1)))
    tasks = [calls.start(i) for i in range(2)]
    await settle()
    with pytest.raises(QuotaExceeded, match="1 calls of tenant 't' run and 1 wait"):
        await calls.start(2)
    await calls.end(0)
    await calls.end(1)
    await asyncio.gather(*tasks)


async def test_who_finds_the_line_full_is_told_when_half_of_it_will_have_gone(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr("patchclamp_server.security.tenants.time", SimpleNamespace(monotonic=lambda: now))
    calls = Calls(Tenant("t", TenantRules(max_concurrent=2, max_waiting=8)))
    # Ten calls of four seconds.
    for i in range(10):
        task = calls.start(i)
        await settle()
        now += 4.0
        await calls.end(i)
        await task
    tasks = [calls.start(100 + i) for i in range(10)]
    await settle()
    with pytest.raises(QuotaExceeded) as refused:
        await calls.start(200)
    assert refused.value.retry_after_seconds == pytest.approx(8 / 2 * 4.0 / 2)
    for i in range(10):
        await calls.end(100 + i)
    await asyncio.gather(*tasks)


async def test_a_call_that_is_left_while_it_waits_gives_up_its_turn():
    calls = Calls(Tenant("t", TenantRules(max_concurrent=1)))
    first, left, last = [calls.start(i) for i in range(3)]
    await settle()
    left.cancel()
    await settle()
    assert len(calls.tenant.waiting) == 1
    await calls.end(0)
    assert calls.begun == [0, 2]
    await calls.end(2)
    await asyncio.gather(first, last)


async def test_a_call_that_is_left_in_the_moment_of_its_turn_passes_it_on():
    calls = Calls(Tenant("t", TenantRules(max_concurrent=1)))
    first, left, last = [calls.start(i) for i in range(3)]
    await settle()
    # The place is given to the second, which has not run on yet.
    calls.tenant.running.clear()
    calls.tenant.apply(calls.tenant.rules)
    left.cancel()
    await settle()
    assert calls.begun == [0, 2]
    await calls.end(0)
    await calls.end(2)
    await asyncio.gather(first, last)


async def test_more_places_let_in_those_that_wait():
    calls = Calls(Tenant("t", TenantRules(max_concurrent=1)))
    async with AsyncExitStack() as stack:
        tasks = [calls.start(i) for i in range(4)]
        stack.push_async_callback(asyncio.gather, *tasks)
        await settle()
        calls.tenant.apply(TenantRules(max_concurrent=3))
        await settle()
        assert calls.begun == [0, 1, 2]
        calls.tenant.apply(TenantRules())
        await settle()
        assert calls.begun == [0, 1, 2, 3]
        for i in range(4):
            await calls.end(i)


async def test_the_kill_switch_ends_those_that_wait_too():
    calls = Calls(Tenant("t", TenantRules(max_concurrent=1)))
    tasks = [calls.start(i) for i in range(3)]
    await settle()
    calls.tenant.kill()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(ended, PermissionDenied)
    assert calls.begun == [0]
