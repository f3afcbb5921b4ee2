"""File formats of artifacts are registered here by name. A new format is a module in this package and a line below."""

from patchclamp_server.artifacts.formats import (
    feature_label_json,
    gguf_control_vector,
    head_score_json,
    neuron_set_json,
    safetensors,
    text_json_lines,
)
from patchclamp_server.artifacts.formats.base import Format

FORMATS = {
    f.name: f
    for f in (
        Format("safetensors", safetensors.decode, safetensors.encode),
        Format("gguf_control_vector", gguf_control_vector.decode, gguf_control_vector.encode),
        Format("head_score_json", head_score_json.decode, head_score_json.encode),
        Format("neuron_set_json", neuron_set_json.decode, neuron_set_json.encode),
        Format("feature_label_json", feature_label_json.decode, feature_label_json.encode),
        Format("text_json_lines", text_json_lines.decode, text_json_lines.encode),
    )
}
