"""The mathematics: schedule, noising, objective. torch and numpy only."""

from megatron_ext.diffusion.objective import GiddLoss, dense_gidd_loss
from megatron_ext.diffusion.schedule import MixingSchedule

__all__ = ["GiddLoss", "MixingSchedule", "dense_gidd_loss"]
