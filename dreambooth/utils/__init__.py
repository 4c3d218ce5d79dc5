"""General helpers: atomic files, terminal output, random numbers, signals, image grids, detection of the GPU.

They do not depend on DreamBooth: the folder may import only `dreambooth.errors`.
"""
