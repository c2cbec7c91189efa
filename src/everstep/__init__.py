"""Everstep keeps a PyTorch training job stepping while machines, processes and networks under it fail."""

__version__ = "0.1.0"
