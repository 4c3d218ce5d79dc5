"""Parts of gpu.py: the configurations, base models with random weights, one process of a run, and the page."""
