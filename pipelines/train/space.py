"""The disk that the rest of a training run takes, before it begins."""

from ldm import storage
from ldm.autoencoder import FILES
from ldm.config import RequestError
from pipelines.train.checkpoint import checkpoint_url, committed_steps
from pipelines.train.config import TrainConfig
from pipelines.train.snapshots import snapshot_steps

_FP32 = 4
_SNAPSHOT = _FP32  # bytes for each parameter: an average


def check_space(config: TrainConfig, parameters: int, checkpoint: str | None) -> int:
    """Bytes that the rest of the run adds to `output` at most, going on from `checkpoint`.

    Raises RequestError where a local disk has less.
    """
    steps = committed_steps(config.output)
    # Not those that a run which goes back leaves behind.
    before = [step for step in steps if checkpoint and checkpoint_url(config.output, step) <= checkpoint]
    needed = _needed(config, parameters, before)
    remedy = "give an output on a larger disk, a larger checkpoint_every or a smaller keep_last or keep_snapshots"
    storage.check_space("output", config.output, needed, remedy)
    return needed


def check_kept(config: TrainConfig) -> None:
    """Raises RequestError where `keep_every` would keep other checkpoints than it says."""
    every, kept = config.checkpoint_every, config.keep_every
    if kept is not None and kept % every:
        raise RequestError(
            f"keep_every={kept}: is no multiple of checkpoint_every={every}, at whose multiples there are checkpoints; "
            f"give {-(-kept // every) * every}"
        )


def _needed(config: TrainConfig, parameters: int, committed: list[int]) -> int:
    begun, every = max(committed, default=0), config.checkpoint_every
    if begun >= config.max_steps:
        return 0
    saves = config.max_steps // every - begun // every + (config.max_steps % every > 0)
    # One more than is kept, for the oldest is removed only when the newest is whole.
    kept = config.keep_every or config.max_steps + 1
    checkpoints = min(saves, max(1, config.keep_last + 1 - len(committed)) + config.max_steps // kept - begun // kept)
    checkpoint = _FP32 * (3 + config.ema.num_profiles)  # masters, two moments, averages
    snapshot = _SNAPSHOT * parameters + _autoencoder_bytes(config)
    return checkpoints * checkpoint * parameters + _snapshots(config, saves) * snapshot


def _snapshots(config: TrainConfig, saves: int) -> int:
    """How many of `saves` stand at a time beside those that are there: one more than is kept, as of checkpoints."""
    if config.keep_snapshots is None:
        return saves
    validates = config.holdout > 0 and config.validation.images > 0  # then the best one is kept too
    return min(saves, max(1, config.keep_snapshots + validates + 1 - len(snapshot_steps(config.output))))


def _autoencoder_bytes(config: TrainConfig) -> int:
    """What a snapshot's copy of the autoencoder takes: nothing on the disk of the latents, where it is a hard link."""
    folder = storage.join(config.latents_urls[0], "autoencoder")
    if storage.same_disk(folder, config.output):
        return 0
    return sum(storage.size(storage.join(folder, file)) for file in FILES)
