"""Make a trained PyTorch network smaller and faster, and prove it."""
__version__ = "0.1.0"
