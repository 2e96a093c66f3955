"""What every check receives: the folder, the configuration and layout, and the report."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ext.config import Config
from megatron_ext.conformance.golden import Golden
from megatron_ext.conformance.report import Report

from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip


@dataclass(frozen=True)
class Session:
    """One run of the suite on one rank."""

    golden: Golden
    config: Config
    """Layout, precision and micro-batch size are the user's; the rest is replaced by what a file
    was recorded with."""
    groups: ProcessGroupCollection
    device: torch.device
    report: Report

    def layout(self) -> str:
        parallel = self.config.parallel
        words = [
            f"tp {parallel.tensor_model_parallel_size}",
            f"pp {parallel.pipeline_model_parallel_size}",
            f"cp {parallel.context_parallel_size}",
            f"dp {self.groups.dp.size()}",
        ]
        if parallel.num_virtual_stages_per_pipeline_rank > 1:
            words.append(f"virtual stages {parallel.num_virtual_stages_per_pipeline_rank}")
        if parallel.sequence_parallel:
            words.append("sequence parallel")
        if parallel.recompute_granularity:
            words.append(f"{parallel.recompute_granularity} recompute")
        precision = "bf16" if self.config.precision.bf16 else "float32"
        return f"{' '.join(words)}, {precision} on {self.device.type}"
