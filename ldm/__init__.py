"""Latent diffusion: the science and the file formats. Needs no Ray, no DeepSpeed and no MLflow."""

import os

from ldm.allocator import keep_freed_memory

DISTRIBUTION = "ldm-pipelines"
"""The package's name in the package index: `ldm` is another's, and this tells the two apart."""

__version__ = "0.1.0"

# A picture from a seed is the same bits in any row of its batch. On AMD's processors MKL breaks that: on two threads it
# adds up some rows of a product in another order. Its strict mode does not, and costs nothing that could be measured
# (docs/benchmarks.md). MKL reads this once, at its first product: import ldm before that.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

keep_freed_memory()
