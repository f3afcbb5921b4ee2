"""feature_clamp: latents of a sparse autoencoder, against the bytes of their encoder and decoder rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu.checks import DTYPES, Checks, exact, poisoned
from gpu.setting import Setting, Shape
from gpu.timing import Timer, bounded
from patchclamp_kernels.feature_clamp import feature_clamp, feature_clamp_reference

OP = "feature_clamp"
LATENTS = 64


def _autoencoder(shape: Shape, latents: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    encoder, decoder = (
        torch.empty(latents, shape.d_model, dtype=dtype, device=device).normal_(0.0, shape.d_model**-0.5)
        for _ in range(2)
    )
    biases = {"encoder_bias": torch.randn(latents, device=device).to(dtype) * 0.1}
    return {"encoder": encoder, "decoder": decoder, **biases}


def _targets(rows: int, latents: int, device: torch.device, uneven: bool) -> dict[str, Tensor]:
    each = torch.arange(rows) % (2 * LATENTS) if uneven else torch.full((rows,), LATENTS)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), each.cumsum(0)))
    n = int(starts[-1])
    targets, scales, strength = (torch.rand(n, device=device) for _ in range(3))
    return {
        "starts": starts.to(device, torch.int32),
        "features": torch.randint(0, latents, (n,), device=device, dtype=torch.int32),
        "targets": targets,
        "scales": scales,
        "strength": strength,
    }


def checks(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    found = Checks(OP, setting.seed)
    device = torch.device(setting.device)
    latents, rows = setting.pick((4096, 70), (4096, 70), (100, 5))
    for shape in setting.shapes:
        for dtype in DTYPES:
            for activation in ("relu", "jumprelu"):
                jump = activation == "jumprelu"
                options = {
                    **_autoencoder(shape, latents, dtype, device),
                    "decoder_bias": torch.randn(shape.d_model, device=device).to(dtype) * 0.1 if jump else None,
                    "threshold": torch.rand(latents, device=device).to(dtype) * 0.2 if jump else None,
                    "activation": activation,
                    "apply_decoder_bias_to_input": jump,
                    **_targets(rows, latents, device, uneven=True),
                }
                x = torch.randn(rows, shape.d_model, device=device, dtype=dtype)
                out = poisoned((len(options["features"]),), torch.float32, device)
                true_x, again = exact(x), x.clone()
                weights = ("encoder", "decoder", "encoder_bias", "decoder_bias", "threshold")
                wide = {n: exact(v) if n in weights and v is not None else v for n, v in options.items()}
                true = feature_clamp_reference(true_x, **wide)
                feature_clamp(x, out=out, **options)
                feature_clamp(again, **options)
                found.same(f"{shape.name}: {activation}", dtype, share=0.0, repeated=(again, x))
                found.close(f"{shape.name}: {activation}", dtype, x=(x, true_x), features=(out, true))
                yield from found.taken()


def timings(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    timer, device, dtype = Timer(setting), torch.device(setting.device), torch.bfloat16
    latents = setting.pick(32768, 32768, 200)
    for shape in setting.shapes:
        weights = _autoencoder(shape, latents, dtype, device)
        for rows in setting.pick((1, 64, 256), (1, 64), (3,)):
            row_bytes = shape.d_model * dtype.itemsize
            moved = rows * (2 * LATENTS + 2) * row_bytes
            runs = []
            for _ in range(timer.n_sets(moved)):
                options = {**weights, **_targets(rows, latents, device, uneven=False)}
                # The change is taken back towards 0, so that x stays what it is over many launches.
                options["targets"].zero_()
                x = torch.randn(rows, shape.d_model, device=device, dtype=dtype)
                runs.append(
                    lambda x=x, o=options: feature_clamp(
                        x, **o, decoder_bias=None, activation="relu", apply_decoder_bias_to_input=False
                    )
                )
            row = bounded(setting, timer.one(runs), byte_count=moved, flops=4 * rows * LATENTS * shape.d_model)
            yield "kernels", {"op": OP, "model": shape.name, "case": f"{rows} rows x {LATENTS} latents", **row}
