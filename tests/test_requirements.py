"""The lock files and the extra of pyproject.toml agree where they name the same package."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def pinned(lines):
    """Of each ``name==version`` the version, by the name as pip compares it."""
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pins}


def locked(name):
    return pinned((ROOT / "requirements" / name).read_text().splitlines())


def test_the_environment_without_a_framework_has_the_releases_of_the_one_with_vllm():
    vllm = locked("vllm-cpu.txt")
    differing = {name: version for name, version in locked("dev.txt").items() if vllm.get(name, version) != version}
    assert not differing


def test_the_extra_for_developers_has_the_releases_of_the_lock_file():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    assert pinned(extra).items() <= locked("dev.txt").items()
