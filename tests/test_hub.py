"""The folder of weights, and the folder that a name means."""

import pytest

from nanokv.core.errors import CheckpointError
from nanokv.hub import home as home_module
from nanokv.hub.catalog import CATALOG, CatalogEntry
from nanokv.hub.home import folder_for, is_hub_id, resolve_model, weights_dir


@pytest.fixture
def home(tmp_path, monkeypatch):
    path = tmp_path / "home"
    monkeypatch.setenv("NANOKV_HOME", str(path))
    monkeypatch.chdir(tmp_path)
    return path


def model(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_the_weights_folder_is_chosen_in_this_order(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOKV_HOME", str(tmp_path / "mine"))
    assert weights_dir() == tmp_path / "mine"
    monkeypatch.setenv("NANOKV_HOME", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_dir() == tmp_path / "mine"
    monkeypatch.delenv("NANOKV_HOME")
    monkeypatch.setattr(home_module, "checkout_root", lambda: tmp_path / "checkout")
    assert weights_dir() == tmp_path / "checkout" / "weights"
    monkeypatch.setattr(home_module, "checkout_root", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert weights_dir() == tmp_path / "cache" / "nanokv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights_dir() == tmp_path / ".cache" / "nanokv"


def test_a_checkout_is_known_by_its_project_file(tmp_path, monkeypatch):
    package = tmp_path / "nanokv" / "hub" / "home.py"
    package.parent.mkdir(parents=True)
    monkeypatch.setattr(home_module, "__file__", str(package))
    assert home_module.checkout_root() is None
    for content, root in (("[project]\nname = 'other'", None), ("not toml", None), ("", None)):
        (tmp_path / "pyproject.toml").write_text(content)
        assert home_module.checkout_root() == root
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'nanokv'")
    assert home_module.checkout_root() == tmp_path


def test_a_model_is_a_folder_or_a_name_or_a_hub_id(home):
    here = model(home.parent / "here")
    assert resolve_model(here) == here
    assert resolve_model("here").resolve() == here
    pulled, hub = model(home / "smollm2-135m-instruct"), model(home / "Org--Name")
    own = model(home / "own-name")
    assert resolve_model("smollm2-135m-instruct") == pulled
    assert resolve_model("Org/Name") == hub
    assert resolve_model("own-name") == own


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("smollm2-135m-instruct", "run `nanokv pull smollm2-135m-instruct`"),
        ("Org/Name", "run `nanokv pull Org/Name`"),
        ("./some.gguf", "run `nanokv pull ./some.gguf`"),
        ("nonsense", "a name (smollm2-135m-instruct, tiny-gqa, tiny-mla, tiny-hybrid) or ORG/NAME"),
        ("", "give a folder"),
        ("..", "no config.json"),
        ("empty", "no config.json"),
        ("shape-only", "not its weights"),
    ],
)
def test_the_error_for_a_missing_model_is_one_line_that_helps(home, monkeypatch, name, advice):
    monkeypatch.setitem(CATALOG, "shape-only", CatalogEntry("shape-only", "", {}))
    (home.parent / "empty").mkdir()
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_was_not_pulled_needs_no_manifest(home):
    path = model(home / "mine")
    (path / "model.safetensors").write_bytes(b"x")
    assert resolve_model("mine") == path


def test_hub_ids_are_two_plain_names():
    assert is_hub_id("Org/Some-Name_1.5")
    for name in ("Org", "Org/", "/Name", "a/b/c", "../x", "./x", "Org/.x", "Org/Na me"):
        assert not is_hub_id(name)
    assert folder_for("Org/Name").name == "Org--Name"
