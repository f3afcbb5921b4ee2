"""The prompt as it is repeated before a completion (`echo`), with the log-probabilities of its tokens."""

from dataclasses import dataclass

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import model_pb2
from patchclamp_http.openai.requests import Asked
from patchclamp_http.upstream import Options, Upstream, answer


@dataclass(frozen=True)
class Echo:
    """`tokens` is empty unless log-probabilities are asked for; the first has none."""

    text: str
    tokens: list[pb.GeneratedToken]


async def echoes(upstream: Upstream, asked: Asked, options: Options) -> list[Echo]:
    """Returns one for each prompt. Raises PatchclampError."""
    return [await _echo(upstream, asked, request, options) for request in asked.requests]


async def _echo(upstream: Upstream, asked: Asked, request: pb.GenerateRequest, options: Options) -> Echo:
    asking = model_pb2.TokenizeRequest(model=request.model, prompt=request.prompt)
    found = await answer(upstream.stubs.models.Tokenize(asking, **options.arguments()))
    ids, text = list(found.ids), request.prompt.text
    if request.prompt.WhichOneof("form") == "tokens":
        back = model_pb2.DetokenizeRequest(model=request.model, ids=ids)
        text = (await answer(upstream.stubs.models.Detokenize(back, **options.arguments()))).text
    if asked.logprobs is None:
        return Echo(text, [])
    tokens = [pb.GeneratedToken(id=ids[0], text=found.pieces[0])]
    if len(ids) > 1:
        score = pb.ScoreRequest(
            model=request.model,
            prompt=pb.Prompt(tokens=pb.TokenIds(ids=ids[:1])),
            tokens=pb.TokenIds(ids=ids[1:]),
            program=request.program,
            priority=request.priority,
            top_logprobs=asked.logprobs,
        )
        scored = await answer(upstream.stubs.generation.Score(score, **options.arguments()))
        tokens += scored.tokens
    return Echo(text, tokens)
