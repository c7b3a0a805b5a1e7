"""The file as such: it is whole, it asks for nothing, and no text of a run is a part of its code."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from dit_sparse.report import load, write_page
from tests.report.conftest import PROMPT, manifest_line


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        self._inside = dict(attributes).get("id") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self.texts[self._inside] = self.texts.get(self._inside, "") + data


def _page(folder: Path, **options) -> tuple[str, _Elements]:
    write_page(load(folder), folder / "report.html", **options)
    text = (folder / "report.html").read_text("utf-8")
    elements = _Elements()
    elements.feed(text)
    return text, elements


def test_it_carries_everything(folder) -> None:
    _, page = _page(folder)
    content, line = json.loads(page.texts["content"]), manifest_line(folder)
    (group,) = content["groups"]
    for run, name in zip(group["runs"], (line["dense_file"], line["file"]), strict=True):
        uri = page.texts[run["media"]["part"]]
        assert base64.b64decode(uri.removeprefix("data:video/mp4;base64,")) == (folder / name).read_bytes()
    assert json.loads(page.texts[group["runs"][1]["trace"]]) == json.loads((folder / line["trace"]).read_text())
    assert not [attributes for _, attributes in page.found if "src" in attributes]
    assert [attributes["href"] for tag, attributes in page.found if tag == "link"] == ["data:,"]
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_nothing_of_a_run_becomes_code(folder, edit) -> None:
    edit(prompt=PROMPT, model="</script><img src=x onerror=alert(1)>", device="${x} $title")
    text, page = _page(folder)
    assert json.loads(page.texts["content"])["groups"][0]["title"] == PROMPT
    scripts = [attributes for tag, attributes in page.found if tag == "script"]
    assert [s.get("type") for s in scripts if s.get("type") not in ("application/json", "text/plain")] == ["module"]
    assert "img" not in {tag for tag, _ in page.found}
    assert "<script>document" not in text


def test_only_its_own_script_may_run(folder) -> None:
    text, page = _page(folder)
    (policy,) = [a["content"] for tag, a in page.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"\son\w+=", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))


def test_links_are_relative_to_the_page(folder) -> None:
    line = manifest_line(folder)
    (folder / line["file"]).rename(folder / "a b#.mp4")
    manifest = folder / "manifest.jsonl"
    manifest.write_text(json.dumps(line | {"file": "a b#.mp4"}) + "\n")
    out = folder / "pages" / "p.html"
    write_page(load(folder), out, link=True)
    page = _Elements()
    page.feed(out.read_text("utf-8"))
    media = json.loads(page.texts["content"])["groups"][0]["runs"][1]["media"]
    assert media["link"] == "../a%20b%23.mp4"
    assert "part" not in media
    assert not [name for name in page.texts if name and name.startswith("media")]
