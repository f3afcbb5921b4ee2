"""llama.cpp through the C functions of llama-cpp-python, called as llama.cpp's own programs call them.

The class of the binding copies all logits of every token to Python. Requests are decoded together as `llama-batched`
and the server do: a llama_batch with a token of each sequence. A context has one control vector
(llama_set_adapter_cvec) for all its sequences, so different programs are run one after the other. Its layer 0 cannot be
controlled. Activations are read by the callback of `llama-cvector-generator`. The first choice is taken by numpy, which
is quicker than the sampler chain.
"""

import ctypes
from typing import Any

import llama_cpp as c
import numpy as np
from llama_cpp._ggml import libggml_base_path
from protocol import Clock, Program, same, serve, together

# As llama.cpp has it: tokens of one llama_decode. Its n_ubatch stays at 512.
BATCH = 2048
# What is kept ready: as much as a short chat needs.
AT_REST = 1024
Floats = Any


class LlamaCpp:
    def load(self, model: str, vectors: str | None, threads: int) -> dict[str, Any]:
        c.llama_backend_init()
        self.vectors: Floats = None if vectors is None else np.load(vectors)
        self.threads = threads
        self.model = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
        self.n_vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.width = c.llama_model_n_embd(self.model)
        self.batch = c.llama_batch_init(BATCH, 0, 1)
        self.context: Any = None
        self.controlled: Program = None
        self._hold(AT_REST, 1)
        settings = (
            "the file as it is, mapped; KV cache in float16, flash attention where llama.cpp finds it better (auto), "
            f"a KV stream for each sequence; at rest a context of {AT_REST} tokens"
        )
        return {"versions": {"llama-cpp-python": c.__version__}, "settings": settings}

    def _hold(self, tokens: int, sequences: int) -> None:
        """A context for so many sequences of so many tokens; the one before it is freed."""
        wanted = (-(-tokens // 256) * 256, sequences)
        if self.context is not None and self.held == wanted:
            c.llama_memory_clear(c.llama_get_memory(self.context), False)
            return
        if self.context is not None:
            c.llama_free(self.context)
        self.held, self.controlled = wanted, None
        self.context = c.llama_init_from_model(self.model, self._options(*wanted))
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {sequences} sequences of {tokens} tokens")

    def _options(self, tokens: int, sequences: int) -> Any:
        options = c.llama_context_default_params()
        options.n_ctx, options.n_seq_max = tokens * sequences, sequences
        options.n_batch = BATCH
        options.n_threads = options.n_threads_batch = self.threads
        return options

    def _control(self, program: Program) -> None:
        """llama.cpp makes its graph anew after this, so that it is only done where something changes."""
        if program == self.controlled:
            return
        self.controlled = program
        layers = sorted(int(layer) for layer in program or {})
        if not layers:
            c.llama_set_adapter_cvec(self.context, None, 0, self.width, 0, 0)
            return
        n_layers = c.llama_model_n_layer(self.model)
        # Of the layers from 1 on.
        data = np.zeros((n_layers - 1, self.width), np.float32)
        for layer in layers:
            data[layer - 1] = self.vectors[(program or {})[str(layer)]]
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        if c.llama_set_adapter_cvec(self.context, pointer, data.size, self.width, layers[0], layers[-1]):
            raise RuntimeError("llama.cpp does not take the control vector")

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> Floats:
        """One llama_decode of (token, position, sequence, whether its logits are wanted). Returns the logits
        [wanted, vocabulary], which the next one overwrites."""
        batch = self.batch
        batch.n_tokens = len(rows)
        wanted = 0
        for i, (token, position, sequence, wants) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wants
            batch.seq_id[i][0] = sequence
            wanted += wants
        if status := c.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        if not wanted:
            return np.zeros((0, self.n_vocabulary), np.float32)
        return np.ctypeslib.as_array(c.llama_get_logits(self.context), (wanted, self.n_vocabulary))

    def decode(self, prompts: list[list[int]], tokens: int, programs: list[Program], one_by_one: int) -> dict[str, Any]:
        if not same(programs):
            each = zip(prompts[:one_by_one], programs, strict=False)
            return together([self._batch([prompt], tokens, program) for prompt, program in each])
        return self._batch(prompts, tokens, programs[0]) | {"how": "one batch"}

    def _batch(self, prompts: list[list[int]], tokens: int, program: Program) -> dict[str, Any]:
        length = len(prompts[0])
        self._hold(length + tokens, len(prompts))
        self._control(program)
        rows = [
            (token, position, sequence, position == length - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        clock = Clock()
        found = [token for i in range(0, len(rows), BATCH) for token in self._decode(rows[i : i + BATCH]).argmax(1)]
        clock.tick()
        came = [found]
        for position in range(length, length + tokens - 1):
            found = list(self._decode([(token, position, i, True) for i, token in enumerate(found)]).argmax(1))
            clock.tick()
            came.append(found)
        return clock.seconds(len(prompts)) | {"tokens": np.array(came).T.tolist()}

    def logits(self, prompt: list[int], program: Program, path: str) -> dict[str, Any]:
        self._hold(len(prompt), 1)
        self._control(program)
        np.save(path, self._decode([(token, i, 0, True) for i, token in enumerate(prompt)])[:-1])
        return {}

    def read(self, prompt: list[int], layers: int, path: str | None) -> dict[str, Any]:
        """All logits are asked for: of the others llama.cpp computes the last layer for no token."""
        rows = np.empty((layers, len(prompt), self.width), np.float32)
        ggml = ctypes.CDLL(str(libggml_base_path / "libggml-base.so"))
        ggml.ggml_get_name.restype = ctypes.c_char_p
        ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
        ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

        def on_tensor(tensor: int, asks: bool, _data: Any) -> bool:
            name, _, layer = ggml.ggml_get_name(tensor).decode().partition("-")
            if name == "l_out" and not asks:
                target = rows[int(layer)]
                ggml.ggml_backend_tensor_get(tensor, target.ctypes.data, 0, target.nbytes)
            return name == "l_out"

        callback = c.ggml_backend_sched_eval_callback(on_tensor)
        options = self._options(-(-len(prompt) // 256) * 256, 1)
        options.cb_eval = callback
        before, self.context = self.context, c.llama_init_from_model(self.model, options)
        try:
            clock = Clock()
            self._decode([(token, i, 0, True) for i, token in enumerate(prompt)])
            clock.tick()
        finally:
            c.llama_free(self.context)
            self.context = before
        if path is not None:
            np.save(path, rows)
        return {"seconds": clock.times[0] - clock.started, "shape": list(rows.shape)}


if __name__ == "__main__":
    serve(LlamaCpp())
