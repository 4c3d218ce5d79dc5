"""Long experiments that show that training works: `make proof` runs them and writes their results to docs/.

Main files: __main__.py (docs/proof.md), adapters.py, concepts.py, sweeps.py, s3.py and container_image.py.
"""
