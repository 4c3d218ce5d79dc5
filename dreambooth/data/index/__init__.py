"""What makes many photos cheap: files hashed once, photos decoded once and in parallel, pixels out of memory.

Imports only from errors, utils, config and the files of data/ that decode photos.
"""
