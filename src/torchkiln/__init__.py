"""torchkiln: parametrizations for PyTorch, put in, trained through, and taken out again."""

__version__ = "0.1.0"
