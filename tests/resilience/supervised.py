"""What torchrun starts: the training program with a fault for each start.

At the first start rank 1 is killed in step 5; at the second, in step 6, torchrun itself is told to
end, as a cluster does before the time of a job is over.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_diffusion  # noqa: E402
from tests.resilience.program import after_step, die_in_a_step  # noqa: E402


def terminate_torchrun() -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    # torchrun passes it on to its workers.
    time.sleep(3)


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_in_a_step(rank, 1)
    elif rank == 0:
        after_step(2, terminate_torchrun)
    sys.exit(pretrain_diffusion.main())
