"""logit_lens_topk: the likeliest tokens without the logits in memory, against matmul and topk."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.checks import DTYPES, Checks, exact, poisoned
from gpu.setting import Setting
from gpu.timing import Timer, bounded
from patchclamp_kernels.logit_lens_topk import logit_lens_topk, logit_lens_topk_reference

OP = "logit_lens_topk"
K = 10


def checks(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    found = Checks(OP, setting.seed)
    device = torch.device(setting.device)
    for shape in setting.shapes:
        for dtype in DTYPES:
            unembedding = torch.empty(shape.vocab_size, shape.d_model, dtype=dtype, device=device)
            unembedding.normal_(0.0, shape.d_model**-0.5)
            wide = exact(unembedding)
            for rows in setting.pick((1, 40, 200), (1, 40), (1, 5)):
                x = torch.randn(rows, shape.d_model, device=device, dtype=dtype)
                out = {
                    "out_values": poisoned((rows, K), torch.float32, device),
                    "out_ids": poisoned((rows, K), torch.int64, device),
                    "out_log_total": poisoned((rows,), torch.float32, device),
                }
                logit_lens_topk(x, unembedding, k=K, **out)
                true = logit_lens_topk_reference(exact(x), wide, k=K)
                case = f"{shape.name}: {rows} rows"
                found.close(
                    case,
                    dtype,
                    values=(out["out_values"], true.values),
                    log_total=(out["out_log_total"], true.log_total),
                )
                found.same(case, dtype, share=0.01, ids=(out["out_ids"], true.ids))
                again = logit_lens_topk(x, unembedding, k=K)
                found.same(case, dtype, share=0.0, repeated=(again.values, out["out_values"]))
            weight = torch.rand(shape.d_model, device=device).to(dtype) + 0.5
            options = {"k": K, "norm_weight": weight, "eps": 1e-5, "soft_cap": 30.0}
            normed = logit_lens_topk(x, unembedding, **options)
            # The norm rounds to the dtype of x, in the reference as well: here the truth is in float32.
            true = logit_lens_topk_reference(x, unembedding, **options)
            found.close(f"{shape.name}: norm, soft cap", dtype, values=(normed.values, true.values))
            yield from found.taken()


def timings(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    timer, device, dtype = Timer(setting), torch.device(setting.device), torch.bfloat16
    for shape in setting.shapes:
        unembedding = torch.empty(shape.vocab_size, shape.d_model, dtype=dtype, device=device)
        unembedding.normal_(0.0, shape.d_model**-0.5)
        for rows in setting.pick((1, 8, 64, 256), (1, 64), (3,)):
            x = torch.randn(rows, shape.d_model, device=device, dtype=dtype)

            def by_torch(x: Tensor = x, unembedding: Tensor = unembedding) -> object:
                logits = F.linear(x, unembedding).float()
                return logits.topk(K, dim=-1), logits.logsumexp(dim=-1)

            ours = [lambda x=x, u=unembedding: logit_lens_topk(x, u, k=K)]
            took = timer.together({"ours": ours, "torch": [by_torch]})
            flops = 2 * rows * unembedding.numel()
            moved = (unembedding.numel() + x.numel()) * dtype.itemsize + rows * K * 12
            row = bounded(setting, took["ours"], byte_count=moved, flops=flops)
            versus = {"vs_matmul_topk": round(took["torch"].seconds / took["ours"].seconds, 3)}
            yield "kernels", {"op": OP, "model": shape.name, "case": f"{rows} rows, top {K}", **row, "versus": versus}
