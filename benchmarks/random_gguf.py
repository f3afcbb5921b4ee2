"""GGUF files of random weights in the shapes of real models, with the mix of formats that llama.cpp calls Q4_K_M.

    python benchmarks/random_gguf.py llama-3.1-8b FILE.gguf --tokenizer OTHER.gguf

What a file costs in memory and time does not depend on the values of its weights. Those are of the size that keeps
activations finite, and repeat after some megabytes. The tokenizer is that of another file, filled up with tokens that
no text has.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Q = GGMLQuantizationType
# A row whose width is no multiple of 256 has these instead, as llama.cpp does it.
WITHOUT_K = {Q.Q4_K: Q.Q5_0, Q.Q6_K: Q.Q8_0}
# So many bytes of random blocks are made of each format.
REPEATED = 16 << 20
_NORMAL_TOKEN = 1


@dataclass(frozen=True)
class Shape:
    architecture: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    vocab: int
    context: int
    rope_base: float
    tied: bool
    has_biases: bool = False

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


SHAPES = {
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 4864, 14, 2, 151_936, 32_768, 1e6, tied=True, has_biases=True),
    "llama-3.1-8b": Shape("llama", 32, 4096, 14_336, 32, 8, 128_256, 131_072, 5e5, tied=False),
}


def matrices(shape: Shape) -> Iterator[tuple[str, int, int, GGMLQuantizationType]]:
    """Yields name, outputs, inputs and format of each matrix, in the order of a file."""
    d, kv = shape.d_model, shape.n_kv_heads * shape.head_dim
    yield "token_embd", shape.vocab, d, Q.Q6_K if shape.tied else Q.Q4_K
    if not shape.tied:
        yield "output", shape.vocab, d, Q.Q6_K
    for layer in range(shape.n_layers):
        eighth = shape.n_layers // 8
        # llama.cpp's rule for values and down projections: the first and the last eighth, and each third between.
        more = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        finer = Q.Q6_K if more else Q.Q4_K
        for name, out, width, kind in (
            ("attn_q", d, d, Q.Q4_K),
            ("attn_k", kv, d, Q.Q4_K),
            ("attn_v", kv, d, finer),
            ("attn_output", d, d, Q.Q4_K),
            ("ffn_gate", shape.d_ff, d, Q.Q4_K),
            ("ffn_up", shape.d_ff, d, Q.Q4_K),
            ("ffn_down", d, shape.d_ff, finer),
        ):
            yield f"blk.{layer}.{name}", out, width, kind


def format_of(kind: GGMLQuantizationType, width: int) -> GGMLQuantizationType:
    return kind if width % GGML_QUANT_SIZES[kind][0] == 0 else WITHOUT_K[kind]


def random_blocks(kind: GGMLQuantizationType, deviation: float) -> Bytes:
    """Returns about REPEATED bytes of blocks whose weights have about this standard deviation, and a mean of 0."""
    size = GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(int(kind)).integers(0, 256, (REPEATED // size, size), dtype=np.uint8)
    # Where the halves of a block lie, and what they are for a deviation of 1, found by trial.
    scales: dict[GGMLQuantizationType, list[tuple[int, float]]] = {
        # Codes 0 to 15 are 7.5 in the mean: lows must be as large as what they are taken from.
        Q.Q4_K: [(0, 1 / 260), (2, 7.5 / 260)],
        Q.Q6_K: [(208, 1 / (74 * 18.5))],
        Q.Q5_0: [(0, 1 / 9.2)],
        Q.Q8_0: [(0, 1 / 74)],
    }
    for offset, factor in scales[kind]:
        half = np.array([deviation * factor], dtype=np.float16).view(np.uint8)
        blocks[:, offset : offset + 2] = half
    return blocks


def write(path: Path, shape: Shape, tokenizer: Path) -> None:
    """Writes a file tensor by tensor: it never is in memory as a whole."""
    writer = GGUFWriter(path, shape.architecture)
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocab)
    _copy_tokenizer(writer, GGUFReader(tokenizer), shape.vocab)
    vectors = dict(_vectors(shape))
    for name, values in vectors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for name, out, width, kind in matrices(shape):
        own = format_of(kind, width)
        row = width // GGML_QUANT_SIZES[own][0] * GGML_QUANT_SIZES[own][1]
        writer.add_tensor_info(f"{name}.weight", (out, row), np.dtype(np.uint8), out * row, own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in vectors.values():
        writer.write_tensor_data(values)
    made: dict[tuple[GGMLQuantizationType, int], Bytes] = {}
    for _, out, width, kind in matrices(shape):
        own = format_of(kind, width)
        if (own, width) not in made:
            made[own, width] = random_blocks(own, width**-0.5)
        blocks = made[own, width]
        wanted = out * (width // GGML_QUANT_SIZES[own][0])
        writer.write_tensor_data(np.resize(blocks, (wanted, blocks.shape[1])).reshape(out, -1))
    writer.close()


def _vectors(shape: Shape) -> Iterator[tuple[str, NDArray[np.float32]]]:
    yield "output_norm.weight", np.ones(shape.d_model, dtype=np.float32)
    kv = shape.n_kv_heads * shape.head_dim
    for layer in range(shape.n_layers):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", np.ones(shape.d_model, dtype=np.float32)
        if shape.has_biases:
            for name, size in (("attn_q", shape.d_model), ("attn_k", kv), ("attn_v", kv)):
                yield f"blk.{layer}.{name}.bias", np.zeros(size, dtype=np.float32)


def _copy_tokenizer(writer: GGUFWriter, source: GGUFReader, vocab: int) -> None:
    fields = {name: field for name, field in source.fields.items() if name.startswith("tokenizer.")}
    for name, field in fields.items():
        value, kind = field.contents(), field.types[0]
        sub = field.types[-1] if kind is GGUFValueType.ARRAY else None
        if name == "tokenizer.ggml.tokens":
            value = [*value, *(f"<unused_{i}>" for i in range(vocab - len(value)))]
        elif name == "tokenizer.ggml.token_type":
            value = [*value, *[_NORMAL_TOKEN] * (vocab - len(value))]
        writer.add_key_value(name, value, kind, sub)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF file that has one")
    arguments = parser.parse_args()
    write(arguments.file, SHAPES[arguments.shape], arguments.tokenizer)


if __name__ == "__main__":
    main()
