"""Helpers without knowledge of DreamBooth: atomic files, console, random numbers, signals, image grids, hardware facts.

May import `dreambooth.errors` and nothing else of the package.
"""
