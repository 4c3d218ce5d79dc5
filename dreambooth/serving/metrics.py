"""Metrics of the server for Prometheus. docs/serving.md lists them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

PICTURE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)  # seconds
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("dreambooth_requests", "Requests that were answered.", ["route", "code"],
                                registry=registry)
        self.request_seconds = Histogram("dreambooth_request_seconds", "Seconds from a request to its answer.",
                                         ["route"], buckets=PICTURE_BUCKETS, registry=registry)
        self.pictures = Counter("dreambooth_pictures", "Pictures that were drawn.", registry=registry)
        self.picture_seconds = Histogram("dreambooth_picture_seconds", "Seconds of a batch, per picture of the batch.",
                                         buckets=PICTURE_BUCKETS, registry=registry)
        self.batches = Histogram("dreambooth_batch_pictures", "Pictures per batch.", buckets=BATCH_BUCKETS,
                                 registry=registry)
        self.queue = Gauge("dreambooth_queue_pictures", "Pictures that wait for a worker.", registry=registry)
        self.adapters = Gauge("dreambooth_adapters_loaded", "Adapters in the memory of the worker that drew last.",
                              registry=registry)
        self.workers = Gauge("dreambooth_workers_ready", "Workers that can draw.", registry=registry)
        self.restarts = Counter("dreambooth_worker_restarts", "Workers that were started after another one had ended.",
                                registry=registry)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
