"""Starts a run stage by stage and prints when each was done; a process of `bench_startup`.

    python -m megatron_ext.training.startup_stages BEGAN '{"shape": ..., ...}'

Nothing but the standard library is imported before the clock is read. `BEGAN` is the time at which
the process was started, in seconds since the epoch.
"""

import json
import sys
import time


def main() -> None:
    began, case = float(sys.argv[1]), json.loads(sys.argv[2])
    done = {"python": time.time() - began}

    import torch  # noqa: F401

    done["torch"] = time.time() - began

    from megatron_ext.parallel import groups  # noqa: F401

    done["megatron-core"] = time.time() - began

    from megatron_ext.config import Config
    from megatron_ext.training.loop import Trainer

    done["the rest of this project"] = time.time() - began
    trainer = Trainer.build(Config().with_sections(**case))
    done["model, data and optimizer"] = time.time() - began
    for name in ("first step", "second step"):
        trainer.train_step(trainer.source.step(trainer.position.step))
        done[name] = time.time() - began
    print(json.dumps(done))


if __name__ == "__main__":
    main()
