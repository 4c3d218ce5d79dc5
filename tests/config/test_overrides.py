"""Overrides as people type them: what is accepted, and the one sentence that each wrong one ends in."""

import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dreambooth.config.compose import load
from dreambooth.config.generate import Generate
from dreambooth.config.overrides import escape_interpolations, explain, prepare
from dreambooth.config.schema import Config
from dreambooth.convert import Convert, parse_options
from dreambooth.entrypoint import compose_run
from dreambooth.errors import UserError
from dreambooth.utils.suggestions import closest
from tests.support.configs import compose_config

CONCEPTS = "[{instance_dir: 'DIR', instance_prompt: 'TEXT'}]"
PROMPT = "dataset.instance_prompt"
COLLISION = f"the value of {PROMPT} has a comma, which separates the values of a sweep: type "


@pytest.mark.parametrize("word, sentence", [
    ("train.max_step=3", "there is no setting train.max_step: did you mean train.max_train_steps=3?"),
    ("learning_rate=1e-4", "there is no setting learning_rate: did you mean train.learning_rate=1e-4?"),
    ("seed=3", "there is no setting seed: did you mean train.seed=3, sample.seed=3 or evaluate.seed=3?"),
    ("trian.seed=3", "there is no setting trian.seed: did you mean train.seed=3?"),
    ("mdel=sd15", "there is no setting mdel: did you mean model=sd15?"),
    ("model@x=sd15", "there is no setting model@x: did you mean model=sd15?"),
    ("+train.foo=3", "there is no setting train.foo: type --help for all keys"),
    ("foo/bar=3", "there is no setting foo/bar: type --help for all keys"),
    ("hydra.foo=3", "there is no setting hydra.foo: type --cfg hydra for all of Hydra's keys"),
    ("+train.seed=3", "train.seed is a setting already: type it without +"),
    ("+model=sd15", "model is a setting already: type it without +"),
    ("model=sd3", "there is no model=sd3: did you mean model=sdxl? The options are flux2_klein, qwen_image, "
     "sd15, sd21, sd35_medium, sdxl, tiny, tiny_flow, z_image"),
    ("model=3", "there is no model=3: the options are flux2_klein, qwen_image, sd15, sd21, sd35_medium, sdxl, tiny, "
     "tiny_flow, z_image"),
    ("train.max_train_steps=ten", "train.max_train_steps must be a whole number, not ten"),
    ("train.max_train_steps=1.5", "train.max_train_steps must be a whole number, not 1.5"),
    ("train.learning_rate=null", "train.learning_rate must be a number, not null"),
    ("train.use_ema=maybe", "train.use_ema must be true or false, not maybe"),
    ("train.use_ema=", "train.use_ema must be true or false, not empty"),
    ("train.snr_gamma=x", "train.snr_gamma must be a number, or null, not x"),
    ("attention.kind=Eager", "attention.kind must be sdpa, xformers, sliced or eager, not Eager: did you mean "
     "attention.kind=eager?"),
    ("train=3", "train is a group of settings: type train.KEY=VALUE; --help lists the keys"),
    ("sample.prompts=a zwx", "sample.prompts must be a list such as ['a text','another text'], or null, not a zwx: "
     """type sample.prompts="['a zwx']\""""),
    (f"{PROMPT}=[red]", f"""{PROMPT} must be a text, or null, not [red]: type {PROMPT}="'[red]'\""""),
    ("dataset.concepts=3", f"dataset.concepts must be a list such as {CONCEPTS}, not 3"),
    ("dataset.concepts=[{instance_promt: a}]", f'Key \'instance_promt\' not in \'Subject\': type dataset.concepts="'
     f'{CONCEPTS}"'),
    (f"{PROMPT}=a zwx, red", f"""{COLLISION}{PROMPT}="'a zwx, red'", or add -m for a sweep"""),
    ("train.seed=1,2", "the value of train.seed has a comma, which separates the values of a sweep: type one value, or "
     "add -m for a sweep"),
    ("train.seed=range(1,3)", "train.seed=range(1,3) is a sweep: add -m, or type one value"),
    ("name=${nope}", "name contains an interpolation that cannot be resolved (Interpolation key 'nope' not found): "
     "type name=VALUE"),
    ("run_root=${oc.env:NOPE}", "run_root contains an interpolation that cannot be resolved (Environment variable "
     "'NOPE' not found): type run_root=VALUE"),
    ("name=???", "name=??? stands for a missing value: type name=VALUE"),
    ("train.seed='${'", "train.seed contains ${ without a matching }: type \\${ for the characters ${"),
])
def test_a_wrong_override_is_one_sentence(word: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_run([word])
    assert str(caught.value) == sentence


@pytest.mark.parametrize("words, sentence", [
    (["sample.prompts=[a,b"], "the value of sample.prompts is not a list that Hydra can read: type "
     """sample.prompts="['a text','another text']\""""),
    (["train.seed"], "train.seed has no value: type train.seed=VALUE"),
    ([f"{PROMPT}=a", "zwx", "toy", "name=x"], "zwx is not KEY=VALUE, and a value with blanks needs quotes: type "
     f'{PROMPT}="a zwx toy"'),
    (["model=tiny", "help"], "help is not KEY=VALUE: type --help for all keys"),
    (["model=sdxl hardware=g4dn"], "model=sdxl hardware=g4dn is several overrides in one word: type them without "
     "quotes around all of them"),
    (["train.use_ema=2"], "train.use_ema must be true or false, not 2"),
    (["=3"], "=3 has no key: type KEY=VALUE; type --help for all keys"),
    (["my key=3"], "there is no setting my key: type --help for all keys"),
    (["~train.seed"], "train.seed cannot be removed: type train.seed=VALUE, or leave ~train.seed out"),
    ([f"{PROMPT}=a \udcff toy"], f"{PROMPT}=a ? toy is not valid UTF-8: type its text again"),
])
def test_a_word_that_is_no_override_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(words, Config)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("text", ["a zwx toy, red (big)", "it's a zwx", "a zwx 🐶", "[red] toy", "{a|b} toy", "a: b=c",
                                  "a #1 toy", "50% & more; \"x\"", "~ a toy", "a ${zwx toy, $HOME (`id`) !"])
def test_what_the_sentence_says_can_be_pasted(text: str) -> None:
    """Bash splits the line into words, and the word gives this very prompt."""
    with pytest.raises(UserError) as caught:
        compose_run([f"{PROMPT}={text}"])
    line = str(caught.value).partition(": type ")[2].removesuffix(" for one text").partition(", or add -m")[0]
    [word] = subprocess.check_output(["bash", "-c", f"printf '%s\\n' {line}"], text=True).splitlines()
    config, _ = compose_run([word])
    assert config.dataset.instance_prompt == text


@pytest.mark.parametrize("raw, text", [
    ("a ${zwx} toy", "a ${zwx} toy"), ("'a ${oc.env:HOME} toy'", "a ${oc.env:HOME} toy"), ("'a \\${b}'", "a ${b}"),
    ("'half ${zwx'", "half ${zwx"), ("1.50", "1.50"), ("1e3", "1e3"), ("true", "true"), ("'true'", "true"),
    ("a\\, b", "a, b")])
def test_a_prompt_is_text(raw: str, text: str) -> None:
    config, _ = compose_run([f"{PROMPT}={raw}", f"sample.prompts=[{raw!r}]" if "'" not in raw else "name=x"])
    assert config.dataset.instance_prompt == text


def test_a_prompt_of_a_list_or_a_file_is_text(tmp_path: Path) -> None:
    config, _ = compose_run(["sample.prompts=['a ${zwx} toy',b]", "dataset.instance_dir=null", "dataset.class_prompt="
                             "null", "dataset.instance_prompt=null", "dataset.concepts=[{instance_prompt: 'a ${b}', "
                             "class_prompt: c}]"])
    assert (config.sample.prompts, config.dataset.concepts[0].instance_prompt) == (["a ${zwx} toy", "b"], "a ${b}")
    cfg = compose_config()
    OmegaConf.update(cfg, "dataset.instance_prompt", "a ${zwx}")
    OmegaConf.update(cfg, "dataset.concepts", [{"class_prompt": "a ${c}"}])
    cfg.name = "${model.name}"
    config = load(cfg)
    assert (config.dataset.instance_prompt, config.dataset.concepts[0].class_prompt) == ("a ${zwx}", "a ${c}")
    assert config.name == "tiny"


def test_a_fault_that_is_its_own_cause_is_not_followed_for_ever() -> None:
    fault = RuntimeError()
    fault.__cause__ = fault
    assert explain(fault, Config) is None


def test_escaping_twice_changes_nothing() -> None:
    once = escape_interpolations("a ${b} \\${c} \\\\${d}")
    assert once == "a \\${b} \\${c} \\\\\\${d}" == escape_interpolations(once)


@pytest.mark.parametrize("raw, value", [
    ("~/photos", "/h/photos"), ("~", "/h"), ("~/my photos (2)", "/h/my photos (2)"), ("'~/a'", "/h/a"),
    ("[~/a,'~/b']", ["/h/a", "/h/b"]), ("a~", None), ("/x/~/y", None)])
def test_a_tilde_is_the_home_folder(raw: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    if value is None:
        with pytest.raises(UserError, match="needs quotes"):
            prepare([f"lora={raw}"], Generate)
    else:
        [word] = prepare([f"lora={raw}"], Generate)
        assert OverridesParser.create().parse_override(word).value() == value


def test_convert_names_its_keys_as_typed() -> None:
    with pytest.raises(UserError, match=r"^resolution must be a whole number, or null, not ten$"):
        parse_options(OmegaConf.create({"in": "x", "resolution": "ten"}))
    with pytest.raises(UserError, match=r"^in must be a text, or null, not "):
        parse_options(OmegaConf.create({"in": ["x"]}))
    with pytest.raises(UserError, match=r"^the value of in needs quotes, .*: type in=\"'a, \("):
        prepare(["in=a, (", "out=b"], Convert)


def test_similar_names_are_found() -> None:
    choices = ["train.seed", "sample.seed", "train.max_train_steps", "dataset.instance_prompt"]
    assert closest("train.max_step", choices) == ["train.max_train_steps"]
    assert closest("prompt", choices) == ["dataset.instance_prompt"]
    assert closest("zzz", choices) == []
