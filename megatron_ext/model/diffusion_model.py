"""The diffusion language model: embedding, megatron-core's transformer block, head with its loss.

    input_ids      [b, s/cp] int64    this rank's noised tokens; same on tp and pp
    visibility     [b, 2, s] int32    level and document of every position, or a bool mask
                   [b, s/cp, s]       (True: the query may attend); same on tp, cp and pp
    hidden         [s/cp(/tp), b, h]  between stages
    targets        x0, xt [b, s/cp] int64, log_snr [b, s/cp] float32

A first stage embeds, a last stage normalises and owns the output head; with one stage a rank does
both. `[b, s]` becomes `[s, b]` in the embedding and in the head, nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.config import Config
from megatron_ext.diffusion.objective import work_dtype
from megatron_ext.diffusion.schedule import MixingSchedule
from megatron_ext.kernels.cross_entropy import linear_cross_entropy
from megatron_ext.kernels.gidd_loss import GiddLoss, linear_gidd_loss
from megatron_ext.model.attention import AttentionSettings
from megatron_ext.model.rotary import rotary_table
from megatron_ext.model.spec import block_spec
from megatron_ext.model.translate import padded_vocab_size, transformer_config

from megatron.core.enums import ModelType  # isort: skip
from megatron.core.models.common.embeddings.language_model_embedding import (  # isort: skip
    LanguageModelEmbedding,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.tensor_parallel import (  # isort: skip
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule  # isort: skip
from megatron.core.transformer.transformer_block import TransformerBlock  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip
from megatron.core.transformer.transformer_layer import (  # isort: skip
    get_transformer_layer_offset,
)
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint  # isort: skip


class Targets(NamedTuple):
    """What the loss compares with, each [b, s/cp]."""

    x0: Tensor
    """Clean token ids; for `ar` the next token, -1 where there is none to predict."""
    xt: Tensor
    """Noised token ids."""
    log_snr: Tensor
    """Noise level per position, float32."""
    summed: Tensor | None = None
    """[k] int64 positions, as indices of [s/cp, b] flattened, whose losses the caller adds up with
    one factor; the others are neither projected to the vocabulary nor have a loss."""


class OutputHead(MegatronModule):
    """Rows of the output embedding `weight` [v_padded/tp, h], split on tp, and the loss over them.

    Called with targets it returns per-token losses [b, s/cp] without the logits; without, the
    logits [b, s/cp, v] in float32, true vocabulary, same on tp.
    """

    def __init__(
        self,
        config: Config,
        engine: TransformerConfig,
        vocab_size: int,
        schedule: MixingSchedule,
        tp_group: torch.distributed.ProcessGroup,
        weight: torch.nn.Parameter | None,
    ) -> None:
        super().__init__(config=engine)
        self.settings, self.vocab_size, self.schedule = config, vocab_size, schedule
        self.tp_group = tp_group
        self.is_tied = weight is not None
        if weight is None:
            padded = padded_vocab_size(
                vocab_size, config.model.make_vocab_size_divisible_by, tp_group.size()
            )
            device = torch.cuda.current_device() if torch.cuda.is_available() else None
            shape = (padded // tp_group.size(), config.model.hidden_size)
            weight = torch.nn.Parameter(
                torch.zeros(shape, dtype=engine.params_dtype, device=device)
            )
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim = 0  # type: ignore[attr-defined]
            weight.partition_stride = 1  # type: ignore[attr-defined]
        self.weight = weight

    def forward(self, hidden: Tensor, targets: Targets | None) -> GiddLoss | Tensor:
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        elif self.tp_group.size() > 1:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        positions, batch, _ = hidden.shape
        rows = hidden.reshape(positions * batch, -1)
        if targets is None:
            return self._logits(rows).unflatten(0, (positions, batch)).transpose(0, 1)
        flat = [x.t().reshape(-1) for x in targets[:3]]
        chosen = targets.summed
        if chosen is not None:
            rows, *flat = (x.index_select(0, chosen) for x in (rows, *flat))
        losses = (self._cross_entropy if self._is_causal else self._gidd)(
            rows, Targets(*flat, chosen)
        )
        if chosen is not None:
            losses = [x.new_zeros(positions * batch).index_copy(0, chosen, x) for x in losses]
        return GiddLoss(*(x.unflatten(0, (positions, batch)).t() for x in losses))

    @property
    def _is_causal(self) -> bool:
        return self.settings.diffusion.objective == "ar"

    def _logits(self, rows: Tensor) -> Tensor:
        local = torch.nn.functional.linear(rows, self.weight).float()
        local = local * self.settings.model.logit_scale
        if self.tp_group.size() > 1:
            local = gather_from_tensor_model_parallel_region(local, group=self.tp_group)
        return local[:, : self.vocab_size]

    def _gidd(self, rows: Tensor, targets: Targets) -> GiddLoss:
        precision = self.settings.precision
        return linear_gidd_loss(
            rows, self.weight, targets.xt, targets.x0, targets.log_snr, self.schedule,
            logit_scale=self.settings.model.logit_scale,
            tp_group=self.tp_group,
            beta_is=self.settings.diffusion.beta_is,
            chunk_size=precision.loss_chunk_size,
            summed=targets.summed is not None,
            partial_hidden_grad=True,
            weight_grad=self._weight_grad(targets),
            impl=precision.loss_impl,
        )  # fmt: skip

    def _cross_entropy(self, rows: Tensor, targets: Targets) -> GiddLoss:
        nll = linear_cross_entropy(
            rows, self.weight, targets.x0, self.vocab_size,
            logit_scale=self.settings.model.logit_scale,
            excluded_id=self.schedule.mask_token_id,
            tp_group=self.tp_group,
            chunk_size=self.settings.precision.loss_chunk_size,
            summed=targets.summed is not None,
            partial_hidden_grad=True,
            weight_grad=self._weight_grad(targets),
            impl=self.settings.precision.loss_impl,
        )  # fmt: skip
        value = nll.detach()
        return GiddLoss(nll, value, value, torch.zeros_like(value))

    def _weight_grad(self, targets: Targets) -> Tensor | None:
        """megatron-core's float32 gradient of the weight, which a training step's loss adds to.

        Not where the weight is the embedding's as well: its gradient comes through autograd.
        """
        grad = getattr(self.weight, "main_grad", None)
        is_reference = self.settings.precision.loss_impl == "reference"
        if grad is None or self.is_tied or is_reference or grad.dtype != work_dtype(self.weight):
            return None
        if targets.summed is None or not torch.is_grad_enabled():
            return None
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return grad

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        del metadata
        key = f"{prefix}weight"
        tensor = make_tp_sharded_tensor_for_checkpoint(
            self.weight, key, allow_shape_mismatch=True, prepend_offsets=sharded_offsets
        )
        return {key: tensor}


class DiffusionModel(MegatronModule):
    """One pipeline stage of the model.

    `vocab_size` is the true vocabulary, mask token included; embedding rows are padded for tp.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        schedule: MixingSchedule,
        groups: ProcessGroupCollection,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        engine = transformer_config(config)
        super().__init__(config=engine)
        self.settings, self.schedule, self.groups = config, schedule, groups
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        # megatron-core reduces tied embeddings over stages where this is set; ours are tied at
        # one stage only.
        self.share_embeddings_and_output_weights = False
        model = config.model
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                engine,
                vocab_size=padded_vocab_size(
                    vocab_size, model.make_vocab_size_divisible_by, groups.tp.size()
                ),
                max_sequence_length=model.seq_length,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.attention = AttentionSettings.of(config, device, engine.params_dtype)
        first = get_transformer_layer_offset(engine, vp_stage, groups.pp.rank())
        layers = range(first, first + model.num_layers // config.parallel.num_stages)
        self.decoder = TransformerBlock(
            engine,
            block_spec(config, self.attention, groups, layers),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if post_process:
            tied = None
            if not model.untie_embeddings_and_output_weights:
                tied = self.embedding.word_embeddings.weight
            self.output_layer = OutputHead(config, engine, vocab_size, schedule, groups.tp, tied)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Receive the previous stage's hidden states (megatron-core's pipeline schedules)."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.decoder.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        visibility: Tensor,
        targets: Targets | None = None,
        positions: Tensor | None = None,
    ) -> Tensor | GiddLoss:
        """Hidden states on all but the last stage; there losses, or logits without targets.

        `positions` [s/cp], or [b, s/cp] where rows differ, replace the absolute positions that
        follow from the cp rank.
        """
        hidden = self.hidden_states(input_ids, visibility, positions)
        return self.output_layer(hidden, targets) if self.post_process else hidden

    def hidden_states(
        self, input_ids: Tensor, visibility: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """This stage's output [s/cp(/tp), b, h], normalised on the last stage."""
        local = input_ids.shape[1]
        first = self.groups.cp.rank() * local
        if positions is None:
            positions = torch.arange(first, first + local, device=input_ids.device)
        hidden = self.embedding(input_ids, positions) if self.pre_process else None
        angles = None
        if self.settings.model.position_embedding_type == "rope":
            model = self.settings.model
            angles = rotary_table(positions, model.head_width, model.rotary_base)
        return self.decoder(hidden, visibility, rotary_pos_emb=angles)
