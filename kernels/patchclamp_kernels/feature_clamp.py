"""This op sets and scales latents of a sparse autoencoder by the exact change of the residual stream.

    f_i(x) = act((x - b_in)·E_i + c_i),   x' = x + Σ_i s_i (scale_i f_i(x) + target_i - f_i(x)) D_i

over the latents i of each row. All f_i are those of the row as it came in, so latents act together and their order does
not matter. The autoencoder never decodes the whole row: its reconstruction error stays out of the model.

E, D [F, d] are encoder and decoder with one row for each latent, c [F] is the encoder's bias; b_in is the decoder's
bias where the autoencoder was trained on centred inputs (`apply_decoder_bias_to_input`), else 0. act is ReLU, or
JumpReLU: relu(z) where z > threshold_i, else 0. The conventions are those of SAELens. x [T, d] is edited in place,
rounded once; products and sums are fp32. The latents of row t are [starts[t], starts[t + 1]) of `features`, `targets`,
`scales` and `strength`: scale 0 sets a latent, target 0 scales it.

The op is bound by bytes: 2 k d elements of E and D for the k latents of a row. One instance owns a row and keeps it in
registers, with what it adds; a block of latents' encoder and decoder rows is asked for together, so that the decoder's
are on the way while the products with the encoder's are summed. A row's bits do not depend on the other rows.

The server edits features inside the launch of residual_edits, by `activation` and `change_to_goal`: there they keep
their place among the other edits of a row, with scopes, gates and receipts, and g_i is clipped to [low, high] as well.
The op by itself is for hosts that have no program tables.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.runtime import accumulation_dtype, check, check_tensor, uses_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("relu", "jumprelu")
# Beyond this a row and a block of latents do not fit into registers.
MAX_WIDTH = 16384


def feature_clamp_reference(
    x: Tensor,
    *,
    encoder: Tensor,
    encoder_bias: Tensor,
    decoder: Tensor,
    decoder_bias: Tensor | None,
    activation: str,
    threshold: Tensor | None,
    starts: Tensor,
    features: Tensor,
    targets: Tensor,
    scales: Tensor,
    strength: Tensor,
    apply_decoder_bias_to_input: bool,
) -> Tensor:
    """Edits x in place; returns f before the edit, [n]."""
    wide = accumulation_dtype(x.dtype)
    n = int(starts[-1])
    row = torch.repeat_interleave(starts.diff().long())  # [n]
    latent = features[:n].long()
    original = x.to(wide)
    h = original[row]
    if apply_decoder_bias_to_input and decoder_bias is not None:
        h = h - decoder_bias.to(wide)
    before = (h * encoder[latent].to(wide)).sum(1) + encoder_bias[latent].to(wide)
    f = F.relu(before)
    if threshold is not None:
        f = torch.where(before > threshold[latent].to(wide), f, torch.zeros_like(f))
    change = strength[:n].to(wide) * (scales[:n].to(wide) * f + targets[:n].to(wide) - f)
    x.copy_(original.index_add_(0, row, change[:, None] * decoder[latent].to(wide)))
    return F.pad(f, (0, len(features) - n))


@triton.jit
def activation(before, bound):
    """Returns f: `before` where it is above its bound, else 0. A bound of 0 makes it ReLU, and a NaN is not hidden."""
    return tl.where(before <= bound, 0.0, before)


@triton.jit
def change_to_goal(f, scale, target, low, high):
    """Returns clip(scale f + target, low, high) - f."""
    goal = tl.maximum(scale * f + target, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(goal, high, propagate_nan=tl.PropagateNan.ALL) - f


@triton.jit
def _feature_clamp_kernel(
    x,
    encoder,
    encoder_bias,
    decoder,
    decoder_bias,
    threshold,
    starts,
    features,
    targets,
    scales,
    strength,
    values,
    d,
    CENTRED: tl.constexpr,
    JUMP: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    if first < end:
        columns = tl.arange(0, BLOCK_WIDTH)
        inside = columns < d
        x_row = x + row * d + columns
        h = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            h -= tl.load(decoder_bias + columns, mask=inside, other=0.0).to(tl.float32)
        added = tl.zeros([BLOCK_WIDTH], tl.float32)
        start = first
        while start < end:
            i = start + tl.arange(0, BLOCK_FEATURES)
            there = i < end
            feature = tl.load(features + i, mask=there, other=0)
            at = feature.to(tl.int64)[:, None] * d + columns[None, :]
            wanted = there[:, None] & inside[None, :]
            e = tl.load(encoder + at, mask=wanted, other=0.0)
            w = tl.load(decoder + at, mask=wanted, other=0.0)
            bias = tl.load(encoder_bias + feature, mask=there, other=0.0).to(tl.float32)
            target = tl.load(targets + i, mask=there, other=0.0)
            scale = tl.load(scales + i, mask=there, other=0.0)
            s = tl.load(strength + i, mask=there, other=0.0)
            before = tl.sum(e.to(tl.float32) * h[None, :], 1) + bias
            bound = tl.zeros([BLOCK_FEATURES], tl.float32)
            if JUMP:
                bound = tl.maximum(tl.load(threshold + feature, mask=there, other=0.0).to(tl.float32), 0.0)
            f = activation(before, bound)
            tl.store(values + i, f, mask=there)
            change = s * change_to_goal(f, scale, target, float("-inf"), float("inf"))
            added += tl.sum(change[:, None] * w.to(tl.float32), 0)
            start += BLOCK_FEATURES
        original = tl.load(x_row, mask=inside, other=0.0)
        tl.store(x_row, (original.to(tl.float32) + added).to(original.dtype), mask=inside)


def feature_clamp(
    x: Tensor,
    *,
    encoder: Tensor,
    encoder_bias: Tensor,
    decoder: Tensor,
    decoder_bias: Tensor | None,
    activation: str,
    threshold: Tensor | None = None,
    starts: Tensor,
    features: Tensor,
    targets: Tensor,
    scales: Tensor,
    strength: Tensor,
    apply_decoder_bias_to_input: bool,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Edits x [T, d] in place, as in the module docstring; returns f before the edit, float32 [n] (`out` if given).

    encoder, decoder [F, d] of one dtype, biases [F] and [d], threshold [F] of a float dtype each; starts int32 [T + 1]
    ascending from 0 to at most n, features int32 [n] below F; targets, scales, strength float32 [n]. Values beyond
    starts[T] are undefined. The contents of starts and features are trusted, because no kernel can refuse. Raises
    ValueError for a wrong argument.
    """
    device = x.device
    check_tensor("x", x, shape=(None, None), dtypes=DTYPES, device=device)
    rows, d = x.shape
    check(d <= MAX_WIDTH, f"x has {d} columns, more than {MAX_WIDTH}")
    check_tensor("encoder", encoder, shape=(None, d), dtypes=DTYPES, device=device)
    n_latents = encoder.shape[0]
    check_tensor("encoder_bias", encoder_bias, shape=(n_latents,), dtypes=DTYPES, device=device)
    check_tensor("decoder", decoder, shape=(n_latents, d), dtypes=(encoder.dtype,), device=device)
    if decoder_bias is not None:
        check_tensor("decoder_bias", decoder_bias, shape=(d,), dtypes=DTYPES, device=device)
    check(
        decoder_bias is not None or not apply_decoder_bias_to_input,
        "apply_decoder_bias_to_input needs decoder_bias, which is None",
    )
    check(activation in ACTIVATIONS, f"activation is {activation!r}, not one of {', '.join(ACTIVATIONS)}")
    check((threshold is not None) == (activation == "jumprelu"), "threshold belongs to jumprelu, which needs it")
    if threshold is not None:
        check_tensor("threshold", threshold, shape=(n_latents,), dtypes=DTYPES, device=device)
    check_tensor("starts", starts, shape=(rows + 1,), dtypes=(torch.int32,), device=device)
    check_tensor("features", features, shape=(None,), dtypes=(torch.int32,), device=device)
    n = features.shape[0]
    for name, numbers in (("targets", targets), ("scales", scales), ("strength", strength)):
        check_tensor(name, numbers, shape=(n,), dtypes=(torch.float32,), device=device)
    if out is None:
        out = torch.empty(n, dtype=torch.float32, device=device)
    check_tensor("out", out, shape=(n,), dtypes=(torch.float32,), device=device)
    if not uses_kernel(x):
        values = feature_clamp_reference(
            x,
            encoder=encoder,
            encoder_bias=encoder_bias,
            decoder=decoder,
            decoder_bias=decoder_bias,
            activation=activation,
            threshold=threshold,
            starts=starts,
            features=features,
            targets=targets,
            scales=scales,
            strength=strength,
            apply_decoder_bias_to_input=apply_decoder_bias_to_input,
        )
        return out.copy_(values)
    if rows == 0 or n == 0 or d == 0:
        return out
    config = config or config_for("feature_clamp", f"d={d}", _default(d), device)
    _feature_clamp_kernel[(rows,)](
        x,
        encoder,
        encoder_bias,
        decoder,
        decoder_bias if apply_decoder_bias_to_input else None,
        threshold,
        starts,
        features,
        targets,
        scales,
        strength,
        out,
        d,
        CENTRED=apply_decoder_bias_to_input,
        JUMP=activation == "jumprelu",
        BLOCK_WIDTH=triton.next_power_of_2(d),
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _default(d: int) -> Config:
    """Keeps about 64 kB of bf16 encoder and decoder in flight: more latents at once would not fit into registers."""
    width = triton.next_power_of_2(d)
    return Config(
        {"BLOCK_FEATURES": max(1, min(16, 16384 // width))}, num_warps=8 if width <= 4096 else 16, num_stages=1
    )


def compile_cases() -> list[CompileCase]:
    cases = []
    for d, jump, weights in [(d, j, w) for d in (4096, 2048) for j in (False, True) for w in ("bf16", "fp32")]:
        signature = {
            "x": "*bf16",
            **dict.fromkeys(("encoder", "encoder_bias", "decoder"), f"*{weights}"),
            **dict.fromkeys(("starts", "features"), "*i32"),
            **dict.fromkeys(("targets", "scales", "strength", "values"), "*fp32"),
            "d": "i32",
        }
        constexprs: dict[str, int | None] = {"CENTRED": jump, "JUMP": jump, "BLOCK_WIDTH": d, **_default(d).blocks}
        if jump:
            signature |= {"decoder_bias": f"*{weights}", "threshold": f"*{weights}"}
        else:
            constexprs |= {"decoder_bias": None, "threshold": None}
        name = f"feature_clamp d={d} {weights} " + ("jumprelu, centred" if jump else "relu")
        cases.append(CompileCase(name, _feature_clamp_kernel, signature, constexprs, _default(d), ("d",)))
    return cases


def tuning_cases(device: torch.device) -> list[TuningCase]:
    """Tunes decoding of 64 requests with 64 latents each."""
    cases = []
    n_latents, rows, k = 16384, 64, 64
    for d in (4096, 2048):
        x = torch.randn((rows, d), device=device).bfloat16()
        weights = torch.randn((256, d), device=device).bfloat16().repeat(n_latents // 256, 1)
        bias = weights[:, 0].contiguous()
        features = torch.randint(n_latents, (rows * k,), dtype=torch.int32, device=device)
        numbers = torch.zeros(rows * k, device=device)
        starts = torch.arange(0, rows * k + 1, k, dtype=torch.int32, device=device)

        def run(
            config: Config,
            x: Tensor = x,
            weights: Tensor = weights,
            bias: Tensor = bias,
            features: Tensor = features,
            numbers: Tensor = numbers,
            starts: Tensor = starts,
        ) -> object:
            return feature_clamp(
                x,
                encoder=weights,
                encoder_bias=bias,
                decoder=weights,
                decoder_bias=None,
                activation="relu",
                starts=starts,
                features=features,
                targets=numbers,
                scales=numbers,
                strength=numbers,
                apply_decoder_bias_to_input=False,
                config=config,
            )

        candidates = tuple(
            Config({"BLOCK_FEATURES": block}, num_warps=warps, num_stages=1)
            for block in (1, 2, 4, 8)
            for warps in (4, 8, 16)
        )
        cases.append(TuningCase("feature_clamp", f"d={d}", candidates, run))
    return cases
