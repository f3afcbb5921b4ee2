"""What is written down of a job over a corpus, and under which name.

    key = SHA-256 of (version of Patchclamp, model, corpus, window_tokens, most_tokens, parameters of the method,
                      class, site, layers and parameters of each reducer)

so that the same request, sent again, finds its checkpoint, and no other does. A checkpoint is taken while no window is
with the engine: reducers hold exactly the windows before its cut.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from torch import Tensor

from patchclamp_server.analysis.corpora.windows import START, Cut
from patchclamp_server.artifacts.checkpoints import Checkpoints, DamagedCheckpoint
from patchclamp_server.engine.reducers.reducer import Resumable
from patchclamp_server.engine.request import Reduction

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointPolicy:
    """One is due after so many tokens or so many seconds, whichever comes first."""

    every_tokens: int = 200_000
    every_seconds: float = 60.0


DEFAULT_POLICY = CheckpointPolicy()


@dataclass(frozen=True)
class Reached:
    """How far a job was at a cut. `tokens` are those of the windows, special ones too."""

    cut: Cut = START
    windows: int = 0
    tokens: int = 0


class JobCheckpoint:
    """The one of one job. Methods that read and write block, and are for a thread."""

    def __init__(self, checkpoints: Checkpoints, key: str, policy: CheckpointPolicy = DEFAULT_POLICY) -> None:
        self.key, self.policy = key, policy
        self._checkpoints = checkpoints
        self._tokens, self._time = 0, time.monotonic()

    def load(self, reductions: Sequence[Reduction]) -> tuple[Reached, str]:
        """Restores the reducers; how far the job was, from the start where there is no checkpoint. The text says why
        one that was there is not used: it is removed and logged, and the job begins anew."""
        reached, refused = Reached(), ""
        try:
            saved = self._checkpoints.load(self.key)
            if saved is not None:
                _restore(reductions, saved.tensors)
                reached = _reached(saved.about)
        except (DamagedCheckpoint, ValueError, KeyError, IndexError, TypeError) as error:
            refused = f"the checkpoint is damaged and not used: {error}"
            log.error("checkpoint %s: %s", self.key, refused)
            self._checkpoints.remove(self.key)
            for reduction in reductions:
                _resumable(reduction).restore({})
        self._begin(reached.tokens)
        return reached, refused

    def is_due(self, tokens: int) -> bool:
        """Once so many tokens are done."""
        waited = time.monotonic() - self._time
        return tokens - self._tokens >= self.policy.every_tokens or waited >= self.policy.every_seconds

    def save(self, reductions: Sequence[Reduction], reached: Reached) -> None:
        """Raises ResourceExhausted where there is no room."""
        states = [_resumable(reduction).state() for reduction in reductions]
        tensors = {f"{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}
        self._checkpoints.save(self.key, tensors, asdict(reached))
        self._begin(reached.tokens)

    def remove(self) -> None:
        """Once the result of the job is stored."""
        self._checkpoints.remove(self.key)

    def _begin(self, tokens: int) -> None:
        self._tokens, self._time = tokens, time.monotonic()


def key_of(parts: Sequence[Any], reductions: Sequence[Reduction]) -> str:
    """`parts`: JSON of what else the result depends on."""
    each = [
        (type(r.reducer).__qualname__, r.site.value, r.reducer.layers, _resumable(r).parameters()) for r in reductions
    ]
    text = json.dumps([version("patchclamp"), parts, each], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _resumable(reduction: Reduction) -> Resumable:
    assert isinstance(reduction.reducer, Resumable), f"{type(reduction.reducer).__name__} cannot be resumed"
    return reduction.reducer


def _restore(reductions: Sequence[Reduction], tensors: Mapping[str, Tensor]) -> None:
    states: list[dict[str, Tensor]] = [{} for _ in reductions]
    for path, tensor in tensors.items():
        number, _, name = path.partition(".")
        states[int(number)][name] = tensor
    for reduction, state in zip(reductions, states, strict=True):
        _resumable(reduction).restore(state)


def _reached(about: Mapping[str, Any]) -> Reached:
    return Reached(Cut(**about["cut"]), int(about["windows"]), int(about["tokens"]))
