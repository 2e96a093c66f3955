"""`python -m megatron_ext.doctor`: what is installed, what is wrong with it, and what to do.

Every check is a function without arguments that returns findings. Nothing outside the standard
library is needed to run them: a missing package is a finding, not a traceback.
"""

from megatron_ext.doctor.finding import Finding
from megatron_ext.doctor.machine import MACHINE_CHECKS
from megatron_ext.doctor.packages import PACKAGE_CHECKS


def examine() -> list[Finding]:
    """All findings, in the order in which they are read best."""
    return [finding for check in (*PACKAGE_CHECKS, *MACHINE_CHECKS) for finding in check()]


__all__ = ["Finding", "examine"]
