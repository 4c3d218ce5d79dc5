"""No login, signature or token of a URL is shown, logged or kept."""

import logging
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from dreambooth import cli
from dreambooth.cloud import sweep_results
from dreambooth.errors import UserError
from dreambooth.models import families
from dreambooth.serialization import export
from dreambooth.tracking.journal import Journal
from dreambooth.utils import key_names, provenance
from dreambooth.utils.console import Console
from dreambooth.utils.masking import mask_file, mask_log_records, mask_urls
from tests.support.configs import demo_recipe

SIGNED = "https://bucket.s3.amazonaws.com/model.safetensors?X-Amz-Credential=s3cret&X-Amz-Signature=s3cret"
TEXTS = ["http://user:s3cret@host:5000/x", "http://s3cret@host", "postgresql://me:s3@s3cret@host/db", SIGNED,
         f"there is no file {SIGNED}: type model.source=FILE", f"'base={SIGNED}', [{SIGNED}]",
         "postgresql://host/db?password=s3cret", "host=h password=s3cret dbname=d"]


@pytest.mark.parametrize("text", TEXTS)
def test_secrets_of_urls_are_masked(text: str) -> None:
    assert "s3cret" not in mask_urls(text)


def test_what_is_no_secret_stays() -> None:
    for text in ("http://host:5000/#/experiments/1/runs/2", "s3://bucket/folder", "models:/demo@champion", "a toy? yes",
                 "https://arxiv.org/abs/2208.12242", "sqlite:////runs/mlflow.db", "why? a@b.c", "a toy?red",
                 "https://host/@me/photos"):
        assert mask_urls(text) == text
    assert mask_urls(f"there is no {SIGNED}: type it") == (
        "there is no https://bucket.s3.amazonaws.com/model.safetensors?***: type it")


def test_nothing_that_is_printed_or_logged_holds_a_secret(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> float:
        raise error

    monkeypatch.setattr(cli, "_exit_codes", [])
    factory = logging.getLogRecordFactory()
    try:
        for error in (UserError(f"no {SIGNED}"), ValueError(f"no {SIGNED}")):
            cli.run_job(lambda error=error: fail(error), sweep=False)  # type: ignore[misc]
        mask_log_records()
        logging.getLogger("anybody").warning("retry %s of %s", 1, SIGNED)
    finally:
        logging.setLogRecordFactory(factory)
    Console().say(SIGNED)
    Console().table({"base": SIGNED})
    out, err = capfd.readouterr()
    assert out.count("?***") == 2 and err.count("?***") >= 2 and "Traceback" in err
    assert "retry 1 of https://" in caplog.text
    assert "s3cret" not in out + err + caplog.text


def test_nothing_that_is_kept_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings in run.json, the model card, the metadata of a LoRA, the journal, the tables of a sweep, a record."""
    recipe = demo_recipe(model__source=SIGNED, model__revision="http://s3cret@host")
    monkeypatch.setattr(sys, "argv", ["dreambooth/train.py", f"model.source={SIGNED}"])
    kept = [str(recipe.settings()), str(provenance.origin()),
            export._card(recipe, families.FAMILIES[0], 4, False), str(export._adapter_metadata(recipe))]
    assert all("bucket.s3.amazonaws.com/model.safetensors?***" in text for text in kept)
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.set_tags({"uri": SIGNED})
    assert not journal.set_tags({"uri": SIGNED}), "written again"
    row = {"number": 0, "objective": 0.5, "model.source": SIGNED}
    sweep_results.write_table(tmp_path, "s", [row, row | {"model.source": "x"}])
    sweep_results.write_parallel_coordinates(tmp_path, "s", {"source": [SIGNED], "objective": [1.0]})
    (tmp_path / "overrides.yaml").write_text(f"- model.source={SIGNED}\n")
    mask_file(tmp_path / "overrides.yaml")
    kept += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 8 and not [text for text in kept if "s3cret" in text]


def test_the_record_of_a_run_stays_what_evaluate_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, also long ones and lists, and the address of MLflow are not changed. The file stays valid YAML."""
    record = tmp_path / ".hydra/config.yaml"
    record.parent.mkdir()
    secret, long = "text: token=1 http://a@b/?c", f"{'a toy ' * 20}token=1 http://a@b/?c"
    content = {"tracking": {"uri": "postgresql://me@host/db?sslmode=require"}, "photos": "${oc.env:PHOTOS}",
               "sample": {"prompts": [secret, long], "negative_prompt": long},
               "dataset": {"concepts": [{"instance_prompt": secret, "instance_dir": SIGNED}]},
               "model": {"source": SIGNED, "revision": "x: token=s3cret", "resolution": 512}}
    record.write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    overrides = tmp_path / ".hydra/overrides.yaml"
    overrides.write_text(kept := f"- 'sample.negative_prompt={secret}'\n")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": {
        "runtime": {"output_dir": str(tmp_path)}, "output_subdir": ".hydra", "sweep": {"dir": str(tmp_path)}}}))
    cli.run_job(lambda: None, sweep=False)
    assert overrides.read_text() == mask_urls(kept) != kept
    content["model"] |= {"source": mask_urls(SIGNED), "revision": "x: token=***"}  # type: ignore[operator]
    content["dataset"]["concepts"][0]["instance_dir"] = mask_urls(SIGNED)  # type: ignore[index]
    assert OmegaConf.to_container(OmegaConf.load(record), resolve=False) == content
    assert "s3cret" not in record.read_text()


def test_titles_and_axes_tell_keys_apart_that_end_alike() -> None:
    assert key_names.short_names(["a.x", "b.x", "b.y"]) == {"a.x": "a.x", "b.x": "b.x", "b.y": "y"}
