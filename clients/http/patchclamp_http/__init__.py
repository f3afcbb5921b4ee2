"""The HTTP front of Patchclamp: OpenAI's API and JSON for every RPC, in front of the gRPC service."""

from patchclamp_http.app import create_app
from patchclamp_http.serve import Listening, serve, serving

__all__ = ["Listening", "create_app", "serve", "serving"]
