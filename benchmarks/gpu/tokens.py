"""token_choice: the likeliest token and log-probabilities, against one reading of the logits."""

from collections.abc import Iterator

import torch

from gpu.checks import DTYPES, Checks, exact, poisoned
from gpu.setting import Setting
from gpu.timing import Timer, bounded
from patchclamp_kernels.token_choice import (
    greedy_choice,
    greedy_choice_reference,
    token_logprobs,
    token_logprobs_reference,
)

OP = "token_choice"


def checks(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    found = Checks(OP, setting.seed)
    device = torch.device(setting.device)
    for shape in setting.shapes:
        for dtype in DTYPES:
            for rows in setting.pick((1, 33), (33,), (1, 5)):
                logits = (torch.randn(rows, shape.vocab_size, device=device) * 3).to(dtype)
                if rows > 1:
                    # Equal maxima: the lowest id is the choice.
                    logits[0, 77] = logits[0, 11] = 60.0
                ids = poisoned((rows,), torch.int64, device)
                logprobs = poisoned((rows,), torch.float32, device)
                greedy_choice(logits, out_ids=ids, out_logprobs=logprobs)
                true_ids, true_logprobs = greedy_choice_reference(exact(logits))
                asked = torch.randint(0, shape.vocab_size, (rows, 20), device=device)
                scores = poisoned((rows, 20), torch.float32, device)
                token_logprobs(logits, asked, out=scores)
                case = f"{shape.name}: {rows} rows"
                found.same(case, dtype, share=0.0, ids=(ids, true_ids))
                # Of float32 whatever the logits are. As probabilities: an error of a log is a relative one of those.
                found.close(
                    case,
                    torch.float32,
                    probabilities=(logprobs.exp(), true_logprobs.exp()),
                    token_logprobs=(scores, token_logprobs_reference(exact(logits), asked)),
                )
            yield from found.taken()


def timings(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    timer, device = Timer(setting), torch.device(setting.device)
    for shape in setting.shapes:
        for rows in setting.pick((1, 64, 256), (1, 256), (3,)):
            moved = 4 * rows * shape.vocab_size
            logits = [torch.randn(rows, shape.vocab_size, device=device) for _ in range(timer.n_sets(moved))]
            took = timer.together(
                {
                    "ours": [lambda x=x: greedy_choice(x) for x in logits],
                    "torch": [lambda x=x: (x.argmax(dim=-1), x.logsumexp(dim=-1)) for x in logits],
                }
            )
            row = bounded(setting, took["ours"], byte_count=moved)
            versus = {"vs_argmax_logsumexp": round(took["torch"].seconds / took["ours"].seconds, 3)}
            yield "kernels", {"op": OP, "model": shape.name, "case": f"{rows} rows, float32", **row, "versus": versus}
