"""The options of `python -m dreambooth.serve`. Imports neither torch nor Hydra."""

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from dreambooth.config.section import Section, finite, require
from dreambooth.models.inference_memory import read_memory

TOKEN_VARIABLE = "DREAMBOOTH_SERVE_TOKEN"
SHORTEST_TOKEN = 16  # characters


@dataclass
class Serve(Section):
    """Options of `python -m dreambooth.serve`; conf/serve.yaml explains each key."""

    run: str | None = None
    base: str | None = None
    adapters: Any = None  # a folder, or a dictionary from name to path
    max_adapters: int = 4
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    workers: int | None = None
    memory_options: Any = "auto"  # auto, or a list of names
    max_batch: int = 4
    max_wait_ms: float = 20.0
    max_queue: int = 64
    max_side: int | None = None
    max_pixels: int | None = None
    max_steps: int = 100
    max_images: int = 8
    max_body: int = 2**20
    request_timeout: float = 300.0
    grace_seconds: float = 25.0
    uri: str | None = None
    cache: str = "runs"
    plan: bool = False

    def __post_init__(self) -> None:
        read_memory(self.memory_options)
        adapters = self.adapters
        named = isinstance(adapters, dict) and all(
            isinstance(part, str) and part.strip() for item in adapters.items() for part in item)
        require("", {
            "adapters": (adapters is None or named or (isinstance(adapters, str) and bool(adapters.strip())),
                         "a folder, or names with paths such as {dog: runs/DOG}"),
            "max_adapters": (self.max_adapters >= 1, f"1 or more, not {self.max_adapters}"),
            "host": (bool(self.host.strip()), "an address, such as 127.0.0.1 or 0.0.0.0"),
            "port": (0 <= self.port <= 65535, f"from 0 to 65535, not {self.port}"),
            "token": (self.token is None or (len(self.token) >= SHORTEST_TOKEN and self.token.isascii()
                                             and self.token.isprintable() and " " not in self.token),
                      f"at least {SHORTEST_TOKEN} ASCII characters without blanks"),
            "workers": (self.workers is None or self.workers >= 1, f"1 or more, or null, not {self.workers}"),
            "max_batch": (1 <= self.max_batch <= 256, f"from 1 to 256, not {self.max_batch}"),
            "max_wait_ms": (0 <= self.max_wait_ms <= 60_000, f"from 0 to 60000, not {self.max_wait_ms}"),
            "max_queue": (self.max_queue >= 1, f"1 or more, not {self.max_queue}"),
            "max_side": (self.max_side is None or self.max_side >= 8, f"8 or more, or null, not {self.max_side}"),
            "max_pixels": (self.max_pixels is None or self.max_pixels >= 64,
                           f"64 or more, or null, not {self.max_pixels}"),
            "max_steps": (1 <= self.max_steps <= 1000, f"from 1 to 1000, not {self.max_steps}"),
            "max_images": (1 <= self.max_images <= self.max_queue,
                           f"from 1 to max_queue={self.max_queue}, not {self.max_images}"),
            "max_body": (self.max_body >= 1024, f"1024 or more, not {self.max_body}"),
            "request_timeout": (finite(self.request_timeout, 1), f"1 or more, not {self.request_timeout}"),
            "grace_seconds": (finite(self.grace_seconds, 0), f"0 or more, not {self.grace_seconds}"),
        })

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
