"""What torchkiln costs beside torch and geotorch, as ratios of one run: ``python -m benchmarks``."""
