"""A second, naive implementation of what the suite of recorded numbers checks.

Written from the paper's formulas with dense tensors and autograd, and without any code of the
project. Sizes and ids are those of `tests.naive_recordings`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

V, MASK = 53, 7
LAYERS, HEADS, WIDTH, FFN, POSITIONS = 4, 2, 24, 40, 32

TokenIds = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Noised ids, clean ids, log-SNRs; one shape."""


def alpha_of(log_snr: Tensor) -> Tensor:
    return torch.sigmoid(log_snr.clamp(-9, 9))


def pi_of(log_snr: Tensor, b: float, a: float, size: int = V, mask: int = MASK) -> Tensor:
    share = torch.sigmoid(a * log_snr + b)[..., None]
    pi = share / (size - 1) * torch.ones(size, dtype=log_snr.dtype)
    pi[..., mask] = 1 - share[..., 0]
    return pi


def pi_prime_of(log_snr: Tensor, b: float, a: float, size: int = V, mask: int = MASK) -> Tensor:
    share = torch.sigmoid(a * log_snr + b)
    slope = (a * share * (1 - share))[..., None]
    out = slope * (1 / (size - 1)) * torch.ones(size, dtype=log_snr.dtype)
    out[..., mask] = -slope[..., 0]
    return out


def weights_of(
    log_snr: Tensor, z: Tensor, x: Tensor, b: float, a: float, size: int = V, mask: int = MASK
) -> tuple[Tensor, Tensor, Tensor]:
    """(pi at z, loss weight, ELBO weight); `log_snr`, `z` and `x` of one shape."""
    pi = pi_of(log_snr, b, a, size, mask).gather(-1, z[..., None])[..., 0]
    slope = pi_prime_of(log_snr, b, a, size, mask).gather(-1, z[..., None])[..., 0]
    raw = (pi - slope) / (pi + torch.where(z == x, log_snr.exp(), 0.0)).clamp_min(1e-8)
    density = torch.sigmoid(log_snr) * (1 - torch.sigmoid(log_snr))
    return pi, raw.clamp(0, 1e3), (raw / density.clamp_min(1e-12)).clamp(0, 1e6)


def loss_of(
    logits: Tensor,
    ids: tuple[Tensor, Tensor, Tensor],
    b: float,
    a: float,
    beta_is: float = 1.0,
    size: int = V,
    mask: int = MASK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-token (loss, elbo, weighted KL, weighted IS) by the definition."""
    z, x, log_snr = ids
    logits = logits.clone()
    logits[..., mask] = -1e6
    shares = torch.log_softmax(logits, -1).exp()
    alpha = alpha_of(log_snr)[..., None]
    noise = (1 - alpha) * pi_of(log_snr, b, a, size, mask)
    q = alpha * torch.nn.functional.one_hot(x, size).to(logits.dtype) + noise
    p = alpha * shares + noise
    tiny = torch.finfo(logits.dtype).tiny
    log_q = torch.where(q > 0, q, tiny).log()
    log_p = torch.where(p > 0, p, tiny).log()
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    q_z, p_z, log_q_z, log_p_z = (t.gather(-1, z[..., None])[..., 0] for t in (q, p, log_q, log_p))
    is_div = q_z / (p_z + 1e-12) - (log_q_z - log_p_z) - 1
    _, w, w_elbo = weights_of(log_snr, z, x, b, a, size, mask)
    return w * (kl + beta_is * is_div), w_elbo * (kl + is_div), w * kl, w * is_div


def random_tokens(
    numbers: np.random.Generator,
    shape: tuple[int, ...],
    size: int = V,
    mask: int = MASK,
    *,
    masked_only: bool = False,
) -> TokenIds:
    """Each token is kept, masked or moved with some probability."""
    x = numbers.integers(0, size - 1, shape)
    x += x >= mask
    moved = numbers.integers(0, size, shape)
    kind = numbers.random(shape)
    z = np.where(kind < 0.3, x, np.where((kind < 0.7) | masked_only, mask, moved))
    return z, x, numbers.uniform(-8, 8, shape).astype(np.float32)


def as_tensors(ids: TokenIds, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    z, x, log_snr = (torch.from_numpy(values) for values in ids)
    return z, x, log_snr.to(dtype)


def laprop(
    p: np.ndarray,
    grads: np.ndarray,
    lrs: np.ndarray,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> Iterator[tuple[Any, Any, Any]]:
    """(p, mu, nu) after every step, float64."""
    p, mu, nu = p.astype(np.float64), 0.0, 0.0
    for t, (g, lr) in enumerate(zip(grads.astype(np.float64), lrs, strict=True), start=1):
        n1, n2 = ((1 - beta) / (1 - beta**t) for beta in betas)
        nu = (1 - n2) * nu + n2 * g**2
        mu = (1 - n1) * mu + n1 * g / (np.sqrt(nu) + eps)
        p = p - lr * (mu + decay * p)
        yield p, mu, nu


def learning_rate(step: int, base: float, total: int, warmup: int, cooldown: int) -> float:
    if cooldown and step >= total - cooldown:
        return base * (1 - math.sqrt(min(step - (total - cooldown), cooldown) / cooldown))
    return base * step / warmup if step < warmup else base


def label_of(name: str) -> str:
    """Optimizer group of a published tensor."""
    if "norm" in name:
        return "ln_params"
    if "embed_tokens" in name or "lm_head" in name:
        return "emb_unemb_params"
    return "bias_params" if "bias" in name else "bulk_params"


def model_config() -> dict[str, Any]:
    return {
        "weight_scaling": 1.0,
        "resid_scale": 3.0,
        "attn_soft_cap": 20.0,
        "rms_norm_eps": 1e-5,
        "use_qk_norm": True,
        "rope_theta": 5000.0,
        "is_causal": False,
        "tie_word_embeddings": False,
        "vocab_size": V,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "head_scaling": 5.0,
        "attention_bias": True,
        "mlp_bias": True,
    }


def random_weights(numbers: np.random.Generator) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, WIDTH),
        "lm_head.weight": (V, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    layer: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{x}_proj.weight": (WIDTH, WIDTH) for x in "qkvo"},
        **{f"self_attn.{x}_norm.weight": (WIDTH,) for x in "qk"},
        **{f"self_attn.{x}_bias": (HEADS, WIDTH // HEADS) for x in "kv"},
        "attn_layernorm.weight": (WIDTH,),
        "mlp_layernorm.weight": (WIDTH,),
        "mlp.up_proj.weight": (FFN, WIDTH),
        "mlp.up_proj.bias": (FFN,),
        "mlp.down_proj.weight": (WIDTH, FFN),
        "mlp.down_proj.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {
        name: torch.from_numpy(numbers.standard_normal(shape).astype(np.float32))
        * (0.2 if len(shape) > 1 else 0.1)
        for name, shape in shapes.items()
    }


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((1 + weight.float()) * wide * scale).to(x.dtype)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """`x` [b, s, a, d]."""
    half = x.shape[-1] // 2
    angle = positions.float()[:, None] / theta ** (torch.arange(half).float() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.float()[..., :half], x.float()[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def attention(x: Tensor, at: dict[str, Tensor], mask: Tensor, positions: Tensor) -> Tensor:
    c = model_config()
    q, k, v = (x @ at[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    q = rms_norm(q, at["self_attn.q_norm.weight"], c["rms_norm_eps"])
    k = rms_norm(k, at["self_attn.k_norm.weight"], c["rms_norm_eps"])
    q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (q, k, v))
    q, k = (rotate(t, positions, c["rope_theta"]) for t in (q, k))
    extra = [at[f"self_attn.{name}_bias"].expand(len(x), 1, -1, -1) for name in "kv"]
    k, v = torch.cat([extra[0], k], 1), torch.cat([extra[1], v], 1)
    scores = torch.einsum("bqad,bkad->baqk", q, k) / math.sqrt(WIDTH // HEADS)
    scores = c["attn_soft_cap"] * torch.tanh(scores / c["attn_soft_cap"])
    seen = torch.nn.functional.pad(mask, (1, 0), value=True)[:, None]
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    attended = torch.einsum("baqk,bkad->bqad", scores.float().softmax(-1).to(v.dtype), v)
    return attended.flatten(2) @ at["self_attn.o_proj.weight"].T


def forward(
    weights: dict[str, Tensor], ids: Tensor, mask: Tensor, positions: Tensor | None = None
) -> dict[str, Tensor]:
    """embed, layer_out, final_norm and logits of the published architecture; `mask` [b, s, s]."""
    c = model_config()
    eps, scale = c["rms_norm_eps"], c["resid_scale"] / LAYERS
    positions = torch.arange(ids.shape[1]) if positions is None else positions
    h = embed = weights["model.embed_tokens.weight"][ids]
    layers = []
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        at = {k[len(prefix) :]: x for k, x in weights.items() if k.startswith(prefix)}
        x = rms_norm(h, at["attn_layernorm.weight"], eps)
        h = h + scale * attention(x, at, mask, positions)
        x = rms_norm(h, at["mlp_layernorm.weight"], eps)
        x = torch.relu(x @ at["mlp.up_proj.weight"].T + at["mlp.up_proj.bias"]).square()
        h = h + scale * (x @ at["mlp.down_proj.weight"].T + at["mlp.down_proj.bias"])
        layers.append(h)
    last = rms_norm(h, weights["model.norm.weight"], eps)
    logits = (last @ weights["lm_head.weight"].T) * c["head_scaling"]
    return {"embed": embed, "layer_out": torch.stack(layers), "final_norm": last, "logits": logits}
