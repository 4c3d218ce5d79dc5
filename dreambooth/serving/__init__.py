"""The HTTP server of `python -m dreambooth.serve`: a front process and worker processes that draw.

The front process (server.py) accepts requests (app.py, invocations.py, openai.py), keeps them in a queue (queue.py) and
gives batches to the workers (pool.py, worker_process.py). A worker (worker.py) holds the model. The front process
imports no torch, so that it answers at once, whatever a worker does.

May import inference and the folders that inference may import.
"""
