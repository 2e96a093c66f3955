"""Two integers per position stand for the reference's [s, s] attention mask."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megatron_ext.config import NoiseConfig
from megatron_ext.diffusion import MixingSchedule
from megatron_ext.diffusion.noising import noise_sequence
from megatron_ext.diffusion.visibility import attention_mask_from_visibility

LENGTH = 12
SCHEDULE = MixingSchedule(11, 3, 0.0)
TOKENS = np.arange(LENGTH) % 3 + 4
DOCUMENTS = np.repeat([5, 6, 9], [3, 5, 4])


def _expected(
    noise: np.ndarray, documents: np.ndarray | None, causal: bool, causal_prompt: bool
) -> list[list[bool]]:
    """One query and key at a time: noise[q] >= noise[k], same document, and the two orders."""

    def sees(q: int, k: int) -> bool:
        hidden = noise[k] and not noise[q]
        hidden |= documents is not None and documents[q] != documents[k]
        hidden |= k > q and (causal or (causal_prompt and not noise[q]))
        return not hidden

    return [[sees(q, k) for k in range(LENGTH)] for q in range(LENGTH)]


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize(
    ("causal", "causal_prompt"), list(itertools.product([False, True], [False, True]))
)
def test_positions_see_their_document_up_to_their_own_level(
    documents: np.ndarray | None, causal: bool, causal_prompt: bool
) -> None:
    """Of a batch of sequences with prompts of every length, and of none."""
    noise = NoiseConfig(p_prompt=0.8, max_empty_fraction=0.0)
    batch = [
        noise_sequence(TOKENS, SCHEDULE, noise, seed=0, index=index, documents=documents)
        for index in range(40)
    ]
    visibility = torch.from_numpy(np.stack([x.visibility for x in batch]))
    assert visibility.shape == (40, 2, LENGTH) and visibility.dtype == torch.int32
    masks = attention_mask_from_visibility(visibility, causal=causal, causal_prompt=causal_prompt)
    assert masks.dtype == torch.bool
    assert len({int(x.noise_mask.sum()) for x in batch}) > 6
    for mask, sequence in zip(masks, batch, strict=True):
        assert mask.tolist() == _expected(sequence.noise_mask, documents, causal, causal_prompt)
        assert mask.diagonal().all(), "a position that sees nothing has no attention"


def test_infilled_tokens_are_clean_but_see_like_noise() -> None:
    """Infilling comes after visibility: it clears the noise mask and leaves attention alone."""
    with_infill = NoiseConfig(p_prompt=0.5, p_infill=1.0, max_empty_fraction=0.0)
    without = NoiseConfig(p_prompt=0.5, p_infill=0.0, max_empty_fraction=0.0)
    num_infilled = 0
    for index in range(50):
        a, b = (
            noise_sequence(TOKENS, SCHEDULE, noise, seed=0, index=index)
            for noise in (with_infill, without)
        )
        assert np.array_equal(a.visibility, b.visibility)
        assert not (a.noise_mask & ~b.noise_mask).any()
        num_infilled += np.count_nonzero(b.noise_mask & ~a.noise_mask)
    assert num_infilled > 100


def test_an_empty_token_belongs_to_the_document_before_it() -> None:
    noise = NoiseConfig(p_prompt=0.0, max_empty_fraction=0.5)
    tokens = np.where(DOCUMENTS == 5, 4, np.where(DOCUMENTS == 6, 5, 6))
    document_of_token = {4: 5, 5: 6, 6: 9}
    num_empty = 0
    for index in range(100):
        result = noise_sequence(
            tokens, SCHEDULE, noise, seed=0, index=index, documents=DOCUMENTS, empty_token_id=2
        )
        document = DOCUMENTS[0]
        for token, got in zip(result.x0, result.visibility[1], strict=True):
            document = document_of_token.get(token, document)
            assert got == document
        num_empty += np.count_nonzero(result.x0 == 2)
    assert num_empty > 100
