"""Training: `train(TrainConfig(...)) -> TrainReport`.

run.py asks Ray Train for workers and watches them; loop.py is what a worker does; zero.py is all that is known of
DeepSpeed; ema.py and checkpoint.py keep the average and the state.
"""

from pipelines.train.config import EmaConfig, TrainConfig
from pipelines.train.run import TrainReport, check, finished, plan, train

__all__ = ["EmaConfig", "TrainConfig", "TrainReport", "check", "finished", "plan", "train"]
