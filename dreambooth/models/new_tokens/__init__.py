"""New tokens of CLIP's tokenizers, whose embeddings are trained together with an adapter (method.new_tokens).

Imports only from errors, utils, config, and other files of models.
"""
