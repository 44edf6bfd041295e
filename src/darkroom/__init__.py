"""Darkroom: keeps a class-conditional diffusion model in production."""

import os

# Two torch threads that spin while they wait slow each other down many times over on a busy machine.
# The setting is read when OpenMP starts, so it has to be there before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
