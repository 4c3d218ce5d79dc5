"""Layers of a model in another form: the same numbers but for rounding, in less time or memory."""
