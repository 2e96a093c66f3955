"""Which positions attend to which, from two integers per position.

    visibility  [b, 2, s]  int32  row 0: level, 0 in the prompt and 1 elsewhere
                                  row 1: document number

A query sees the keys of its own document whose level is not above its own: noised positions see
everything, the prompt sees only the prompt (paper section 3). Two rows of integers stand for the
[s, s] mask of a sequence, which is small enough to travel with the batch; attention kernels may
evaluate them in place. The function below is the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask_from_visibility(
    visibility: Tensor, *, causal: bool = False, causal_prompt: bool = False
) -> Tensor:
    """Return bool [b, s, s] (query, key), True where a query may attend.

    `causal` hides later keys from every query, `causal_prompt` from the prompt's queries only.
    """
    level, document = visibility.unbind(1)
    mask = level[:, :, None] >= level[:, None, :]
    mask &= document[:, :, None] == document[:, None, :]
    if causal or causal_prompt:
        position = torch.arange(visibility.shape[-1], device=visibility.device)
        not_later = position[:, None] >= position
        mask &= not_later if causal else not_later | (level[:, :, None] > 0)
    return mask
