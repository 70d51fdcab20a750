"""Registries: the project's own implementations, and those of other packages."""

import sys
from importlib.metadata import EntryPoint

import pytest

from diffusion import registry as registry_module
from diffusion.errors import InputError
from diffusion.registry import Registry


@pytest.fixture
def installed(monkeypatch):
    """Entry points of other packages, by name."""
    values = {}
    monkeypatch.setattr(
        registry_module,
        "entry_points",
        lambda group: [EntryPoint(name, value, group) for name, value in values.items()],
    )
    return values


@pytest.fixture
def codecs():
    return Registry("codec", "ray_ddpm.codecs", {"json": "json:dumps", "csv": "csv:reader"})


def test_own_implementations_come_in_their_order(codecs):
    assert list(codecs) == ["json", "csv"] and len(codecs) == 2
    assert codecs["json"]([1]) == "[1]"


def test_listing_names_imports_nothing(monkeypatch):
    monkeypatch.delitem(sys.modules, "sndhdr", raising=False)
    codecs = Registry("codec", "ray_ddpm.codecs", {"wav": "a_module_that_is_not_there:read"})
    assert list(codecs) == ["wav"] and "wav" in codecs
    with pytest.raises(ModuleNotFoundError):
        codecs["wav"]


def test_other_packages_add_implementations_but_replace_none(codecs, installed):
    installed.update({"lower": "string:ascii_lowercase", "json": "string:digits"})
    assert list(codecs) == ["json", "csv", "lower"]
    assert codecs["lower"].startswith("abc")
    assert codecs["json"]([1]) == "[1]"


def test_a_name_that_is_not_registered_is_refused_with_those_that_are(codecs, installed):
    installed["lower"] = "string:ascii_lowercase"
    codecs.check("lower", "file.codec_name")
    with pytest.raises(InputError, match=r"^--file\.codec-name xml: give one of json, csv, lower$"):
        codecs.check("xml", "file.codec_name")
    with pytest.raises(KeyError):
        codecs["xml"]


def test_a_package_that_cannot_be_imported_is_named(codecs, installed):
    installed["broken"] = "a_module_that_is_not_there:codec"
    with pytest.raises(InputError, match="codec broken: a_module_that_is_not_there:codec cannot be imported"):
        codecs["broken"]
