"""The descriptions of AWS's services, which botocore reads anew for each session: in tests, once per process.

They are megabytes of JSON: each client of the package would cost a tenth of a CPU second, one for SageMaker two.
"""

from typing import Any

from botocore.loaders import JSONFileLoader


def share() -> None:
    """Let all sessions of this process, and of processes that are forked from it, share what was read."""
    read, contents = JSONFileLoader.load_file, dict[str, Any]()

    def read_once(self: Any, file_path: str) -> Any:
        if file_path not in contents:
            contents[file_path] = read(self, file_path)
        return contents[file_path]

    JSONFileLoader.load_file = read_once
