"""Code that processes finished sweeps: trials.py, summary.py, html_page.py, promotion.py and hydra_callbacks.py.

The modules read trials from run folders, write a results table and an HTML page, and register the best model in MLflow.
May import from every other folder except training and planner.
"""
