"""Image shards => latent dataset: Ray actors with a frozen autoencoder; a shard is the unit of work and of commit.

plan.py checks a request and says what is left to do; run.py does it; pool.py hands shards to actors; worker.py is what
an actor does with one.
"""

from pipelines.encode.config import EncodeConfig
from pipelines.encode.plan import EncodePlan, plan
from pipelines.encode.run import EncodeReport, encode, finished

__all__ = ["EncodeConfig", "EncodePlan", "EncodeReport", "encode", "finished", "plan"]
