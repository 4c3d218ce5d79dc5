"""Model files: the exported folder of a run (export.py), LoRA files (lora_files.py), single files (single_file.py,
detect_format.py, checkpoint_pickle.py), and conversion between single files and diffusers folders (convert.py,
single_file_sources.py).

Imports only from errors, utils, config, runtime, storage, models, optim and data.
"""
