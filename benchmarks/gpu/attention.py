"""paged_attention: ragged batches against the reference; decode against the bytes of the context, prefill against
its operations."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.checks import DTYPES, Checks, exact, poisoned
from gpu.setting import Setting, Shape
from gpu.timing import Timer, bounded
from patchclamp_kernels.paged_attention import Attended, RaggedBatch, Streaming, paged_attention
from patchclamp_kernels.paged_attention import paged_attention_reference as reference

OP = "paged_attention"
BLOCK = 16


def checks(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    found = Checks(OP, setting.seed)
    lengths = setting.pick([1, 16, 17, 100, 1023, 1024, 4097, 8192], [1, 17, 1024, 4097], [1, 5, 17, 40])
    chunks = setting.pick([(512, 1000), (300, 0)], [(200, 1000), (300, 0)], [(20, 9), (7, 0)])
    for shape in setting.shapes:
        for dtype in DTYPES:
            single = [(1, n - 1) for n in lengths]
            _check(found, setting, shape, dtype, "decode, split, with prefill", single + chunks)
            yield from found.taken()
            many = setting.pick(200, 200, 9)
            _check(found, setting, shape, dtype, f"decode of {many} rows", [(1, 7 * i % 500) for i in range(many)])
            yield from found.taken()
    heads = torch.arange(setting.shapes[0].n_heads) % 2 == 0
    sink, recent = setting.pick((4, 256), (4, 256), (2, 8))
    streaming = Streaming(heads.to(setting.device), sink, recent)
    rows = [(1, n - 1) for n in lengths] + chunks
    _check(found, setting, setting.shapes[0], torch.bfloat16, "streaming heads", rows, streaming=streaming)
    _check(found, setting, setting.shapes[0], torch.bfloat16, "window, soft cap", rows, window=recent, soft_cap=30.0)
    yield from found.taken()


def _check(
    found: Checks,
    setting: Setting,
    shape: Shape,
    dtype: torch.dtype,
    case: str,
    rows: list[tuple[int, int]],
    **options: object,
) -> None:
    device = torch.device(setting.device)
    blocks = sum(-(-(n + offset) // BLOCK) for n, offset in rows) + 1
    keys, values = _pools(shape, blocks, dtype, device)
    batch = RaggedBatch.build(_spans(rows, blocks), BLOCK, device)
    n_rows = sum(n for n, _ in rows)
    q = torch.randn(n_rows, shape.n_heads, shape.head_dim, device=device, dtype=dtype)
    scale = torch.rand(n_rows, shape.n_heads, device=device)
    positions = torch.cat([torch.arange(offset, offset + n) for n, offset in rows])
    marked = torch.stack((positions // 4, positions // 2 + 1), dim=1).to(device, torch.int32)
    common = {"scale": shape.head_dim**-0.5, "head_scale": scale, "readout": True, "marked": marked, **options}
    numbers = (n_rows, shape.n_heads)
    out = Attended(
        poisoned((n_rows, shape.n_heads * shape.head_dim), dtype, device),
        poisoned(numbers, torch.int32, device),
        poisoned(numbers, torch.float32, device),
        poisoned(numbers, torch.float32, device),
    )
    paged_attention(q, keys, values, batch, out=out, **common)
    true = reference(exact(q), exact(keys), exact(values), batch, **common)
    case = f"{shape.name}: {case}"
    found.close(
        case,
        dtype,
        z=(out.z, true.z),
        probability=(out.probability, true.probability),
        marked_mass=(out.marked_mass, true.marked_mass),
    )
    found.same(case, dtype, argmax=(out.argmax, true.argmax))
    found.same(case, dtype, share=0.0, repeated=(paged_attention(q, keys, values, batch, **common).z, out.z))


def _pools(shape: Shape, blocks: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    size = (blocks, BLOCK, shape.n_kv_heads, shape.head_dim)
    keys, values = (torch.empty(size, dtype=dtype, device=device).normal_() for _ in range(2))
    return keys, values


def _spans(rows: list[tuple[int, int]], blocks: int, seed: int = 0) -> list[tuple[int, int, list[int]]]:
    """Blocks of a server that has run for a while lie anywhere; the last sets of a long run may share some."""
    ids = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    spans, first = [], 0
    for n, offset in rows:
        needed = -(-(n + offset) // BLOCK)
        spans.append((n, offset, ids[first : first + needed]))
        first += needed
    return spans


def timings(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    timer = Timer(setting)
    for shape in setting.shapes:
        yield from _decode_timings(setting, timer, shape)
        yield from _prefill_timings(setting, timer, shape)


def _decode_timings(setting: Setting, timer: Timer, shape: Shape) -> Iterator[tuple[str, dict[str, object]]]:
    device, dtype = torch.device(setting.device), torch.bfloat16
    token_bytes = 2 * shape.n_kv_heads * shape.head_dim * dtype.itemsize
    cases = [
        (batch, context)
        for batch in setting.pick((1, 8, 64, 256), (1, 64, 256), (1, 3))
        for context in setting.pick((1024, 8192), (1024, 8192), (32,))
    ]
    if setting.cuda:
        most = 0.5 * torch.cuda.mem_get_info(device)[0]
        cases = [(b, c) for b, c in cases if b * c * token_bytes < most]
    if setting.quick:
        cases = [(b, c) for b, c in cases if b * c <= 2**19]
    blocks = max(b * c for b, c in cases) // BLOCK + 1
    blocks = max(blocks, int(3 * timer.cache_bytes / token_bytes / BLOCK) + 1)
    keys, values = _pools(shape, blocks, dtype, device)
    for batch, context in cases:
        cache_bytes = batch * context * token_bytes
        sets = min(timer.n_sets(cache_bytes), max(1, blocks * BLOCK // (batch * context)))
        # Sets of one permutation: they share no block.
        spans = _spans([(1, context - 1)] * (batch * sets), blocks)
        batches = [RaggedBatch.build(spans[i * batch : (i + 1) * batch], BLOCK, device) for i in range(sets)]
        q = torch.randn(batch, shape.n_heads, shape.head_dim, device=device, dtype=dtype)

        def runs(readout: bool, q: Tensor = q, batches: list[RaggedBatch] = batches) -> list:
            return [
                lambda b=b: paged_attention(q, keys, values, b, scale=shape.head_dim**-0.5, readout=readout)
                for b in batches
            ]

        took = timer.together({"plain": runs(False), "readout": runs(True)})
        moved = cache_bytes + 2 * q.numel() * q.element_size()
        flops = 4 * batch * context * shape.n_heads * shape.head_dim
        common = {"op": OP, "model": shape.name}
        case = f"decode {batch} x {context}"
        yield (
            "kernels",
            {**common, "case": case, **bounded(setting, took["plain"], byte_count=moved, flops=flops)},
        )
        moved += 8 * batch * shape.n_heads
        overhead = took["readout"].seconds / took["plain"].seconds - 1
        row = bounded(setting, took["readout"], byte_count=moved, flops=flops)
        yield "kernels", {**common, "case": f"{case} readout", **row, "versus": {"overhead": round(overhead, 4)}}


def _prefill_timings(setting: Setting, timer: Timer, shape: Shape) -> Iterator[tuple[str, dict[str, object]]]:
    device, dtype = torch.device(setting.device), torch.bfloat16
    rows = setting.pick(2048, 2048, 40)
    query_bytes = rows * shape.n_heads * shape.head_dim * dtype.itemsize
    sets = timer.n_sets(2 * query_bytes, most=8)
    used = -(-rows // BLOCK)
    keys, values = _pools(shape, used * sets + 1, dtype, device)
    spans = _spans([(rows, 0)] * sets, used * sets + 1)
    batches = [RaggedBatch.build([span], BLOCK, device) for span in spans]
    queries = [torch.randn(rows, shape.n_heads, shape.head_dim, device=device, dtype=dtype) for _ in range(sets)]

    def runs(readout: bool) -> list:
        return [
            lambda q=q, b=b: paged_attention(q, keys, values, b, scale=shape.head_dim**-0.5, readout=readout)
            for q, b in zip(queries, batches, strict=True)
        ]

    # What torch offers, on keys and values that lie side by side and are repeated for it.
    k, v = (torch.randn(1, shape.n_heads, rows, shape.head_dim, device=device, dtype=dtype) for _ in range(2))
    dense = [lambda q=q: F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, is_causal=True) for q in queries]
    took = timer.together({"plain": runs(False), "readout": runs(True), "sdpa": dense})
    flops = 2 * rows * (rows + 1) * shape.n_heads * shape.head_dim
    moved = 2 * query_bytes + 2 * rows * shape.n_kv_heads * shape.head_dim * dtype.itemsize
    for name in ("plain", "readout"):
        versus = {"sdpa_us": round(took["sdpa"].seconds * 1e6, 2)}
        if name == "readout":
            versus = {"overhead": round(took["readout"].seconds / took["plain"].seconds - 1, 4)}
        row = bounded(setting, took[name], byte_count=moved, flops=flops)
        suffix = "" if name == "plain" else " readout"
        case = f"prefill {rows}{suffix}"
        yield "kernels", {"op": OP, "model": shape.name, "case": case, **row, "versus": versus}
