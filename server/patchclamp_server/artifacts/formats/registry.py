"""File formats of artifacts are registered here by name. A new format is a module in this package and a line below."""

from patchclamp_server.artifacts.formats import (
    duo_attention_tsv,
    feature_label_json,
    gguf_control_vector,
    head_score_json,
    neuron_set_json,
    qr_head_yaml,
    safetensors,
    text_json_lines,
)
from patchclamp_server.artifacts.formats.base import Format

FORMATS = {
    f.name: f
    for f in (
        Format("safetensors", safetensors.decode, safetensors.encode, frozenset({"tensor_names"})),
        Format(
            "gguf_control_vector",
            gguf_control_vector.decode,
            gguf_control_vector.encode,
            frozenset({"layer_offset"}),
        ),
        Format("head_score_json", head_score_json.decode, head_score_json.encode),
        Format("duo_attention_tsv", duo_attention_tsv.decode, duo_attention_tsv.encode),
        Format("qr_head_yaml", qr_head_yaml.decode, qr_head_yaml.encode),
        Format("neuron_set_json", neuron_set_json.decode, neuron_set_json.encode),
        Format("feature_label_json", feature_label_json.decode, feature_label_json.encode),
        Format("text_json_lines", text_json_lines.decode, text_json_lines.encode),
    )
}
