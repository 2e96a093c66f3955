"""The mathematics: schedule, noising, objective. torch and numpy only."""

from megatron_ext.diffusion.schedule import MixingSchedule

__all__ = ["MixingSchedule"]
