"""Latent diffusion: the science and the file formats. Needs no Ray, no DeepSpeed and no MLflow."""

DISTRIBUTION = "ldm-pipelines"
"""The package's name in the package index: `ldm` is another's, and this tells the two apart."""

__version__ = "0.1.0"
