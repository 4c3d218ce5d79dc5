"""A machine without a network: no retries, and a sentence that says that the hub's name could not be resolved."""

import socket
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from dreambooth.models import hub, loading
from tests.support.configs import demo_recipe


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*args: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    hub.unresolved.cache_clear()
    yield
    hub.unresolved.cache_clear()


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_hub_is_not_asked() -> None:
    assert hub.local_files_only("somebody/model", offline=False)
    recipe = demo_recipe("sd15", model__offline=False)
    message = loading._missing(recipe, OSError("there is no file named model_index.json"))
    assert "could not be resolved: Name or service not known" in message
    assert "model_index" not in message
    assert message.endswith("check the id and the network, or type model.source=DIR for a folder on this machine")


@pytest.mark.usefixtures("no_network")
def test_a_proxy_resolves_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert hub.unresolved() is None
    assert not hub.local_files_only("somebody/model", offline=False)


def test_a_folder_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "unresolved", lambda: None)
    assert hub.local_files_only(str(tmp_path), offline=False)
    assert hub.local_files_only("somebody/model", offline=True)
    assert not hub.local_files_only("somebody/model", offline=False)


def test_a_refused_connection_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "unresolved", lambda: None)
    try:
        try:
            raise ConnectionRefusedError("Connection refused")
        except OSError:
            raise OSError("Can't load config") from None
    except OSError as error:
        reason = hub.failure_reason(error, "org/model", offline=False)
        assert reason == "the hub could not be reached: Connection refused"
        assert hub.failure_reason(error, "org/model", offline=True) == "Can't load config"
        assert hub.failure_reason(error, "/typo/folder", offline=False) == "Can't load config"


def test_a_gated_model_is_told_from_a_missing_one() -> None:
    """The libraries wrap the hub's own error."""
    from huggingface_hub.errors import GatedRepoError

    for kind, gated in ((GatedRepoError, True), (OSError, False)):
        try:
            try:
                raise kind("no", response=MagicMock()) if gated else kind("no")
            except OSError as cause:
                raise OSError("You are trying to access a gated repo.") from cause
        except OSError as error:
            assert hub.is_gated(error) is gated
