"""This watches the engine from the event loop: when a step does not end, the server reports that it is not alive."""

import asyncio
import faulthandler
import logging
import tempfile
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

LONGEST_INTERVAL_SECONDS = 1.0


async def watch_steps(
    step_seconds: Callable[[], float], bound: float, on_change: Callable[[bool], Awaitable[None]]
) -> None:
    """Calls `on_change(True)` when a step has run for more than `bound` seconds, `on_change(False)` when it has ended.

    When a step is late, the stacks of all threads are logged. It runs until it is cancelled.
    """
    late = False
    while True:
        await asyncio.sleep(min(bound / 4, LONGEST_INTERVAL_SECONDS))
        if (step_seconds() > bound) == late:
            continue
        late = not late
        if late:
            logger.critical("a step has been running for more than %g s\n%s", bound, stacks())
        else:
            logger.warning("the step that was late has ended")
        await on_change(late)


def stacks() -> str:
    """Returns where every thread of this process is, most recent call first."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
