"""Training data: photos (photos.py), captions, masks, aspect-ratio buckets, class images (class_images.py), batches.

Imports only from errors, utils, config, runtime, storage, models and optim.
"""
