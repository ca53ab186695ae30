"""`settings=` among the arguments of a model: the run is that of the explicit arguments, for this base model alone."""

import dataclasses

import pytest

from tests.tuned.files import candidate, tuned
from ttt_harness.adapters.names import fingerprint
from ttt_harness.errors import ConfigError
from ttt_harness.run.local import stated_settings
from ttt_harness.run.model_arguments import ModelArguments, explicit_arguments
from ttt_harness.tuned import tuned_folder, write_tuned

B = candidate(3e-4, 3)
GAINS = {"icl": [0] * 10, B.name: [1] * 10}
LOSES = {"icl": [1] * 10, B.name: [0] * 10}


@pytest.fixture
def write(tiny_model, tmp_path):
    def write(path=tmp_path / "tuned.json", **others):
        others = {"fingerprint": fingerprint(tiny_model), **others}
        write_tuned(tuned({**dict.fromkeys("abcde", GAINS), "f": LOSES}, [B], **others), path)
        return str(path)

    return write


def parse(model, **arguments):
    return ModelArguments.parse(str(model), "float32", **arguments)


def test_a_run_is_that_of_the_explicit_arguments(tiny_model, write):
    path = write()
    found, explicit = parse(tiny_model, settings=path, lora_rank=8), parse(tiny_model, lr=3e-4, epochs=3, lora_rank=8)
    assert found.config_of("a") == explicit.config == dataclasses.replace(found.config, settings=None, choose=None)
    assert (found.engine, found.base_model()) == (explicit.engine, explicit.base_model())
    assert found.given == {**explicit.given, "method": "ttt"}  # what workers parse: they need no file
    said = stated_settings(found.config, found.tuned)
    assert said == {**stated_settings(explicit.config), "settings": path, "choose": "all", "setting": B.name}
    assert found.tuned_setting("a")["name"] == B.name
    assert explicit.tuned_setting("a") is None
    assert explicit_arguments(str(tiny_model), {"settings": path, "lora_rank": 8}) == {"lora_rank": 8, **B.model_args}


def test_each_task_has_its_own_settings(tiny_model, write):
    found = parse(tiny_model, settings=write(), choose="task")
    assert found.config.fits
    assert found.config_of("a").fits
    assert not found.config_of("f").fits
    assert stated_settings(found.config, found.tuned)["choose"] == "task"


def test_the_newest_file_of_the_model_is_taken(tiny_model, write, monkeypatch, tmp_path):
    monkeypatch.setenv("TTT_CACHE_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"settings=auto finds no settings for .* with method=ttt and k=10"):
        parse(tiny_model, settings="auto")
    path = write(tuned_folder() / "mine" / "tuned.json")
    assert parse(tiny_model, settings="auto").config.settings == path
    with pytest.raises(ConfigError, match="with method=ttt and k=5"):
        parse(tiny_model, settings="auto", k=5)
    assert explicit_arguments(str(tiny_model), {"settings": "auto"}) == dict(B.model_args)


def test_a_file_of_another_model_is_refused(tiny_model, write):
    with pytest.raises(ConfigError, match="was found for tiny, whose weights are others than those of pretrained="):
        parse(tiny_model, settings=write(fingerprint="1" * 64))


@pytest.mark.parametrize("wrong", [3, "", [], {}, True, "/nowhere", "1" * 5000, "a\0b", float("nan")])
@pytest.mark.parametrize("name", ["settings", "choose"])
def test_any_value_is_refused_in_one_sentence(tiny_model, name, wrong):
    with pytest.raises(ConfigError) as caught:
        parse(tiny_model, **{name: wrong})
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) or "tuned.json" in str(caught.value) or "cannot be read" in str(caught.value)
