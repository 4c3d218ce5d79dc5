"""What is in a folder, in the bucket of the tests, and in the requests to it."""

from pathlib import Path

from tests.support.s3_server import Server


def prefix(uri: str) -> str:
    return uri.removeprefix("s3://tests/")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_paths(server: Server) -> list[str]:
    """Paths and queries of the PUT requests, such as object names with the number of the part."""
    return [path for method, path in server.calls if method == "PUT"]
