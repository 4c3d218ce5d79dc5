"""Base models: model families (families/), loading (loading.py, components.py, vae.py), adapters (lora.py), the noise
schedule, quantisation, gradient checkpointing, and generation of pictures with a pipeline (pipeline.py).

May import errors, utils, config, runtime and storage.
"""
