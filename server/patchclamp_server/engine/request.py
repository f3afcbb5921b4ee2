"""The words in which the rpc layer and the engine speak: requests in, events out. No gRPC here."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import NamedTuple

from patchclamp_server.callers import CALLER, Caller
from patchclamp_server.engine.reducers.divergence import ScoreReducer
from patchclamp_server.engine.reducers.reducer import Reducer
from patchclamp_server.errors import RequestError
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.pooling import Pooled, Pooling
from patchclamp_server.interventions.program import ReadoutValue, Receipt, Scope
from patchclamp_server.interventions.request_warnings import RequestWarning
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.policy import Selector


class Priority(IntEnum):
    """Lower runs first."""

    INTERACTIVE = 1
    BATCH = 2
    ANALYSIS = 3


@dataclass(frozen=True)
class SamplingParams:
    """Fields and defaults as in the message Sampling; `seed` None lets the engine choose."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    # (id, what is added to its logit).
    logit_bias: tuple[tuple[int, float], ...] = ()
    # None: no log-probabilities; n: those of the chosen token and of the n most likely.
    logprobs: int | None = None


@dataclass(frozen=True)
class StopParams:
    max_tokens: int = 256
    strings: tuple[str, ...] = ()
    # Looked up for every generated token.
    token_ids: Set[int] = frozenset()
    ignore_eos: bool = False
    include_stop_string: bool = False
    # So many tokens come before anything above can end them, but max_tokens.
    min_tokens: int = 0


@dataclass(frozen=True)
class Capture:
    """Pool the activations of the prompt at one site on the device, for analysis jobs: those of the tokens in scope."""

    site: Site
    layers: tuple[int, ...]
    pooling: Pooling
    scope: Scope = field(default_factory=Scope)


@dataclass(frozen=True, eq=False)
class Reduction:
    """Gives the rows of the prompt at one site, after its edits, to a reducer that the requests of a job share.

    Each token is given once: those that the prefix cache has are computed all the same, and those that a preemption
    makes to be computed again are not given again. `text` and `label` say to the reducer whose rows they are; the token
    ids come with them.
    """

    site: Site
    reducer: Reducer
    text: int = 0
    label: int = 0


@dataclass(frozen=True)
class QualityGuard:
    """A share of the generated tokens is computed densely as well; sparse inference ends for the sequence when the mean
    KL(dense ‖ sparse) of the last `window` of them is above `max_divergence` nats."""

    max_divergence: float
    sample_rate: float = 1 / 16
    window: int = 8


@dataclass(frozen=True, eq=False)
class SparseInference:
    """Tokens after the prompt are computed by `selector`. `profile` is the id of its artifact, where it has one.

    `listens`: an analysis job hears all tokens, those of the prompt too, as rows that the policy selects for. Nothing
    is said of it in metrics.
    """

    policy: str
    selector: Selector
    profile: str = ""
    guard: QualityGuard | None = None
    listens: bool = False


def _never() -> bool:
    return False


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence to run. `on_event` is called on the engine's thread and must not block.

    With `score_from` set, the tokens from there on are scored instead of generating: the sequence ends once every
    token in ``tokens[score_from:]`` has its log-probability, streamed as Token events.
    """

    tokens: tuple[int, ...]
    on_event: Callable[["Event"], None]
    program: BoundProgram | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: StopParams = field(default_factory=StopParams)
    priority: Priority = Priority.INTERACTIVE
    # On the clock of time.monotonic().
    deadline: float | None = None
    # Role of the chat turn of each prompt token, for scopes that name roles.
    roles: tuple[str, ...] | None = None
    score_from: int | None = None
    # The log-probabilities of the prompt's tokens, and of the n most likely ones, streamed as PromptToken events.
    prompt_logprobs: int | None = None
    # Takes what those tokens are scored with. An analysis job compares: nothing is said of its sparsity in metrics.
    scores: ScoreReducer | None = None
    # Tokens that may be generated before Engine.advance grants more; None is no limit.
    credits: int | None = None
    # Run a second, unedited sequence along the generated tokens, and report the divergence at each.
    compare_baseline: bool = False
    # A capture or reductions. One pass over the prompt feeds all reducers, at whichever sites.
    capture: Capture | None = None
    reductions: tuple[Reduction, ...] = ()
    sparsity: SparseInference | None = None
    # Whose share of the engine it takes: of the call in which it is made.
    caller: Caller = field(default_factory=CALLER.get)
    # What was said of it before it ran; its receipt has them too.
    warnings: tuple[RequestWarning, ...] = ()
    # True while its reader is behind: it gets no step then. Whoever ends that calls Engine.wake.
    held: Callable[[], bool] = _never


class FinishReason(Enum):
    EOS = "eos"
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"
    LENGTH = "length"
    CLIENT = "client"


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    time_to_first_token_seconds: float
    total_seconds: float
    preemptions: int


@dataclass(frozen=True)
class Timeline:
    """When a request passed its stages, on the clock of time.monotonic(); None for one that it did not reach.

    `admitted`: its first step. `preempted`: whenever it lost its KV blocks.
    """

    admitted: float | None
    first_token: float | None
    ended: float
    preempted: tuple[float, ...] = ()


class Token(NamedTuple):
    """One generated (or scored) token, in order. This and its text come for every sequence of a step: tuples are made
    fastest."""

    id: int
    position: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class PromptToken(NamedTuple):
    """One token of the prompt, in order; the first has no log-probability."""

    id: int
    position: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Text(NamedTuple):
    """Text that has become final: whole characters that cannot belong to a stop string."""

    text: str


@dataclass(frozen=True)
class Readouts:
    """Values seen in the forward pass over the token at one position (prompt or generated)."""

    position: int
    values: tuple[ReadoutValue, ...]


class LayerPrediction(NamedTuple):
    """What a layer would have said: its most likely token, and the log-probabilities of those that are asked about."""

    layer: int
    top: int
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class LatentPredictions:
    """What layers would have said for `position` + 1, where the sequence has `token`, the first that they are asked
    about."""

    position: int
    token: int
    layers: tuple[LayerPrediction, ...]


@dataclass(frozen=True)
class Divergence:
    """KL(edited ‖ baseline) in nats where the edited sequence chose token `id` for `position`."""

    position: int
    id: int
    kl: float
    same_top1: bool


@dataclass(frozen=True, eq=False)
class Captured:
    """Of a request with `capture`."""

    pooled: Pooled


@dataclass(frozen=True)
class GuardReport:
    """Fields as in the message GuardReport."""

    sampled_tokens: int
    mean_divergence: float
    top1_agreement: float
    max_divergence: float
    dense_from: int | None = None


@dataclass(frozen=True)
class SparsityReport:
    """Fields as in the message SparsityReport."""

    policy: str
    profile: str
    sparse_tokens: int
    dense_tokens: int
    active_ratio: float
    guard: GuardReport | None = None
    filled_ratio: float = 0.0
    # Not in the message: of the layers in which something was selected.
    active_by_layer: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    reason: FinishReason
    receipt: Receipt
    usage: Usage
    seed: int
    stop_string: str = ""
    sparsity: SparsityReport | None = None
    timeline: Timeline | None = None


@dataclass(frozen=True)
class Failed:
    """The last event of a request that did not finish; without `usage` and `timeline` when it never was queued."""

    error: RequestError
    usage: Usage | None = None
    timeline: Timeline | None = None


Event = Token | PromptToken | Text | Readouts | LatentPredictions | Divergence | Captured | Finished | Failed
