"""ModelService says what is served, and how it reads a prompt."""

import asyncio
from dataclasses import asdict
from typing import Any

from patchclamp.v1 import model_pb2 as pb
from patchclamp.v1.model_pb2_grpc import ModelServiceServicer
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.quantization.card import QuantizationCard
from patchclamp_server.rpc.call.calls import check_model
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.program import SITE_NUMBERS
from patchclamp_server.text.prompt import PromptEncoder

Context = Any


class ModelService(ModelServiceServicer):
    """Raises the errors of errors.py; an interceptor turns them into statuses."""

    def __init__(self, model: ModelInfo, prompts: PromptEncoder) -> None:
        self._model = model
        self._prompts = prompts

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[encode_model(self._model)])

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        check_model(request.model, self._model)
        return await self._prompts.serving.run(self._tokenize, request)

    def _tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        prompt = decode_prompt(request.prompt, self._prompts)
        return pb.TokenizeResponse(ids=prompt.ids, pieces=self._prompts.pieces(prompt.ids), roles=prompt.roles or ())

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        check_model(request.model, self._model)
        most = self._model.context_length
        if len(request.ids) > most:
            raise InvalidArgument("ids", f"expected at most {most} tokens, as the context has, got {len(request.ids)}")
        for i, id in enumerate(request.ids):
            count(id, f"ids[{i}]", high=self._model.vocab_size - 1)
        return await asyncio.to_thread(self._detokenize, request)

    def _detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        text = self._prompts.decode(request.ids, skip_special_tokens=request.skip_special_tokens)
        return pb.DetokenizeResponse(text=text, pieces=self._prompts.pieces(request.ids))


def encode_model(info: ModelInfo) -> pb.Model:
    return pb.Model(
        name=info.name,
        fingerprint=info.fingerprint,
        architecture=info.architecture,
        n_layers=info.n_layers,
        d_model=info.d_model,
        d_ff=info.d_ff,
        n_heads=info.n_heads,
        n_kv_heads=info.n_kv_heads,
        head_dim=info.head_dim,
        vocab_size=info.vocab_size,
        context_length=info.context_length,
        dtype=info.dtype,
        device=info.device,
        activations=info.activations,
        sites=[
            pb.SiteInfo(site=SITE_NUMBERS[site], width=width)
            for site, width in sorted(info.sites.items(), key=lambda item: item[0].order)
        ],
        has_chat_template=info.has_chat_template,
        quantization=None if info.quantization is None else _encode_quantization(info.quantization),
    )


def _encode_quantization(card: QuantizationCard) -> pb.Quantization:
    return pb.Quantization(
        scheme=card.scheme,
        bits_per_weight=card.bits_per_weight,
        relative_squared_error=card.relative_squared_error,
        formats=[pb.QuantizedFormat(**asdict(format)) for format in card.formats],
        quality=None if card.quality is None else pb.QuantizationQuality(**asdict(card.quality)),
    )
