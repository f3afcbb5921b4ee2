"""NeuronService: neurons found by their weights, by labelled text, by facts and by a census, and tested by edits."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from functools import partial
from typing import Any

from patchclamp.v1 import neuron_pb2 as pb
from patchclamp.v1.neuron_pb2_grpc import NeuronServiceServicer
from patchclamp_server.analysis.neurons.census import census
from patchclamp_server.analysis.neurons.compare import compare
from patchclamp_server.analysis.neurons.decode import decode
from patchclamp_server.analysis.neurons.describe import describe_neurons
from patchclamp_server.analysis.neurons.evaluation import evaluate_edit
from patchclamp_server.analysis.neurons.find_job import find_neurons
from patchclamp_server.analysis.neurons.localize.job import localize
from patchclamp_server.analysis.neurons.localize.methods import Gradients, Localization, Localized
from patchclamp_server.analysis.neurons.match import match_neurons
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import exclusively
from patchclamp_server.interventions.field_checks import count
from patchclamp_server.rpc.call.analysis_jobs import AnalysisJobs
from patchclamp_server.rpc.codecs.neurons.census import decode_census, encode_census
from patchclamp_server.rpc.codecs.neurons.compare import encode_overlaps
from patchclamp_server.rpc.codecs.neurons.decode import decode_decoding, encode_decoding
from patchclamp_server.rpc.codecs.neurons.describe import decode_describing, encode_describing
from patchclamp_server.rpc.codecs.neurons.evaluation import decode_evaluation, encode_evaluation
from patchclamp_server.rpc.codecs.neurons.find import decode_finding, encode_finding
from patchclamp_server.rpc.codecs.neurons.localize import decode_localization, encode_localization
from patchclamp_server.rpc.codecs.neurons.match import decode_matching, encode_matching
from patchclamp_server.rpc.codecs.neurons.texts import text_fields

Context = Any


class NeuronService(NeuronServiceServicer):
    """Raises the errors of errors.py; an interceptor turns them into statuses. Cancelling a call ends its job, with
    every request it has in the engine."""

    def __init__(self, jobs: AnalysisJobs, match_models: Mapping[str, str]) -> None:
        """`match_models`: paths of the checkpoints that neurons may be matched with, by name."""
        self._jobs, self._match_models = jobs, match_models

    def DecodeNeurons(
        self, request: pb.DecodeNeuronsRequest, context: Context
    ) -> AsyncIterator[pb.DecodeNeuronsResponse]:
        jobs = self._jobs
        decoder = jobs.engine.model.decoder
        return jobs.stream(
            request,
            partial(decode_decoding, request, jobs.store, jobs.model, decoder.spec),
            lambda job: exclusively(jobs.engine, decode(decoder, job)),
            partial(encode_decoding, prompts=jobs.prompts),
            exclusive=True,
        )

    def FindNeurons(self, request: pb.FindNeuronsRequest, context: Context) -> AsyncIterator[pb.FindNeuronsResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_finding, request, jobs.prompts, jobs.store, jobs.model),
            partial(find_neurons, jobs.engine, jobs.store, jobs.model),
            partial(encode_finding, prompts=jobs.prompts),
            exclusive=True,
        )

    def LocalizeNeurons(
        self, request: pb.LocalizeNeuronsRequest, context: Context
    ) -> AsyncIterator[pb.LocalizeNeuronsResponse]:
        jobs = self._jobs

        def run(job: Localization) -> AsyncGenerator[Progress | Localized, None]:
            found = localize(jobs.engine, jobs.store, jobs.model, jobs.prompts, job)
            return jobs.door.follow(found) if isinstance(job.method, Gradients) else found

        decode = partial(decode_localization, request, jobs.prompts, jobs.store, jobs.model)
        # The engine says "prompt" of a window that it cannot run.
        window = f"{request.WhichOneof('method')}.texts.window_tokens"
        fields = {"prompt": window, "window_tokens": window}
        return jobs.stream(request, decode, run, encode_localization, fields=fields)

    def EvaluateNeuronEdit(
        self, request: pb.EvaluateNeuronEditRequest, context: Context
    ) -> AsyncIterator[pb.EvaluateNeuronEditResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_evaluation, request, jobs.prompts, jobs.store, jobs.model),
            partial(evaluate_edit, jobs.engine, jobs.store, jobs.model, jobs.prompts),
            encode_evaluation,
        )

    def DescribeNeurons(
        self, request: pb.DescribeNeuronsRequest, context: Context
    ) -> AsyncIterator[pb.DescribeNeuronsResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_describing, request, jobs.prompts, jobs.store, jobs.model),
            partial(describe_neurons, jobs.engine, jobs.store, jobs.model, jobs.prompts),
            partial(encode_describing, prompts=jobs.prompts),
            fields=text_fields(request.texts, "texts"),
        )

    def CensusNeurons(
        self, request: pb.CensusNeuronsRequest, context: Context
    ) -> AsyncIterator[pb.CensusNeuronsResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_census, request, jobs.prompts, jobs.store, jobs.model),
            partial(census, jobs.engine, jobs.store, jobs.model, jobs.prompts),
            partial(encode_census, prompts=jobs.prompts),
            fields=text_fields(request.texts, "texts"),
        )

    def MatchNeurons(self, request: pb.MatchNeuronsRequest, context: Context) -> AsyncIterator[pb.MatchNeuronsResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_matching, request, jobs.prompts, jobs.store, jobs.model, self._match_models),
            partial(match_neurons, jobs.engine, jobs.store, jobs.model, jobs.prompts),
            encode_matching,
            exclusive=True,
            fields=text_fields(request.texts, "texts"),
        )

    async def CompareNeuronSets(
        self, request: pb.CompareNeuronSetsRequest, context: Context
    ) -> pb.CompareNeuronSetsResponse:
        top_k = count(request.top_k, "top_k")
        store, model = self._jobs.store, self._jobs.model
        return encode_overlaps(await asyncio.to_thread(compare, request.neuron_sets, top_k, store, model))
