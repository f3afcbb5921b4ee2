"""FeatureService: features of sparse autoencoders, sought by texts, tokens, a direction or a label."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from patchclamp.v1 import feature_pb2 as pb
from patchclamp.v1.feature_pb2_grpc import FeatureServiceServicer
from patchclamp_server.analysis.features.search import search
from patchclamp_server.rpc.call.analysis_jobs import AnalysisJobs
from patchclamp_server.rpc.codecs.feature import decode_search, encode_found, search_fields

Context = Any


class FeatureService(FeatureServiceServicer):
    """Raises the errors of errors.py; an interceptor turns them into statuses. Cancelling a call ends its job."""

    def __init__(self, jobs: AnalysisJobs) -> None:
        self._jobs = jobs

    def SearchFeatures(
        self, request: pb.SearchFeaturesRequest, context: Context
    ) -> AsyncIterator[pb.SearchFeaturesResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_search, request, jobs.prompts, jobs.store, jobs.model),
            partial(search, jobs.engine, jobs.prompts),
            partial(encode_found, prompts=jobs.prompts),
            fields=search_fields(request),
        )
