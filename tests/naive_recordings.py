"""Numbers of `tests.naive` in the format of tests/golden/dev.

Vocabulary, mask id, shifts, scales, model shape, batch, lengths and numbers of steps and cases all
differ from those files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import naive
from tests.naive import MASK, V

SHIFT_SCALE = ((-1.5, 0.5), (0.5, 1.0), (-1000.0, 1.0))
LARGE_V = 500
INPUTS = ("input_ids", "labels", "log_snr")


def _save(path: Path, entries: dict[str, Any]) -> None:
    np.savez(path, **{name: np.asarray(value) for name, value in entries.items()})


def record_schedule(folder: Path) -> None:
    log_snr = torch.linspace(-9.5, 9.5, 23)
    pairs = torch.tensor([[MASK, 11], [11, 11], [12, 11], [0, 1]])
    entries: dict[str, Any] = {
        "vocab_size": V,
        "mask_id": MASK,
        "log_snr": log_snr,
        "pairs": pairs.int(),
        f"V{LARGE_V}_pairs": pairs.int(),
        "shift_scale": np.array(SHIFT_SCALE, np.float32),
    }
    grid = log_snr[:, None].expand(-1, len(pairs))
    z, x = (column.expand(len(log_snr), -1) for column in pairs.T)
    alpha, signal = naive.alpha_of(log_snr), torch.sigmoid(log_snr)
    onehot = torch.nn.functional.one_hot(torch.tensor(11), V)
    for k, (b, a) in enumerate(SHIFT_SCALE):
        pi, pi_prime = naive.pi_of(log_snr, b, a), naive.pi_prime_of(log_snr, b, a)
        entries |= {
            f"alpha_{k}": alpha,
            f"pi_{k}": pi,
            f"pi_prime_{k}": pi_prime,
            f"p_log_snr_{k}": signal * (1 - signal),
            f"pi_prime_at_{k}": pi_prime[:, pairs[:, 0]],
            f"marginal_probs_label11_{k}": alpha[:, None] * onehot + (1 - alpha)[:, None] * pi,
        }
        for prefix, size in (("", V), (f"V{LARGE_V}_", LARGE_V)):
            values = naive.weights_of(grid, z, x, b, a, size)
            for name, value in zip(("pi_at", "loss_weights", "elbo_weights"), values, strict=True):
                entries[f"{prefix}{name}_{k}"] = value
    time = torch.linspace(0.001, 0.999, 9)
    entries["time"] = time
    entries["log_snr_from_time"] = ((1 - time) / time).log().clamp(-9, 9)
    entries["time_from_log_snr"] = 1 - alpha
    _save(folder / "schedule.npz", entries)


def _loss_case(
    logits: np.ndarray, ids: naive.TokenIds, b: float, a: float, beta_is: float, size: int
) -> dict[str, np.ndarray]:
    """Inputs, outputs in float32 and the float64 truth, with gradients."""
    case = {**dict(zip(INPUTS, ids, strict=True)), "beta_is_div": np.float32(beta_is)}
    for prefix, dtype in (("", torch.float32), ("truth64_", torch.float64)):
        leaf = torch.from_numpy(logits).to(dtype).requires_grad_()
        results = naive.loss_of(leaf, naive.as_tensors(ids, dtype), b, a, beta_is, size)
        (grad,) = torch.autograd.grad(results[0].sum(), leaf)
        for name, value in zip(("loss", "elbo", "kl_loss", "is_loss"), results, strict=True):
            case[prefix + name] = value.detach().numpy()
        case[prefix + "grad"] = grad.numpy()
    return case


def record_losses(folder: Path, numbers: np.random.Generator) -> None:
    for k, (b, a) in enumerate(SHIFT_SCALE):
        entries: dict[str, Any] = {"vocab_size": V, "mask_id": MASK, "shift": b, "scale": a}
        for i, (shape, beta_is) in enumerate((((2, 5), 1.0), ((1, 9), 0.7))):
            ids = naive.random_tokens(numbers, shape, masked_only=b < -100)
            logits = numbers.standard_normal((*shape, V), dtype=np.float32) * 2
            case = _loss_case(logits, ids, b, a, beta_is, V) | {"logits": logits}
            entries |= {f"s{i}_{name}": value for name, value in case.items()}
        _save(folder / f"loss_{k}.npz", entries)
    entries = {}
    for i, b in enumerate((-1000.0, 0.5)):
        case = _large_case(numbers, b, seed=40 + i)
        entries |= {f"b{i}_{name}": value for name, value in case.items()}
    _save(folder / f"loss_V{LARGE_V}.npz", entries)


def _large_case(numbers: np.random.Generator, b: float, seed: int) -> dict[str, Any]:
    """Logits by their seed, gradients at some columns."""
    z, x, log_snr = naive.random_tokens(numbers, (4,), LARGE_V, masked_only=b < -100)
    z[0] = MASK
    logits = np.random.default_rng(seed).standard_normal((4, LARGE_V), dtype=np.float32) * 2
    boost = np.array([0, 5, 9, 2], np.float32)
    logits[np.arange(4), x] += boost
    case: dict[str, Any] = _loss_case(logits, (z, x, log_snr), b, 1.0, 1.0, LARGE_V)
    at = np.arange(0, LARGE_V, 17)
    for prefix in ("", "truth64_"):
        grad = case.pop(f"{prefix}grad")
        case[f"{prefix}grad_at_idx"] = grad[:, at]
        case[f"{prefix}grad_l2"] = np.linalg.norm(grad.astype(np.float64), axis=-1)
    digest = hashlib.sha256(logits.tobytes()).digest()
    return case | {
        "shift": b,
        "seed": seed,
        "boost": boost,
        "grad_idx": at,
        "logits_first8": logits[:, :8],
        "logits_sha256": np.frombuffer(digest, np.uint8),
    }


def record_aggregation(folder: Path, numbers: np.random.Generator) -> None:
    shape = (5, 6)
    ids = naive.random_tokens(numbers, shape)
    logits = numbers.standard_normal((*shape, V), dtype=np.float32)
    noised = numbers.random(shape) < 0.6
    results = naive.loss_of(torch.from_numpy(logits), naive.as_tensors(ids), 0.0, 1.0)
    loss, elbo, kl, is_div = (float(x.double().numpy()[noised].sum()) for x in results)
    count = int(noised.sum())
    entries: dict[str, Any] = dict(zip(INPUTS, ids, strict=True))
    entries |= {"vocab_size": V, "mask_id": MASK, "logits": logits, "noise_mask": noised}
    for kind, value in (("sum", loss), ("mean", loss / count)):
        entries |= {
            f"{kind}_loss_scale": 0.25,
            f"{kind}_returned_loss": 0.25 * value,
            f"{kind}_metrics_loss": value,
            f"{kind}_metric_elbo": elbo / count,
            f"{kind}_metric_kl_loss": kl / count,
            f"{kind}_metric_is_loss": is_div / count,
            f"{kind}_metric_num_tokens": count,
        }
    _save(folder / "loss_aggregation.npz", entries)


def record_optimizer(folder: Path, numbers: np.random.Generator) -> None:
    entries: dict[str, Any] = {}
    steps, betas = 7, (0.8, 0.95)
    for c, (eps, decay) in enumerate(((1e-9, 0.0), (1e-3, 0.2))):
        lrs = np.linspace(0, 0.1, steps)
        case: dict[str, Any] = {"b1": betas[0], "b2": betas[1], "eps": eps, "dtype": "f32"}
        case |= {"weight_decay": decay, "lr": lrs}
        for name, shape in (("u", (2, 3)), ("v", (4,)), ("w", (1, 1, 2))):
            p = numbers.standard_normal(shape, dtype=np.float32)
            grads = numbers.standard_normal((steps, *shape), dtype=np.float32)
            run = zip(*naive.laprop(p, grads, lrs, betas, eps, decay), strict=True)
            case |= {f"p0_{name}": p, f"grads_{name}": grads}
            for what, values in zip(("params", "mu", "nu"), run, strict=True):
                case[f"{what}_{name}"] = np.stack(values).astype(np.float32)
        entries |= {f"c{c}_{name}": value for name, value in case.items()}
    _save(folder / "laprop.npz", entries)
    schedules = [
        {
            "total_steps": total,
            "base_lr": lr,
            "warmup_steps": warmup,
            "cooldown_steps": cooldown,
            "values": [naive.learning_rate(k, lr, total, warmup, cooldown) for k in range(total)],
        }
        for lr, total, warmup, cooldown in ((0.7, 30, 4, 9), (0.01, 12, 0, 0), (1.0, 10, 6, 8))
    ]
    (folder / "wsd_schedule.json").write_text(json.dumps(schedules))


def record_noise(folder: Path, numbers: np.random.Generator) -> None:
    rows, length = 5, 13
    noised = np.arange(length) >= np.array([0, 1, 6, 12, 13])[:, None]
    attention = noised[:, :, None] >= noised[:, None, :]
    causal = attention & (np.tri(length, dtype=bool) | noised[:, :, None])
    levels = numbers.standard_normal((rows, length)).astype(np.float32)
    levels[2:] = levels[2:, :1]
    before = np.tile(np.arange(200, 200 + length), (rows, 1)).astype(np.int32)
    after = np.stack([np.insert(row, [2, 5, 5], 9)[:length] for row in before])
    entries = {
        "prompt_noise_mask": noised,
        "prompt_attn_mask": attention,
        "prompt_causal_noise_mask": noised,
        "prompt_causal_attn_mask": causal,
        "prompt_infill_noise_mask": noised & (numbers.random((rows, length)) < 0.5),
        "prompt_infill_attn_mask": attention,
        "log_snr_p_ind_0.3": levels,
        "empty_in": before,
        "empty_out_pad9": after,
    }
    _save(folder / "noise_masks.npz", entries)


def record_model(folder: Path, weights: dict[str, Tensor], numbers: np.random.Generator) -> None:
    rows, length = 2, 11
    ids = torch.from_numpy(numbers.integers(0, V, (rows, length)))
    noised = torch.arange(length) >= torch.tensor([[4], [0]])
    masks = {
        "full": torch.ones(rows, length, dtype=torch.bool),
        "keypad": torch.arange(length) < torch.tensor([[11], [7]]),
        "prompt": noised[:, :, None] >= noised[:, None, :],
    }
    entries = {"input_ids": ids, **{f"mask_{kind}": mask for kind, mask in masks.items()}}
    for kind, mask in masks.items():
        square = mask if mask.dim() == 3 else mask[:, None].expand(-1, length, -1)
        outputs = naive.forward(weights, ids, square)
        entries |= {f"{kind}_{name}": value for name, value in outputs.items()}
    positions = torch.arange(length) + torch.arange(length) // 3
    shifted = naive.forward(weights, ids, masks["prompt"], positions)["logits"]
    entries |= {"position_ids_gaps": positions.expand(rows, -1), "gaps_logits": shifted}
    half = {name: x if "norm" in name else x.bfloat16() for name, x in weights.items()}
    entries["bf16_prompt_logits"] = naive.forward(half, ids, masks["prompt"])["logits"].float()
    _save(folder / "model_C_io.npz", entries)
    save_file(weights, folder / "model_C.safetensors")
    (folder / "model_C_config.json").write_text(json.dumps(naive.model_config()))


OPTIMIZER = {
    "lr": 0.2,
    "aux_lr": 0.004,
    "hidden_size": naive.WIDTH,
    "num_layers": naive.LAYERS,
    "total_steps": 6,
    "warmup_steps": 1,
    "cooldown_steps": 2,
    "weight_decay": 0.003,
    "ln_wd": 0.01,
    "bias_wd": 0.02,
    "adam_eps": 1e-8,
    "beta1": 0.9,
    "beta2": 0.97,
}


def _updated(name: str, start: Tensor, grads: list[np.ndarray]) -> Tensor:
    """A parameter after LaProp steps with these gradients, from the start."""
    kind, o = naive.label_of(name), OPTIMIZER
    lr = o["lr"] / naive.WIDTH if kind == "bulk_params" else o["aux_lr"]
    decay = {
        "bulk_params": o["weight_decay"] * naive.WIDTH,
        "ln_params": o["ln_wd"],
        "bias_params": o["bias_wd"],
        "emb_unemb_params": 0.0,
    }[kind]
    shape = (int(o["total_steps"]), int(o["warmup_steps"]), int(o["cooldown_steps"]))
    lrs = np.array([naive.learning_rate(k, lr, *shape) for k in range(len(grads))])
    eps = o["adam_eps"] / (naive.WIDTH * naive.LAYERS)
    betas = (o["beta1"], o["beta2"])
    *_, (p, _, _) = naive.laprop(start.numpy(), np.stack(grads), lrs, betas, eps, decay)
    return torch.from_numpy(p).float()


def record_training(folder: Path, weights: dict[str, Tensor], numbers: np.random.Generator) -> None:
    """Optimizer steps of the model with the dense loss, autograd and LaProp in float64."""
    num_steps, b, a = 5, 0.5, 0.5
    noised = np.arange(7) >= numbers.integers(0, 4, (num_steps, 3, 1))
    current = weights
    history: dict[str, list[np.ndarray]] = {name: [] for name in weights}
    data, out = [], []
    for mask in noised:
        z, x, log_snr = naive.random_tokens(numbers, mask.shape)
        data.append((np.where(mask, z, x), x, log_snr))
        level = torch.from_numpy(mask)
        leaves = {name: p.clone().requires_grad_() for name, p in current.items()}
        ids = naive.as_tensors(data[-1])
        logits = naive.forward(leaves, ids[0], level[:, :, None] >= level[:, None, :])["logits"]
        sums = [(t * level).sum() for t in naive.loss_of(logits, ids, b, a)]
        for name, grad in zip(
            leaves, torch.autograd.grad(sums[0], list(leaves.values())), strict=True
        ):
            history[name].append(grad.numpy())
        count = level.sum().item()
        out.append([sums[0].item(), *(t.item() / count for t in sums[1:]), count])
        current = {name: _updated(name, weights[name], history[name]) for name in weights}
    entries: dict[str, Any] = {"vocab_size": V, "mask_id": MASK, "shift": b, "scale": a}
    entries |= {name: np.stack([ids[i] for ids in data]) for i, name in enumerate(INPUTS)}
    entries |= {f"opt_{name}": np.float64(value) for name, value in OPTIMIZER.items()}
    entries["noise_mask"] = noised
    names = ("loss", "elbo", "kl_loss", "is_loss", "num_tokens")
    entries |= dict(zip(names, np.array(out).T, strict=True))
    _save(folder / "e2e_train.npz", entries)
    first = {name: torch.from_numpy(grads[0]) for name, grads in history.items()}
    save_file(first, folder / "e2e_grads_step0.safetensors")
    save_file(current, folder / "e2e_params_final.safetensors")
    labels = {name: naive.label_of(name) for name in weights}
    (folder / "param_labels.json").write_text(json.dumps(labels))


def record(folder: Path) -> None:
    """Write every file that the suite checks."""
    numbers = np.random.default_rng(11)
    record_schedule(folder)
    record_losses(folder, numbers)
    record_aggregation(folder, numbers)
    record_optimizer(folder, numbers)
    record_noise(folder, numbers)
    weights = naive.random_weights(numbers)
    record_model(folder, weights, numbers)
    record_training(folder, weights, numbers)
