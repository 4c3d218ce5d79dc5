"""Paths of the files that ship with the package."""

from pathlib import Path

from dreambooth.utils.assets import resolve_asset


def test_only_an_address_with_the_scheme_is_a_file_of_the_package() -> None:
    assert (Path(resolve_asset("package:tiny-sd")) / "model_index.json").is_file()
    assert [resolve_asset(path) for path in ("package", "packages:x", "org/model")] == [
        "package", "packages:x", "org/model"], "such as a folder with the name package"
