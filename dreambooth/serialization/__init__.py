"""Files of models: the exported folder (export.py), LoRA files (lora_files.py), single files (single_file.py,
detect_format.py) and their conversion to diffusers folders (convert.py, single_file_sources.py).

May import models, data and the folders to their left.
"""
