"""Base models: their families (families/), loading (loading.py, components.py, vae.py), adapters (lora.py), the noise
schedule, quantisation, gradient checkpointing, and the pipeline that draws (pipeline.py).

May import errors, utils, config, runtime and storage.
"""
