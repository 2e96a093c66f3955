"""The configuration of a run: one frozen tree of sections, each field a command-line flag.

A section checks itself; `Config` checks what spans sections. Errors name the flag, its value and
what to change. Numbers that follow from others are properties; nothing is written back. Flags
carry Megatron-LM's names where Megatron-LM has one, `--micro-batch-size` for `micro_batch_size`.
The text under a field is its help text. `megatron_ext.cli` reads YAML and flags into this tree.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Objective = Literal["masked", "uniform", "hybrid", "ar"]
Float8Format = Literal["e4m3", "hybrid"]
Float8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]

SHIFT_OF_OBJECTIVE = {"masked": -1000.0, "uniform": 1000.0}
"""Mixing shifts at which the noise is purely masked or purely uniform in float32."""

FP8_ALIGNMENT: dict[Float8Recipe, int] = {
    "delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32,
}  # fmt: skip
"""What must divide both dimensions of every operand of a product in FP8."""


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def require(condition: bool, name: str, value: object, advice: str) -> None:
    """Raise `ValueError` with the flag, its value and what to do unless `condition` holds."""
    if not condition:
        raise ValueError(f"{flag(name)} is {value!r}: {advice}")


def _require_positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(value is None or value > 0, name, value, "give a number above zero.")


def _require_fraction(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(0 <= value <= 1, name, value, "give a number between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer (paper appendix; defaults are GIDD's)."""

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Attention heads."""
    kv_channels: int | None = None
    """Width of a head; hidden_size / num_attention_heads when absent."""
    ffn_hidden_size: int | None = None
    """Width of the feed-forward layer; 4 x hidden_size when absent."""
    seq_length: int = 256
    """Positions of a training sequence."""
    vocab_size: int | None = None
    """True vocabulary, special tokens included; the tokenizer's when absent."""
    make_vocab_size_divisible_by: int = 128
    """Rows of the embeddings are padded to a multiple of this times tp; changes no number."""
    activation: Literal["squared_relu", "gelu", "swiglu"] = "squared_relu"
    """Non-linearity of the feed-forward layer."""
    mlp_bias: bool = True
    """Biases in the feed-forward layer."""
    kv_bias_token: bool = True
    """A learned key and value that every query may attend to."""
    attention_softcap: float | None = 30.0
    """Scores become cap x tanh(score / cap); absent for none."""
    qk_norm: Literal["full", "none"] = "full"
    """RMSNorm of queries and keys over the full width, before the split into heads."""
    position_embedding_type: Literal["rope", "none"] = "rope"
    """Rotary position embedding, or none."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMSNorm."""
    apply_layernorm_1p: bool = True
    """Norm gains are stored as their difference from one."""
    residual_scale: float | None = 4.0
    """Each residual branch is multiplied by residual_scale / num_layers; absent for 1."""
    head_scale: float | None = 512.0
    """Logits are multiplied by head_scale / hidden_size; absent for 1."""
    untie_embeddings_and_output_weights: bool = True
    """Separate input embedding and output head."""
    init_scale: float = 0.4
    """Matrices start from N(0, init_scale / sqrt(hidden_size))."""
    init_method_std: float | None = None
    """Standard deviation of every matrix instead of init_scale's."""
    emb_init_std: float = 0.02
    """Standard deviation of the initial input embedding."""
    head_init_std: float = 0.0
    """Standard deviation of the initial output head."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "num_layers", "hidden_size", "num_attention_heads", "kv_channels",
            "ffn_hidden_size", "seq_length", "vocab_size", "make_vocab_size_divisible_by",
            "attention_softcap", "residual_scale", "head_scale", "rotary_base",
        )  # fmt: skip
        require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            "num_attention_heads", self.num_attention_heads,
            f"it must divide --hidden-size ({self.hidden_size}), or give --kv-channels.",
        )  # fmt: skip
        require(
            self.head_width % 2 == 0 or self.position_embedding_type == "none",
            "kv_channels", self.head_width, "rotary embedding needs an even head width.",
        )  # fmt: skip

    @property
    def head_width(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn_width(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def matrix_init_std(self) -> float:
        return self.init_method_std or self.init_scale / math.sqrt(self.hidden_size)

    @property
    def residual_multiplier(self) -> float:
        return 1.0 if self.residual_scale is None else self.residual_scale / self.num_layers

    @property
    def logit_scale(self) -> float:
        return 1.0 if self.head_scale is None else self.head_scale / self.hidden_size


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Objective and noise schedule (paper sections 2 and 3)."""

    objective: Objective = "hybrid"
    """masked, uniform and hybrid are one loss at different mixing shifts; ar is a causal model
    with next-token cross-entropy on the same stack."""
    mixing_shift: float = 0.0
    """Shift b of the hybrid mixing: noise is half masked, half uniform at log-SNR -b.
    The paper's: -2 low-uniform, 0 balanced, 2 high-uniform."""
    mixing_scale: float = 1.0
    """Scale a of the hybrid mixing; a valid Markov chain needs a <= 1."""
    min_log_snr: float = -9.0
    """Lowest log-SNR."""
    max_log_snr: float = 9.0
    """Highest log-SNR."""
    beta_is: float = 1.0
    """Weight of the Itakura-Saito term in the training loss."""
    loss_normalization: Literal["token", "sum"] = "token"
    """Divide the loss by the number of noised tokens of the global batch, or not at all
    (the reference's sum)."""
    causal_prompt_attn: bool = False
    """Prompt positions attend causally among themselves."""

    def __post_init__(self) -> None:
        require(
            0 < self.mixing_scale <= 1, "mixing_scale", self.mixing_scale,
            "the forward process is a Markov chain only for scales in (0, 1].",
        )  # fmt: skip
        require(
            self.min_log_snr < self.max_log_snr, "min_log_snr", self.min_log_snr,
            f"it must be below --max-log-snr ({self.max_log_snr}).",
        )  # fmt: skip
        require(
            self.objective == "hybrid" or self.mixing_shift == 0.0, "mixing_shift",
            self.mixing_shift, f"--objective {self.objective} fixes it; use --objective hybrid.",
        )  # fmt: skip

    @property
    def shift(self) -> float:
        return SHIFT_OF_OBJECTIVE.get(self.objective, self.mixing_shift)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """What is noised and how strongly (paper section 3). Where the paper's text and the code
    that produced its results differ, both are options; docs/noise.md lists them."""

    p_independent: float = 0.5
    """Share of sequences whose tokens draw independent log-SNRs (paper 0.5, code 0.2)."""
    p_linear: float = 0.0
    """Share of sequences whose log-SNR falls linearly in time along the sequence."""
    p_prompt: float = 0.2
    """Share of sequences that begin with a clean prompt."""
    max_prompt_fraction: float = 1.0
    """Longest prompt as a share of the sequence."""
    prompt_length_law: Literal["code", "paper"] = "code"
    """code: arccos(1 - 2r) / pi of the sequence, for r ~ U(0, 1); paper: arccos(r), cut at the
    whole sequence, which more than half of the draws reach."""
    p_infill: float = 0.0
    """Share of sequences in which scattered tokens are left clean."""
    max_infill_fraction: float = 1.0
    """Largest share of tokens left clean by infilling."""
    max_empty_fraction: float = 0.2
    """Padding tokens inserted at random, at most this share (paper 0.2, code 0)."""
    uniform_noise_includes_mask: bool = False
    """Uniform noise draws from all ids (code), or from all but the mask (paper), as the loss
    assumes."""

    def __post_init__(self) -> None:
        _require_fraction(
            self, "p_independent", "p_linear", "p_prompt", "max_prompt_fraction", "p_infill",
            "max_infill_fraction",
        )  # fmt: skip
        require(
            0 <= self.max_empty_fraction < 1, "max_empty_fraction", self.max_empty_fraction,
            "give a number in [0, 1).",
        )  # fmt: skip
        require(
            self.p_independent + self.p_linear <= 1, "p_linear", self.p_linear,
            f"together with --p-independent ({self.p_independent}) it must not exceed 1.",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Tokens in."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin/.idx files, optionally weighted: 0.7 a 0.3 b."""
    valid_data_path: tuple[str, ...] = ()
    """Separate validation data; otherwise --split cuts it from --data-path."""
    test_data_path: tuple[str, ...] = ()
    """Separate test data."""
    split: str = "969,30,1"
    """Shares of documents for training, validation and test."""
    tokenizer_model: str | None = None
    """Folder with tokenizer.json, or a SentencePiece .model file."""
    mask_token_id: int | None = None
    """Id of the mask token; the tokenizer's when absent."""
    pad_token_id: int | None = None
    """Id of the token inserted as empty; the tokenizer's when absent."""
    reset_attention_mask: bool = False
    """Tokens attend only within their own document."""
    drop_aligned_eos: bool = False
    """Drop an end-of-document token that would begin a new sequence (the reference does)."""
    num_workers: int = 2
    """Threads that prepare batches ahead of the step; 0 prepares them in line."""
    mock_data: bool = False
    """Train on generated tokens; for benchmarks and dry runs."""

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, "num_workers", self.num_workers, "give 0 or more.")
        require(
            not (self.mock_data and self.data_path), "mock_data", True,
            "remove --data-path, or do not ask for mock data.",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, CompleteP and the learning-rate schedule (paper section 4)."""

    optimizer: Literal["laprop", "adamw"] = "laprop"
    """LaProp (the paper's) or AdamW."""
    lr: float = 0.3
    """Base learning rate; --parameterization says what each class of parameters gets."""
    min_lr: float = 0.0
    """Base learning rate at the end of the cosine schedule."""
    adam_beta1: float = 0.9
    """Decay of the mean."""
    adam_beta2: float = 0.99
    """Decay of the mean square (paper: 0.98 for 256 sequences and more)."""
    adam_eps: float | None = None
    """Added to the root mean square; 1e-8 / (hidden_size x num_layers) for CompleteP and 1e-8
    for standard when absent."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices (completep multiplies it by hidden_size)."""
    norm_weight_decay: float = 0.0
    """Decoupled decay of norm gains."""
    bias_weight_decay: float = 0.0
    """Decoupled decay of biases."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 for no clipping (what the reference's code does)."""
    parameterization: Literal["completep", "standard"] = "completep"
    """completep: matrices lr / hidden_size, all else aux_lr_factor x lr; standard: lr."""
    aux_lr_factor: float = 0.02
    """Learning rate of norms, embeddings, head and biases relative to --lr under completep."""
    lr_decay_style: Literal["WSD", "constant", "cosine"] = "WSD"
    """Shape after the warm-up."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from zero."""
    lr_wsd_decay_iters: float = 0.1
    """Steps of the 1-sqrt cooldown; below 1 a share of --train-iters."""

    def __post_init__(self) -> None:
        _require_positive(self, "adam_eps")
        for name in (
            "lr", "min_lr", "weight_decay", "norm_weight_decay", "bias_weight_decay", "clip_grad",
            "aux_lr_factor", "lr_warmup_iters", "lr_wsd_decay_iters",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value >= 0, name, value, "give zero or more.")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "give a number in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are split over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices, its heads and the vocabulary."""
    pipeline_model_parallel_size: int = 1
    """Ranks in a pipeline of layers."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Model chunks per pipeline rank (interleaved schedule) when above 1."""
    context_parallel_size: int = 1
    """Ranks that share each sequence, in contiguous pieces."""
    sequence_parallel: bool = False
    """Split norms and residual stream over the tensor-parallel ranks too."""
    use_distributed_optimizer: bool = True
    """Split optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass runs."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers, or the attention core, in the backward pass."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full recompute: every layer in groups, or only the first layers of each stage."""
    recompute_num_layers: int = 1
    """Layers per group (uniform) or recomputed layers per stage (block)."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl where there is a CUDA device, gloo elsewhere."""
    distributed_timeout_minutes: int = 10
    """A collective that takes longer ends the run."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "tensor_model_parallel_size", "pipeline_model_parallel_size",
            "num_virtual_stages_per_pipeline_rank", "context_parallel_size",
            "recompute_num_layers", "distributed_timeout_minutes",
        )  # fmt: skip
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel", True, "it needs --tensor-model-parallel-size above 1.",
        )  # fmt: skip
        require(
            self.num_virtual_stages_per_pipeline_rank == 1
            or self.pipeline_model_parallel_size > 1,
            "num_virtual_stages_per_pipeline_rank", self.num_virtual_stages_per_pipeline_rank,
            "it needs --pipeline-model-parallel-size above 1.",
        )  # fmt: skip
        require(
            not self.overlap_param_gather or self.use_distributed_optimizer,
            "overlap_param_gather", True, "it needs --use-distributed-optimizer.",
        )  # fmt: skip
        require(
            not self.overlap_param_gather or self.overlap_grad_reduce,
            "overlap_param_gather", True, "it needs --overlap-grad-reduce.",
        )  # fmt: skip

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and work on the same sequences."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def num_stages(self) -> int:
        """Model chunks in the whole pipeline."""
        return self.pipeline_model_parallel_size * self.num_virtual_stages_per_pipeline_rank


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats and implementations."""

    bf16: bool = False
    """Weights and activations in bfloat16; norms, softmax and loss stay in float32."""
    master_weights: bool = True
    """Keep float32 copies of bfloat16 weights in the optimizer; off is the reference's pure
    bfloat16."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Accumulate and reduce gradients in float32."""
    loss_impl: Literal["auto", "reference", "chunked", "compiled", "triton"] = "auto"
    """Implementation of the loss: dense by definition, or its passes over the vocabulary in plain
    torch, compiled by torch, or as GPU kernels; auto is the fastest that runs here."""
    attention_impl: Literal["auto", "reference", "blocked", "sdpa", "flex", "flash", "te"] = "auto"
    """Implementation of the attention core: dense by definition, plain torch in blocks, torch's
    fused kernels, FlexAttention, flash-attn; te is refused with the reason. auto is the fastest
    that runs here."""
    loss_chunk_size: int | None = None
    """Tokens whose logits exist at a time; chosen from the vocabulary when absent."""
    compile_layers: bool = False
    """Fuse what lies between a layer's matrix products (norms, rotary embedding, squared ReLU,
    residual sum) with torch.compile."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Linear layers of the transformer, and without --compile-layers its norms: in plain torch, or
    Transformer Engine's (CUDA only; needs the transformer-engine package)."""

    def __post_init__(self) -> None:
        _require_positive(self, "loss_chunk_size")
        require(
            self.master_weights or self.bf16, "master_weights", False,
            "only --bf16 runs have master weights to do without.",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Float8Config:
    """FP8 in the linear layers of the transformer; the rest stays in the run's precision."""

    fp8_format: Float8Format | None = None
    """FP8 for inputs and weights in E4M3, and gradients in E4M3 (e4m3) or E5M2 (hybrid); absent
    for no FP8. Needs --transformer-impl transformer_engine or --fp8-emulate."""
    fp8_recipe: Float8Recipe = "delayed"
    """Scales: one per tensor from earlier steps or from the tensor itself, one per block of 128, or
    one per 32 numbers (Blackwell)."""
    fp8_emulate: bool = False
    """Round as the recipe would and multiply in float32: its numbers on any machine, slowly."""
    fp8_param_gather: bool = False
    """Keep weights in FP8 and gather them so; masters stay in float32."""
    fp8_margin: int = 0
    """delayed: scales are smaller by two to this power."""
    fp8_amax_history_len: int = 1024
    """delayed: calls whose largest magnitudes are remembered."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """delayed: the scale follows the largest of them or the last."""
    first_last_layers_bf16: bool = False
    """Leave the first and last layers out of FP8 (not with delayed)."""
    num_layers_at_start_in_bf16: int = 1
    """How many first layers --first-last-layers-bf16 means."""
    num_layers_at_end_in_bf16: int = 1
    """How many last layers --first-last-layers-bf16 means."""

    def __post_init__(self) -> None:
        _require_positive(self, "fp8_amax_history_len")
        for name in ("fp8_margin", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            value = getattr(self, name)
            require(value >= 0, name, value, "give 0 or more.")
        for name in ("fp8_emulate", "fp8_param_gather", "first_last_layers_bf16"):
            require(
                not getattr(self, name) or self.fp8_format is not None, name, True,
                "give --fp8-format.",
            )  # fmt: skip
        require(
            not (self.first_last_layers_bf16 and self.fp8_recipe == "delayed"),
            "first_last_layers_bf16", True,
            "delayed scaling covers all layers; choose another --fp8-recipe.",
        )  # fmt: skip
        require(
            not (self.fp8_emulate and self.fp8_param_gather), "fp8_param_gather", True,
            "emulated weights stay in the run's precision; leave it out with --fp8-emulate.",
        )  # fmt: skip
        require(
            not (self.fp8_param_gather and self.fp8_recipe == "mxfp8"), "fp8_param_gather", True,
            "mxfp8 weights would need the engine's gradient buffer for their gather, which is not "
            "wired up; leave it out.",
        )  # fmt: skip

    def quantizes(self, layer: int, num_layers: int) -> bool:
        """Whether a layer, counted from 0, runs in FP8."""
        if self.fp8_format is None:
            return False
        if not self.first_last_layers_bf16:
            return True
        last = num_layers - self.num_layers_at_end_in_bf16
        return self.num_layers_at_start_in_bf16 <= layer < last


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop."""

    train_iters: int = 1000
    """Optimizer steps of the whole run."""
    micro_batch_size: int = 8
    """Sequences per rank and forward pass."""
    global_batch_size: int = 8
    """Sequences per optimizer step over all ranks."""
    seed: int = 0
    """Keys initial weights, data order and noise."""
    eval_interval: int = 0
    """Validate every so many steps; 0 for only at the end."""
    eval_iters: int = 0
    """Global batches of validation data per evaluation; 0 for all of it."""
    eval_draws: int = 2
    """Noise levels drawn per validation sequence."""
    skip_eval: bool = False
    """Do not validate at all."""
    exit_interval: int | None = None
    """Save and stop at the next step that this divides."""
    exit_duration_in_mins: float | None = None
    """Save and stop after so many minutes."""
    max_consecutive_bad_steps: int = 10
    """Stop after so many non-finite losses or gradients in a row."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "train_iters", "micro_batch_size", "global_batch_size", "eval_draws",
            "exit_interval", "exit_duration_in_mins", "max_consecutive_bad_steps",
        )  # fmt: skip
        for name in ("eval_interval", "eval_iters"):
            value = getattr(self, name)
            require(value >= 0, name, value, "give 0 or more.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints out and in."""

    save: str | None = None
    """Folder for checkpoints, the resolved configuration and metrics."""
    load: str | None = None
    """Folder to continue from: its latest complete checkpoint, at this run's layout."""
    ckpt_step: int | None = None
    """Load this step instead of the latest."""
    finetune: bool = False
    """Take only the weights from --load and start at step 0."""
    save_interval: int = 0
    """Save every so many steps; 0 for only at the end."""
    async_save: bool = False
    """Write checkpoints in the background."""
    keep_last: int = 0
    """Delete older checkpoints beyond this many; 0 keeps all."""
    max_failed_saves: int = 3
    """Stop after so many checkpoints in a row that could not be written."""
    accept_changes: tuple[str, ...] = ()
    """Fields whose change since the checkpoint is meant, of those that are refused otherwise:
    data-path, seed, objective, ..."""

    def __post_init__(self) -> None:
        _require_positive(self, "max_failed_saves")
        for name in ("save_interval", "keep_last"):
            value = getattr(self, name)
            require(value >= 0, name, value, "give 0 or more.")
        require(
            self.save_interval == 0 or self.save is not None, "save_interval",
            self.save_interval, "give --save, the folder to write to.",
        )  # fmt: skip
        for name in ("finetune", "ckpt_step"):
            value = getattr(self, name)
            require(not value or self.load is not None, name, value, "give --load.")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported and where."""

    log_interval: int = 10
    """Steps between console lines and metrics records."""
    progress_bar: bool = True
    """Show a progress bar where the console is a terminal."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard; <save>/tensorboard when absent and --save is given."""
    wandb_project: str | None = None
    """Report to this Weights & Biases project too (needs the wandb package)."""
    peak_flops: float | None = None
    """Peak FLOP/s of one device for MFU; absent for the table of known GPUs, no MFU elsewhere."""

    def __post_init__(self) -> None:
        _require_positive(self, "log_interval", "peak_flops")


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig:
    """What happens when something goes wrong (docs/resilience.md)."""

    hang_timeout_minutes: float | None = None
    """Without progress for so long, a rank prints its stacks and ends; 0.9 times
    --distributed-timeout-minutes when absent, 0 for never."""
    loss_spike_action: Literal["off", "report", "skip", "rollback"] = "off"
    """On a loss far above those before it: report samples and noise levels; leave the update out,
    too; or go back to the last checkpoint and on with the batches after the spike."""
    loss_spike_threshold: float = 6.0
    """A spike is so many standard deviations above the mean of the window."""
    loss_spike_window: int = 128
    """Steps in the window; there are no spikes before it is full."""
    max_rollbacks: int = 3
    """Stop at the next spike after so many rollbacks of this start of the run."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time; slower on GPUs."""
    enable_ft_package: bool = False
    """Send heartbeats to ft_launcher (needs the nvidia-resiliency-ext package)."""

    def __post_init__(self) -> None:
        _require_positive(self, "loss_spike_threshold", "max_rollbacks")
        require(
            self.loss_spike_window >= 8, "loss_spike_window", self.loss_spike_window,
            "a standard deviation of fewer than 8 steps means nothing.",
        )  # fmt: skip
        timeout = self.hang_timeout_minutes
        require(timeout is None or timeout >= 0, "hang_timeout_minutes", timeout, "give 0 or more.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    fp8: Float8Config = field(default_factory=Float8Config)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)

    def __post_init__(self) -> None:
        model, parallel, precision = self.model, self.parallel, self.precision
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        require(
            model.num_attention_heads % tp == 0, "tensor_model_parallel_size", tp,
            f"it must divide --num-attention-heads ({model.num_attention_heads}).",
        )  # fmt: skip
        require(
            model.ffn_width % tp == 0, "tensor_model_parallel_size", tp,
            f"it must divide --ffn-hidden-size ({model.ffn_width}).",
        )  # fmt: skip
        split = cp * (tp if parallel.sequence_parallel else 1)
        require(
            model.seq_length % split == 0, "seq_length", model.seq_length,
            f"it must be a multiple of {split}, the number of pieces of a sequence "
            "(--context-parallel-size, times tp with --sequence-parallel).",
        )  # fmt: skip
        require(
            model.num_layers % parallel.num_stages == 0, "num_layers", model.num_layers,
            f"it must be a multiple of {parallel.num_stages}, the number of pipeline stages "
            "(--pipeline-model-parallel-size x --num-virtual-stages-per-pipeline-rank).",
        )  # fmt: skip
        require(
            model.untie_embeddings_and_output_weights
            or parallel.pipeline_model_parallel_size == 1,
            "untie_embeddings_and_output_weights", False,
            "tied embeddings are supported at --pipeline-model-parallel-size 1 only.",
        )  # fmt: skip
        require(
            precision.master_weights or not parallel.use_distributed_optimizer,
            "master_weights", False,
            "pure bfloat16 needs --no-use-distributed-optimizer.",
        )  # fmt: skip
        require(
            parallel.use_distributed_optimizer
            or not (precision.bf16 and precision.master_weights),
            "use_distributed_optimizer", False,
            "with --bf16 it keeps the master weights; leave it on (it serves one rank, too), or "
            "give --no-master-weights.",
        )  # fmt: skip
        require(
            self.diffusion.objective != "ar" or not self.diffusion.causal_prompt_attn,
            "causal_prompt_attn", True, "--objective ar is causal everywhere.",
        )  # fmt: skip
        require(
            self.resilience.loss_spike_action != "rollback" or self.checkpoint.save_interval > 0,
            "loss_spike_action", "rollback", "give --save-interval, to have where to go back to.",
        )  # fmt: skip
        timeout = self.resilience.hang_timeout_minutes
        require(
            timeout is None or timeout < parallel.distributed_timeout_minutes,
            "hang_timeout_minutes", timeout,
            "it must be below --distributed-timeout-minutes "
            f"({parallel.distributed_timeout_minutes}), which ends ranks without their stacks.",
        )  # fmt: skip
        self._check_engine()
        if self.fp8.fp8_format is not None:
            self._check_fp8()

    def _check_engine(self) -> None:
        """What Transformer Engine's layers ask of the rest."""
        is_local = self.precision.transformer_impl == "local"
        require(
            is_local or self.precision.bf16, "transformer_impl", self.precision.transformer_impl,
            "it is for --bf16 runs.",
        )  # fmt: skip

    def _check_fp8(self) -> None:
        """What FP8 asks of the rest."""
        fp8, model, parallel = self.fp8, self.model, self.parallel
        is_local = self.precision.transformer_impl == "local"
        require(
            not is_local or fp8.fp8_emulate, "fp8_format", fp8.fp8_format,
            "local layers have no FP8; give --transformer-impl transformer_engine, or --fp8-emulate"
            " to study the recipe's numbers.",
        )  # fmt: skip
        require(
            is_local or not fp8.fp8_emulate, "fp8_emulate", True,
            "it replaces local layers; give --transformer-impl local.",
        )  # fmt: skip
        require(
            not (fp8.fp8_emulate and fp8.fp8_recipe == "delayed")
            or parallel.recompute_granularity != "full",
            "recompute_granularity", "full",
            "a second forward pass would count twice in emulated delayed scaling; use selective, or"
            " another --fp8-recipe.",
        )  # fmt: skip
        require(
            not fp8.fp8_param_gather or parallel.use_distributed_optimizer, "fp8_param_gather",
            True, "it needs --use-distributed-optimizer.",
        )  # fmt: skip
        require(
            not (fp8.fp8_param_gather and self.checkpoint.finetune), "fp8_param_gather", True,
            "--finetune takes masters from the weights, which it has rounded to FP8; leave it out.",
        )  # fmt: skip
        per_stage = model.num_layers // parallel.num_stages
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            count = getattr(fp8, name)
            require(
                not fp8.first_last_layers_bf16 or count <= per_stage, name, count,
                f"a pipeline stage has {per_stage} layers.",
            )  # fmt: skip
        self._check_fp8_shapes()

    def _check_fp8_shapes(self) -> None:
        """Every matrix that enters an FP8 product on a rank has aligned dimensions."""
        fp8, model, parallel = self.fp8, self.model, self.parallel
        tp = parallel.tensor_model_parallel_size
        alignment = FP8_ALIGNMENT[fp8.fp8_recipe]
        widths = {
            "hidden_size": model.hidden_size,
            "ffn_hidden_size": model.ffn_width // tp,
            "num_attention_heads": model.head_width * model.num_attention_heads // tp,
        }
        for name, width in widths.items():
            require(
                width % alignment == 0, name, getattr(model, name),
                f"--fp8-recipe {fp8.fp8_recipe} needs multiples of {alignment} on each rank, "
                f"and this gives a matrix of {width}.",
            )  # fmt: skip
        pieces = parallel.context_parallel_size * (tp if parallel.sequence_parallel else 1)
        tokens = self.training.micro_batch_size * model.seq_length // pieces
        require(
            tokens % alignment == 0, "micro_batch_size", self.training.micro_batch_size,
            f"--fp8-recipe {fp8.fp8_recipe} needs a multiple of {alignment} tokens on each "
            f"rank, and this gives {tokens}.",
        )  # fmt: skip

    def num_microbatches(self, world_size: int) -> int:
        """Forward passes per step and rank; raises where the batch does not divide."""
        size = self.parallel.model_parallel_size
        require(
            world_size % size == 0, "tensor_model_parallel_size",
            self.parallel.tensor_model_parallel_size,
            f"tp x pp x cp = {size} must divide the number of ranks ({world_size}).",
        )  # fmt: skip
        data_parallel_size = world_size // size
        per_pass = self.training.micro_batch_size * data_parallel_size
        batch = self.training.global_batch_size
        require(
            batch % per_pass == 0, "global_batch_size", batch,
            f"it must be a multiple of {per_pass}: --micro-batch-size "
            f"({self.training.micro_batch_size}) x data-parallel size ({data_parallel_size}).",
        )  # fmt: skip
        count = batch // per_pass
        pp = self.parallel.pipeline_model_parallel_size
        require(
            self.parallel.num_virtual_stages_per_pipeline_rank == 1 or count % pp == 0,
            "num_virtual_stages_per_pipeline_rank",
            self.parallel.num_virtual_stages_per_pipeline_rank,
            f"virtual stages need a number of micro-batches ({count}) that is a multiple of "
            f"--pipeline-model-parallel-size ({pp}).",
        )  # fmt: skip
        return count

    def with_sections(self, **changes: Any) -> Config:
        """A copy with fields of sections changed: `with_sections(training={"seed": 1})`."""
        sections = {
            name: replace(getattr(self, name), **values) for name, values in changes.items()
        }
        return replace(self, **sections)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested values, ready for YAML."""
        tree = asdict(self)
        for section in tree.values():
            for name, value in section.items():
                if isinstance(value, tuple):
                    section[name] = list(value)
        return tree
