"""File formats of artifacts are registered here by name. A new format is a module in this package and a line below."""

from patchclamp_server.artifacts.formats import gguf_control_vector, head_score_json, safetensors
from patchclamp_server.artifacts.formats.base import CannotExpress, Decoded, Format, MalformedFile

FORMATS = {
    f.name: f
    for f in (
        Format("safetensors", safetensors.decode, safetensors.encode),
        Format("gguf_control_vector", gguf_control_vector.decode, gguf_control_vector.encode),
        Format("head_score_json", head_score_json.decode, head_score_json.encode),
    )
}

__all__ = ["FORMATS", "CannotExpress", "Decoded", "Format", "MalformedFile"]
