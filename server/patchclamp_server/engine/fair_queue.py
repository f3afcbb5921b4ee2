"""Who of those that wait is next: by priority, then the tenant that got least, then arrival.

    service of a tenant = tokens computed for it / its weight

Among requests of equal priority the tenant with the least service comes next, so tenants that always have work waiting
are served in proportion to their weights, however many requests each sends. A tenant that comes back after a pause
begins at the service that was last chosen: what it did not ask for is not saved up. One tenant alone is served in the
order of arrival. (Virtual token counters of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024.)
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from patchclamp_server.engine.sequence import Sequence


class FairQueue:
    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}
        self._n = 0

    def __len__(self) -> int:
        """Returns a number kept apart, since metrics are read from other threads."""
        return self._n

    def __iter__(self) -> Iterator[Sequence]:
        return (s for line in self._lines.values() for s in line)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence behind those of its tenant that came before it, and before those that came later."""
        self._line(sequence).add(sequence)
        self._n += 1

    def remove(self, sequence: Sequence) -> None:
        """Takes out a sequence that will not be served, or not from here."""
        self._line(sequence).remove(sequence)
        self._n -= 1

    def start(self, sequence: Sequence) -> None:
        """Takes out a sequence that is served now."""
        self._line(sequence).start(sequence)
        self._n -= 1

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Counts tokens that its tenant got, whether the sequence waits or not."""
        line = self._lines.get(sequence.request.priority) or self._line(sequence)
        line.charge(sequence, tokens)

    def of(self, priority: int) -> Iterator[Sequence]:
        """Yields those of one priority."""
        return iter(self._lines.get(priority, ()))

    def in_turn(self) -> Iterator[Sequence]:
        """Yields all sequences; each is chosen when it is asked for, by what was charged until then."""
        for priority in sorted(self._lines):
            yield from self._lines[priority].in_turn()

    def service(self, sequence: Sequence) -> float:
        return self._line(sequence).service.get(sequence.request.caller.tenant, 0.0)

    def _line(self, sequence: Sequence) -> "_Line":
        return self._lines.setdefault(int(sequence.request.priority), _Line())


class _Line:
    """The sequences of one priority, by tenant in the order of arrival."""

    def __init__(self) -> None:
        self.service: dict[str, float] = {}
        # This is the service of the tenant last chosen; it never falls.
        self._chosen = 0.0
        self._waiting: dict[str, list[Sequence]] = {}

    def __iter__(self) -> Iterator[Sequence]:
        return (s for line in self._waiting.values() for s in line)

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.request.caller.tenant
        if tenant not in self._waiting:
            self._waiting[tenant] = []
            self.service[tenant] = max(self.service.get(tenant, 0.0), self._chosen)
        insort(self._waiting[tenant], sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.request.caller.tenant
        line = self._waiting[tenant]
        index = bisect_left(line, _arrival(sequence), key=_arrival)
        # A sequence and the one that follows it arrived together.
        while line[index] is not sequence:
            index += 1
        del line[index]
        if not line:
            del self._waiting[tenant]

    def start(self, sequence: Sequence) -> None:
        self._chosen = max(self._chosen, self.service[sequence.request.caller.tenant])
        self.remove(sequence)

    def charge(self, sequence: Sequence, tokens: int) -> None:
        caller = sequence.request.caller
        self.service[caller.tenant] = self.service.get(caller.tenant, self._chosen) + tokens / caller.weight

    def in_turn(self) -> Iterator[Sequence]:
        rest = {tenant: iter(tuple(line)) for tenant, line in self._waiting.items()}
        heads = {tenant: next(line) for tenant, line in rest.items()}
        while heads:
            tenant = min(heads, key=lambda t: (self.service[t], _arrival(heads[t])))
            yield heads[tenant]
            following = next(rest[tenant], None)
            if following is None:
                del heads[tenant]
            else:
                heads[tenant] = following


def _arrival(sequence: Sequence) -> tuple[float, int]:
    return (sequence.arrival, sequence.id)
