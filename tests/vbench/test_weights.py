import gzip
import hashlib
import zipfile
from dataclasses import replace

import pytest
import torch

from dit_sparse.vbench import DIMENSIONS
from dit_sparse.vbench.dimensions import Dimension, WeightFile
from dit_sparse.vbench.weights import download, problems, weights_folder, weights_hash


def _dimension(*files, **changes):
    return replace(Dimension("d", "quality", files=files), **changes)


@pytest.fixture
def published(tmp_path):
    """A file where it is published."""
    path = tmp_path / "published" / "a.pth"
    path.parent.mkdir()
    torch.save({"weight": torch.arange(1000)}, path)
    return path


def test_names_what_is_missing_and_where_it_comes_from(tmp_path):
    lines = problems(DIMENSIONS["subject_consistency"], tmp_path)
    assert len(lines) == 2
    assert all(
        line.startswith("subject_consistency: ") and "is missing; it comes from https://" in line for line in lines
    )
    assert all(f"below $VBENCH_CACHE_DIR or --weights (now {tmp_path})" in line for line in lines)
    assert problems(DIMENSIONS["temporal_flickering"], tmp_path) == []


@pytest.mark.parametrize("old_format", [False, True])
def test_weights_cut_short(tmp_path, old_format):
    dimension, path = _dimension(WeightFile("a.pth", "https://x")), tmp_path / "a.pth"
    torch.save({"weight": torch.arange(1000)}, path, _use_new_zipfile_serialization=not old_format)
    assert problems(dimension, tmp_path) == []
    data = path.read_bytes()
    for kept in (len(data) - 100, len(data) // 2, 10, 0):
        path.write_bytes(data[:kept])
        (line,) = problems(dimension, tmp_path)
        assert "is cut short or damaged; remove it" in line


def test_vocabulary_cut_short(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes(range(256)) * 100))
    dimension = _dimension(WeightFile("a.gz", "https://x"))
    assert problems(dimension, tmp_path) == []
    path.write_bytes(path.read_bytes()[:-9])
    assert "cut short" in problems(dimension, tmp_path)[0]


def test_weights_that_are_not_the_published_ones(tmp_path, published):
    data = published.read_bytes()
    (tmp_path / "a.pth").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    assert problems(_dimension(WeightFile("a.pth", "", sha256[:8])), tmp_path) == []
    (line,) = problems(_dimension(WeightFile("a.pth", "", "0" * 8)), tmp_path)
    assert "is not the published file" in line


def test_hash_changes_with_the_weights(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "a").write_text("1")
    (tmp_path / "code" / "hubconf.py").write_text("1")
    dimension = _dimension(WeightFile("a", ""), WeightFile("code/", ""))
    hashes = [weights_hash(dimension, tmp_path, tmp_path / "cache")]
    assert hashes == [weights_hash(dimension, tmp_path, tmp_path / "cache")]
    (tmp_path / "code" / "hubconf.py").write_text("2")
    hashes.append(weights_hash(dimension, tmp_path, tmp_path / "cache"))
    (tmp_path / "a").write_text("22")
    hashes.append(weights_hash(dimension, tmp_path, tmp_path / "cache"))
    assert len(set(hashes)) == 3
    assert weights_hash(_dimension(), tmp_path, tmp_path) == ""


def test_downloads_what_is_missing_and_nothing_else(tmp_path, published):
    archive = published.with_name("code.zip")
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("dino-main/hubconf.py", "x = 1")
        packed.writestr("other/large", "x")
    files = (
        WeightFile("models/a.pth", published.as_uri()),
        WeightFile("code/", archive.as_uri(), member="dino-main/"),
        WeightFile("there.pth", "file:///nowhere"),
    )
    (tmp_path / "there.pth").write_bytes(published.read_bytes())
    assert download([_dimension(*files)], tmp_path) == ["models/a.pth", "code/"]
    assert problems(_dimension(*files), tmp_path) == []
    assert not list(tmp_path.rglob(".partial-*"))
    assert not list(tmp_path.rglob("large"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "file:///nowhere"}, "cannot be fetched"),
        ({"sha256": "0" * 8}, "another file than the published one"),
        ({"member": "b/"}, "is no zip archive|has no b/"),
    ],
)
def test_a_download_that_fails_leaves_nothing(tmp_path, published, changes, message):
    file = replace(WeightFile("models/a.pth", published.as_uri()), **changes)
    with pytest.raises(ValueError, match=message):
        download([_dimension(file)], tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    assert weights_folder() == tmp_path
    assert weights_folder(tmp_path / "own") == tmp_path / "own"
    monkeypatch.delenv("VBENCH_CACHE_DIR")
    assert str(weights_folder()).endswith(".cache/vbench")


def test_a_model_of_the_hub_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert problems(_dimension(hub_model=True), tmp_path) == [
        "d: bert-base-uncased is not in the Hugging Face cache: hf download bert-base-uncased"
    ]
