"""Methods of other packages: found by name everywhere, and left out with a warning where they cannot be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dit_sparse import Schedule
from dit_sparse.cli import main
from dit_sparse.methods import METHODS, all_methods, find_method
from dit_sparse.methods import plugins as plugins_module

MODULE = """
from dataclasses import dataclass, field
from typing import ClassVar
from dit_sparse.methods import Dense

@dataclass(frozen=True)
class Everything(Dense):
    share: float = field(default=0.5, metadata={"help": "a parameter"})
    name: ClassVar[str] = "everything"

class NotADataclass:
    name = "loose"

@dataclass
class Thawed:
    name: ClassVar[str] = "thawed"
    version = paper = scope = refresh = uses_lse = check = shared_order = plan = None

@dataclass(frozen=True)
class Partial:
    name: ClassVar[str] = "partial"
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a module and a package's metadata where the interpreter finds both, as pip does."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(package: str, points: dict[str, str], module: str = MODULE) -> Path:
        name = package.replace("-", "_")
        (tmp_path / f"{name}.py").write_text(module)
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{entry} = {name}:{value}" for entry, value in points.items()]
        (folder / "entry_points.txt").write_text(f"[{plugins_module.GROUP}]\n" + "\n".join(lines) + "\n")
        return tmp_path

    yield put
    plugins_module._load.cache_clear()
    for name in [name for name in sys.modules if name.startswith("plug_")]:
        del sys.modules[name]


def test_a_plugin_is_found_by_name_in_python_and_configs(install) -> None:
    install("plug-one", {"everything": "Everything"})
    assert find_method("everything").__name__ == "Everything"
    assert [*all_methods()] == [*METHODS, "everything"]
    schedule = Schedule.from_config({"method": "everything", "share": 0.25})
    assert schedule.method.share == 0.25
    assert Schedule.from_config(schedule.to_config()) == schedule


def test_a_plugin_is_listed_by_the_command_line(install, capsys: pytest.CaptureFixture[str]) -> None:
    install("plug-one", {"everything": "Everything"})
    with pytest.raises(SystemExit, match="0"):
        main(["methods", "--json"])
    listing = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert [parameter["name"] for parameter in listing["everything"]["parameters"]] == ["share"]


@pytest.mark.parametrize(
    ("entry", "value", "module", "message"),
    [
        ("broken", "Everything", "raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("missing", "Nothing", MODULE, "has no attribute 'Nothing'"),
        ("loose", "NotADataclass", MODULE, "must be a frozen dataclass"),
        ("thawed", "Thawed", MODULE, "must be a frozen dataclass: methods keep no state"),
        ("partial", "Partial", MODULE, "lacks version, paper"),
        ("other", "Everything", MODULE, "is called 'everything'"),
        ("adaspa", "Everything", MODULE, "'adaspa' is a method of dit-sparse itself"),
    ],
)
def test_a_bad_plugin_is_left_out_with_one_warning(install, entry, value, module, message) -> None:
    install("plug-bad", {entry: value}, module)
    with pytest.warns(UserWarning, match=message) as caught:
        found = all_methods(), all_methods()
    assert found == (METHODS, METHODS)
    assert len(caught) == 1
    assert f"plug-in {entry!r} of plug-bad" in str(caught[0].message)
    if entry in METHODS:
        assert find_method(entry) is METHODS[entry]
    else:
        with pytest.raises(ValueError, match=message):
            find_method(entry)


@pytest.mark.filterwarnings("ignore:plug-in")
def test_two_plugins_of_one_name_are_both_refused(install) -> None:
    install("plug-one", {"everything": "Everything"})
    install("plug-two", {"everything": "Everything"})
    with pytest.raises(ValueError, match=r"claimed by 'everything' of plug-one .* and by 'everything' of plug-two"):
        find_method("everything")


def test_unknown_names_suggest_plugins_too(install) -> None:
    install("plug-one", {"everything": "Everything"})
    with pytest.raises(ValueError, match="did you mean 'everything'"):
        find_method("evrything")
