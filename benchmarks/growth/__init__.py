"""How the cost of runs and sweeps grows with the number of photos, captions, steps and runs."""
