"""Whether a request may enter the queue, decided when it comes.

What waits is bounded in requests and in tokens of KV cache that it will need, so that whoever is let in is served in
a time that can be told. A request that would be served too late for its deadline is not let in at all:

    wait     = what is before it / tokens that leave the queue per second
    own time = prompt tokens · seconds of a prompt token + expected tokens · seconds of a generated token

Before it: all of a better priority, and of each tenant u of the same priority min(Q_u, Q_t · w_u / w_t), where tenant t
asks, Q are the tokens that wait and w the weights (see fair_queue.py). Every rate is measured on this engine under its
present load; nothing is refused for its deadline before that, nor while requests start as they come.

A tenant may have as much waiting as TENANT_SHARE times its weight times what is still free: alone it gets three
quarters of the queue, each of n tenants 3/(3n + 1), and some room is always left for one that was not there before
(dynamic thresholds of Choudhury and Hahne, 1998). Callers without a tenant have no such bound. Analysis may take up
half of the queue.
"""

from dataclasses import dataclass
from enum import Enum

from patchclamp_server.callers import Caller
from patchclamp_server.engine.request import Priority

TENANT_SHARE = 3.0
ANALYSIS_SHARE = 0.5
# A rate decides nothing before so many requests have shown it.
MIN_SAMPLES = 8
# This share of the weight of earlier samples of a rate is left after each new one.
MEMORY = 0.98
# After this many seconds of work, a measured drain weighs half as much.
HALF_LIFE_SECONDS = 30.0
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.1, 60.0
UNMEASURED_RETRY_SECONDS = 1.0


class Reason(Enum):
    """A reason why a request was refused; it is a label of patchclamp_admission_refused_total."""

    QUEUE_REQUESTS = "queue_requests"
    QUEUE_KV_TOKENS = "queue_kv_tokens"
    TENANT_SHARE = "tenant_share"
    DEADLINE = "deadline"


@dataclass(frozen=True)
class Refusal:
    reason: Reason
    message: str
    retry_after_seconds: float


@dataclass(frozen=True)
class Demand:
    """What a request asks for. `kv_tokens` is the most it may need, with all that it may generate."""

    caller: Caller
    priority: Priority
    kv_tokens: int = 0
    prompt_tokens: int = 0
    max_tokens: int = 0
    # The request may end before max_tokens.
    may_stop_early: bool = True


class Ratio:
    """The ratio of two sums, in which the latest samples weigh most."""

    def __init__(self) -> None:
        self.samples = 0
        self._above = self._below = 0.0

    def add(self, above: float, below: float) -> None:
        self.samples += 1
        self._above = self._above * MEMORY + above
        self._below = self._below * MEMORY + below

    def value(self) -> float | None:
        """Returns the ratio, or None until it has been measured."""
        return self._above / self._below if self.samples >= MIN_SAMPLES and self._below > 0 else None


@dataclass
class Load:
    """The waiting requests of one tenant at one priority."""

    weight: float
    requests: int = 0
    kv_tokens: int = 0


class Admission:
    """Holds the queue as numbers. It is not thread-safe: the engine's lock guards it."""

    def __init__(self, *, max_waiting: int, max_sequences: int, max_kv_tokens: int) -> None:
        self._max_waiting = max_waiting
        self._max_sequences = max_sequences
        self._max_kv_tokens = max_kv_tokens
        self._waiting: dict[int, Demand] = {}
        self._started: set[int] = set()
        self._loads: dict[tuple[int, str], Load] = {}
        self.kv_tokens = 0
        # This is true when the last step left somebody waiting who could have run.
        self._contended = False
        self._stepped_at = 0.0
        self._drained_tokens = self._drained_seconds = 0.0
        self._drained_requests = 0
        self.prompt_seconds, self.token_seconds, self.generated_share = Ratio(), Ratio(), Ratio()

    def check(self, demand: Demand, seconds_left: float | None = None) -> Refusal | None:
        """Returns why a request may not enter, or None where it may. `seconds_left` is the time until its deadline.
        Changes nothing."""
        return self._check_room(demand) or self._check_deadline(demand, seconds_left)

    def check_start(self, demand: Demand, seconds_left: float) -> Refusal | None:
        """Returns why a request that has waited and could start now has too little time left, or None. What would be
        lost is not begun."""
        own = self._own_seconds(demand)
        if own is None or not self._contended or own <= seconds_left:
            return None
        message = f"it would take {own:.1f} s from now; its deadline is in {max(seconds_left, 0.0):.1f} s"
        return Refusal(Reason.DEADLINE, message, _bounded(self.wait_seconds(demand) or UNMEASURED_RETRY_SECONDS))

    def enter(self, request_id: int, demand: Demand) -> None:
        self._waiting[request_id] = demand
        self._count(demand, 1)

    def leave(self, request_id: int) -> None:
        """Removes a request that has ended, whether it waited or ran."""
        self._started.discard(request_id)
        demand = self._waiting.pop(request_id, None)
        if demand is not None:
            self._count(demand, -1)

    def on_step(self, started: list[int], now: float, *, contended: bool) -> None:
        """Takes the requests that start with this step. `contended`: some who could run are left waiting."""
        tokens = sum(self._waiting[request_id].kv_tokens for request_id in started)
        for request_id in started:
            self.leave(request_id)
            self._started.add(request_id)
        # Requests that start while the engine has free places do not show how fast places become free.
        seconds, self._stepped_at = now - self._stepped_at, now
        if contended and self._contended:
            memory = 0.5 ** (seconds / HALF_LIFE_SECONDS)
            self._drained_tokens = self._drained_tokens * memory + tokens
            self._drained_seconds = self._drained_seconds * memory + seconds
            self._drained_requests += len(started)
        self._contended = contended

    def on_finished(
        self, demand: Demand, *, generated: int, prefill_seconds: float, decode_seconds: float, paced: bool
    ) -> None:
        """Takes the times of a request that has run to its end. `paced`: its client decided how fast."""
        if demand.may_stop_early and demand.max_tokens:
            self.generated_share.add(generated, demand.max_tokens)
        if paced:
            return
        self.prompt_seconds.add(prefill_seconds, demand.prompt_tokens)
        if generated > 1:
            self.token_seconds.add(decode_seconds, generated - 1)

    def expected_tokens(self, max_tokens: int, *, may_stop_early: bool) -> float:
        """Returns how many tokens a request will probably generate, given what others did that could stop early."""
        share = self.generated_share.value() if may_stop_early else None
        return max_tokens if share is None else share * max_tokens

    def wait_seconds(self, demand: Demand) -> float | None:
        """Returns the time until a request that came now would start, or None where that is not known."""
        rate = self._drain_rate()
        return None if rate is None else self._before(demand) / rate

    def _check_room(self, demand: Demand) -> Refusal | None:
        own = [load for (_, tenant), load in self._loads.items() if tenant == demand.caller.tenant]
        own_requests, own_tokens = sum(load.requests for load in own), sum(load.kv_tokens for load in own)
        places = self._max_waiting + max(0, self._max_sequences - len(self._started))
        kv_places = self._max_kv_tokens
        if demand.priority is Priority.ANALYSIS:
            places, kv_places = max(1, int(places * ANALYSIS_SHARE)), int(kv_places * ANALYSIS_SHARE)
        waiting = len(self._waiting)
        if waiting >= places:
            return self._full(Reason.QUEUE_REQUESTS, f"{waiting} requests wait, as many as may", self.kv_tokens)
        # One request is let in however much it needs.
        if waiting and self.kv_tokens + demand.kv_tokens > kv_places:
            message = f"{self.kv_tokens} tokens of KV cache are waited for, and may be {kv_places} with this request's"
            return self._full(Reason.QUEUE_KV_TOKENS, message, self.kv_tokens)
        if not demand.caller.tenant or not own_requests:
            return None
        share = TENANT_SHARE * demand.caller.weight
        if own_requests + 1 > share * (places - waiting):
            message = f"{own_requests} requests of this tenant wait, its share of the queue"
            return self._full(Reason.TENANT_SHARE, message, own_tokens)
        if own_tokens + demand.kv_tokens > share * (kv_places - self.kv_tokens):
            message = f"requests of this tenant wait for {own_tokens} tokens of KV cache, its share of the queue"
            return self._full(Reason.TENANT_SHARE, message, own_tokens)
        return None

    def _full(self, reason: Reason, message: str, kv_tokens: int) -> Refusal:
        """Refuses a request; the caller should try again when half of what waits has started."""
        rate = self._drain_rate()
        return Refusal(reason, message, UNMEASURED_RETRY_SECONDS if rate is None else _bounded(kv_tokens / 2 / rate))

    def _check_deadline(self, demand: Demand, seconds_left: float | None) -> Refusal | None:
        wait, own = self.wait_seconds(demand), self._own_seconds(demand)
        if seconds_left is None or wait is None or own is None or not self._contended or wait + own <= seconds_left:
            return None
        message = (
            f"it would take {wait + own:.1f} s, {wait:.1f} of them in the queue; "
            f"its deadline is in {max(seconds_left, 0.0):.1f} s"
        )
        return Refusal(Reason.DEADLINE, message, _bounded(min(wait, wait + own - seconds_left)))

    def _own_seconds(self, demand: Demand) -> float | None:
        """Returns the time from the first step of a request to its end, or None where that is not known."""
        prompt_seconds, token_seconds = self.prompt_seconds.value(), self.token_seconds.value()
        if prompt_seconds is None or (demand.max_tokens and token_seconds is None):
            return None
        generated = self.expected_tokens(demand.max_tokens, may_stop_early=demand.may_stop_early)
        return demand.prompt_tokens * prompt_seconds + generated * (token_seconds or 0.0)

    def _before(self, demand: Demand) -> float:
        """Returns the tokens that are served before a request that comes now."""
        tenant, weight = demand.caller.tenant, demand.caller.weight
        own = self._loads.get((int(demand.priority), tenant))
        own_tokens = own.kv_tokens if own is not None else 0
        before = 0.0
        for (priority, _), load in self._loads.items():
            if priority < demand.priority:
                before += load.kv_tokens
            elif priority == demand.priority:
                before += load.kv_tokens if load is own else min(load.kv_tokens, own_tokens * load.weight / weight)
        return before

    def _drain_rate(self) -> float | None:
        """Returns how many tokens of demand leave the queue per second, or None where that is not known."""
        if self._drained_requests < MIN_SAMPLES or self._drained_seconds <= 0 or self._drained_tokens <= 0:
            return None
        return self._drained_tokens / self._drained_seconds

    def _count(self, demand: Demand, sign: int) -> None:
        key = (int(demand.priority), demand.caller.tenant)
        load = self._loads.setdefault(key, Load(demand.caller.weight))
        load.weight = demand.caller.weight
        load.requests += sign
        load.kv_tokens += sign * demand.kv_tokens
        self.kv_tokens += sign * demand.kv_tokens
        if not load.requests:
            del self._loads[key]


def _bounded(seconds: float) -> float:
    return min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
