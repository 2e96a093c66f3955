"""`generate` of the Hugging Face model: its arguments, and the model as the sampler's denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from .sampling_gidd import SpecialTokens, Step, sample
from .steps_gidd import SamplingConfig


class CachedDenoiser:
    """A Hugging Face model as a `Denoiser`; `use_cache=False` runs the prefix in every step."""

    def __init__(self, model: Any, *, use_cache: bool = True) -> None:
        self.model, self.use_cache = model, use_cache
        self.prefix: tuple[Tensor, Tensor] | None = None
        self.key_values: Any = None

    def begin_block(self, ids: Tensor, positions: Tensor, is_token: Tensor | None) -> None:
        self.prefix, self.key_values = (ids, positions), None
        if self.use_cache and ids.shape[1]:
            self.key_values = self.model.model(ids, is_token, positions).key_values

    def logits(
        self, ids: Tensor, positions: Tensor, is_token: Tensor | None, num_active: int
    ) -> Tensor:
        assert self.prefix is not None, "begin_block comes first"
        num_prefix = self.prefix[0].shape[1]
        if self.key_values is not None or not num_prefix:
            output = self.model.model(ids, is_token, positions, self.key_values)
            hidden = output.last_hidden_state[:, :num_active]
            return self.model.logits(hidden)
        ids, positions = (
            torch.cat(pair, dim=1) for pair in zip(self.prefix, (ids, positions), strict=True)
        )
        is_noised = torch.arange(ids.shape[1], device=ids.device) >= num_prefix
        mask = (is_noised[:, None] >= is_noised).expand(len(ids), -1, -1)
        if is_token is not None:
            mask = mask & is_token.unsqueeze(1)
        hidden = self.model.model(ids, mask, positions).last_hidden_state
        return self.model.logits(hidden[:, num_prefix : num_prefix + num_active])


PUBLISHED_IDS = {"bos": 0, "eos": 1, "pad": 2, "mask": 3}
"""Special tokens of the published tokenizer."""


def special_id(config: Any, name: str, given: int | None = None) -> int:
    """The id of a special token: as given, else the configuration's, else the published one."""
    configured = getattr(config, f"{name}_token_id", None)
    chosen = configured if given is None else given
    return PUBLISHED_IDS[name] if chosen is None else chosen


class GiddGenerationMixin(GenerationMixin):
    """`generate` with the published arguments; the base class loads generation_config.json."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        max_length: int = 2048,
        min_length: int = 0,
        temperature: float = 1.0,
        block_length: int = 128,
        steps: int = 128,
        top_p: float | None = None,
        top_k: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        mask_token_id: int | None = None,
        sampling_method: str = "ancestral",
        noise_schedule: str | Callable[[float], float] = "cosine",
        tokens_per_step: int = 1,
        show_progress: bool = False,
        *,
        attention_mask: Tensor | None = None,
        seed: int | None = None,
        rows: Sequence[int] | None = None,
        mode: Literal["canvas", "window"] = "canvas",
        look_ahead: int = 0,
        correction_steps: int = 0,
        use_cache: bool = True,
        observer: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Continue `inputs` [b, p] by up to `max_length` new tokens.

        `attention_mask` [b, p] marks padding in front of shorter prompts. Without inputs a
        sequence begins with BOS. Without a seed, one is drawn from torch's generator; `rows` are
        the numbers under which the sequences draw, 0 to b - 1 when absent. Special ids that are
        not given are those of `generation_config`, else the configuration's, else the published
        0, 1, 2 and 3.
        """
        model: Any = self
        bos_token_id, eos_token_id, pad_token_id, mask_token_id = (
            special_id(model.config, name, self._configured_id(name) if given is None else given)
            for name, given in (
                ("bos", bos_token_id), ("eos", eos_token_id), ("pad", pad_token_id),
                ("mask", mask_token_id),
            )
        )  # fmt: skip
        if inputs is None:
            inputs = torch.tensor([[bos_token_id]], device=model.device)
        if attention_mask is None:
            prompts = inputs.tolist()
        else:
            prompts = [
                row[keep.bool()].tolist() for row, keep in zip(inputs, attention_mask, strict=True)
            ]
        config = SamplingConfig(
            method=sampling_method, max_length=max_length, min_length=min_length,
            block_length=block_length, steps=steps, tokens_per_step=tokens_per_step,
            correction_steps=correction_steps, temperature=temperature, top_p=top_p, top_k=top_k,
            grid=noise_schedule, mode=mode, look_ahead=look_ahead,
            seed=int(torch.randint(2**62, ())) if seed is None else seed,
        )  # type: ignore[arg-type]  # fmt: skip
        output = sample(
            CachedDenoiser(self, use_cache=use_cache),
            model.mixing_schedule(mask_token_id),
            prompts,
            model.config.max_position_embeddings,
            config,
            SpecialTokens(eos_token_id, pad_token_id),
            rows=rows,
            prior=self._sample_prior(len(prompts), mask_token_id),
            device=model.device,
            observer=observer,
            progress=_bar if show_progress else iter,
        )
        in_front = inputs.shape[1] - max(map(len, prompts))
        return nn.functional.pad(output, (in_front, 0), value=pad_token_id)

    def _configured_id(self, name: str) -> int | None:
        """A special id of `generation_config`; `ValueError` where it has several."""
        found = getattr(self.generation_config, f"{name}_token_id", None)
        if isinstance(found, list | tuple):
            raise ValueError(
                f"{name}_token_id of the generation configuration is {found}: give one id."
            )
        return found

    def _sample_prior(self, batch_size: int, mask_token_id: int) -> Tensor | None:
        """Noise [b, context] to begin from; None draws it from the seed."""
        del batch_size, mask_token_id


def _bar(steps: Iterable[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(steps, desc="denoise", unit="step")
