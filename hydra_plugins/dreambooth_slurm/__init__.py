"""Hydra launcher that runs the jobs of a sweep as a job array of Slurm."""
