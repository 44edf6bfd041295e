"""Darkroom: keeps a class-conditional diffusion model in production."""

import os

# Read when OpenMP starts, so they have to be there before torch is imported. Threads that spin while they wait slow
# each other down many times over on a busy machine; threads that hardly spin cost a small model half of its speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# What torch's C++ warns of when another rank is gone is a page of frames; the stage says in a line what happened.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
