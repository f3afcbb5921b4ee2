"""What a request of ExtractVectors gives a method: pairs, texts, demonstrations or words → the job of the method."""

from dataclasses import dataclass

from patchclamp.v1 import generation_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.steering.causal_inner_product import CausalInnerProduct
from patchclamp_server.analysis.steering.definition import DefinitionPrompts, DefinitionVector
from patchclamp_server.analysis.steering.demonstrations import Demonstration
from patchclamp_server.analysis.steering.evidence import training_pairs
from patchclamp_server.analysis.steering.examples import TextSides, TokenPair
from patchclamp_server.analysis.steering.job import Extraction
from patchclamp_server.analysis.steering.mean_centred import BesideOrdinaryText
from patchclamp_server.analysis.steering.reft_r1.job import ReftR1
from patchclamp_server.analysis.steering.reft_r1.texts import MAX_LAYERS
from patchclamp_server.analysis.steering.task_vector import TaskPrompts, TaskVector
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Tags
from patchclamp_server.errors import InvalidArgument, about
from patchclamp_server.interventions.field_checks import known, required
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.interventions.program import Scope
from patchclamp_server.interventions.scopes import check_scope, prompt_mask
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.neurons.texts import decode_texts
from patchclamp_server.rpc.codecs.program import decode_scope
from patchclamp_server.rpc.codecs.training import decode_training
from patchclamp_server.text.prompt import EncodedPrompt, PromptEncoder

MAX_PAIRS = 4096
MAX_WORD_PAIRS = 4096
MAX_DEMONSTRATIONS = 512

POOLINGS: dict[int, Pooling] = {
    # The last token has read the whole example.
    pb.TOKEN_POOLING_UNSPECIFIED: Pooling.LAST_TOKEN,
    pb.TOKEN_POOLING_LAST_TOKEN: Pooling.LAST_TOKEN,
    pb.TOKEN_POOLING_MEAN: Pooling.MEAN,
}


@dataclass(frozen=True, eq=False)
class Inputs:
    """A request whose other settings are decoded. Each method raises InvalidArgument naming fields of the request."""

    request: pb.ExtractVectorsRequest
    prompts: PromptEncoder
    store: ArtifactStore
    info: ModelInfo
    site: Site
    layers: tuple[int, ...]
    fraction: float
    description: str
    tags: Tags

    def extraction(self, method: str) -> Extraction:
        request = self.request
        pooling = known(request.pooling, POOLINGS, "pooling", pb.TokenPooling.keys()[1:])
        pairs, texts = self._sides(ordinary=method == "mean_centred")
        return Extraction(
            method,
            pairs,
            self.site,
            self.layers,
            pooling,
            self.fraction,
            request.seed,
            self.description,
            self.tags,
            texts,
            self._scope(pairs),
        )

    def reft_r1(self) -> ReftR1:
        if len(self.layers) > MAX_LAYERS:
            message = (
                f"reft_r1 is trained at one layer after the other: expected 1 to {MAX_LAYERS}, got {len(self.layers)}"
            )
            raise InvalidArgument("layers", message)
        training = decode_training(self.request.training, "training")
        pairs, texts = self._sides()
        own = self.fraction, self.request.seed, self.description, self.tags
        return ReftR1(pairs, texts, self.site, self.layers, training, *own)

    def task_vector(self) -> TaskVector:
        demonstrations = self._demonstrations()
        prompts = TaskPrompts.of(demonstrations, self.fraction, self.request.seed, self._encode, self._continue)
        own = self.site, self.layers, self.fraction, self.request.seed, self.description, self.tags
        return TaskVector(prompts, demonstrations, *own)

    def definition(self) -> DefinitionVector:
        demonstrations, definition = self._demonstrations(), self.request.definition
        seed = self.request.seed
        prompts = DefinitionPrompts.of(demonstrations, definition, self.fraction, seed, self._encode)
        own = self.site, self.layers, self.fraction, seed, self.description, self.tags
        return DefinitionVector(prompts, demonstrations, definition, *own)

    def causal_inner_product(self) -> CausalInnerProduct:
        pairs = self.request.word_pairs
        _at_most(len(pairs), MAX_WORD_PAIRS, "word_pairs")
        training_pairs(len(pairs), self.fraction, "word_pairs")
        tokens = []
        for i, pair in enumerate(pairs):
            positive = self._token(pair.positive, f"word_pairs[{i}].positive")
            negative = self._token(pair.negative, f"word_pairs[{i}].negative")
            if positive == negative:
                raise InvalidArgument(f"word_pairs[{i}].negative", "is the same word as the positive one")
            tokens.append((positive, negative))
        # The vector is the same everywhere: it is one of the state that the unembedding reads.
        layers = self.layers if self.request.layers else (self.info.n_layers - 1,)
        words = tuple((pair.positive, pair.negative) for pair in pairs)
        own = self.site, layers, self.fraction, self.request.seed, self.description, self.tags
        return CausalInnerProduct(tuple(tokens), words, *own)

    def _sides(self, *, ordinary: bool = False) -> tuple[tuple[TokenPair, ...], TextSides | None]:
        """Returns the pairs, or the texts, which are beside ordinary text where that is asked for."""
        if self.request.HasField("texts"):
            return (), self._ordinary() if ordinary else self._texts()
        _at_most(len(self.request.pairs), MAX_PAIRS, "pairs")
        training_pairs(len(self.request.pairs), self.fraction)
        return self._pairs(), None

    def _pairs(self) -> tuple[TokenPair, ...]:
        decoded = []
        for i, pair in enumerate(self.request.pairs):
            for side in ("positive", "negative"):
                required(pair, side, f"pairs[{i}]")
            positive = self._prompt(pair.positive, f"pairs[{i}].positive")
            negative = self._prompt(pair.negative, f"pairs[{i}].negative")
            decoded.append(TokenPair(positive.ids, negative.ids, positive.roles, negative.roles))
        return tuple(decoded)

    def _prompt(self, proto: generation_pb2.Prompt, field: str) -> EncodedPrompt:
        return decode_prompt(proto, self.prompts, field)

    def _source(self) -> TextSource:
        return decode_texts(self.request.texts, "texts", self.prompts, self.store, self.info)

    def _texts(self) -> TextSides:
        source = self._source()
        target = source.label(self.request.target, "target")
        contrast = source.label(self.request.contrast, "contrast") if self.request.contrast else None
        if contrast == target:
            raise InvalidArgument("contrast", "is the target itself; expected another label of the texts, or none")
        return TextSides(source, target, contrast)

    def _ordinary(self) -> TextSides:
        """Returns the texts of the target beside pieces of ordinary text. A label that is alone is the target."""
        source = self._source()
        labels = source.corpus.labels
        target = 0 if not self.request.target and len(labels) == 1 else source.label(self.request.target, "target")
        with about("texts"):
            corpus = BesideOrdinaryText(source.corpus, target, self.prompts, source.window_tokens)
        return TextSides(TextSource(corpus, source.window_tokens, source.max_tokens), 0)

    def _scope(self, pairs: tuple[TokenPair, ...]) -> Scope:
        """Texts are windows without roles; that a scope selects none of their tokens shows when one is run."""
        scope = decode_scope(self.request.scope, "scope")
        has_roles = any(pair.positive_roles or pair.negative_roles for pair in pairs)
        check_scope(scope, "scope", vocab_size=self.info.vocab_size, has_roles=has_roles)
        for i, pair in enumerate(pairs if scope != Scope() else ()):
            sides = ("positive", pair.positive, pair.positive_roles), ("negative", pair.negative, pair.negative_roles)
            for side, ids, roles in sides:
                if not prompt_mask(scope, ids, roles).any():
                    raise InvalidArgument("scope", f"selects no token of pairs[{i}].{side}, which has {len(ids)}")
        return scope

    def _demonstrations(self) -> tuple[Demonstration, ...]:
        given = self.request.demonstrations
        _at_most(len(given), MAX_DEMONSTRATIONS, "demonstrations")
        for i, each in enumerate(given):
            for name in ("input", "output"):
                if not getattr(each, name).strip():
                    raise InvalidArgument(f"demonstrations[{i}].{name}", "is empty")
        return tuple(Demonstration(each.input, each.output) for each in given)

    def _encode(self, text: str, field: str) -> tuple[int, ...]:
        with about(field):
            return self.prompts.encode_text(text).ids

    def _continue(self, text: str, field: str) -> tuple[int, ...]:
        return self.prompts.encode_continuation(text, field)

    def _token(self, word: str, field: str) -> int:
        token = self.prompts.token_of(f" {word.strip()}") if word.strip() else None
        if token is None:
            raise InvalidArgument(field, f"expected a word that is one token after a space, got {word!r:.80}")
        return token


def _at_most(n: int, most: int, field: str) -> None:
    if n > most:
        raise InvalidArgument(field, f"expected at most {most}, got {n}")
