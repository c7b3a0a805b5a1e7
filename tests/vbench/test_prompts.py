import json
from collections import Counter

import pytest

from dit_sparse.vbench import DIMENSIONS, find_dimensions
from dit_sparse.vbench.environment import find_environment
from dit_sparse.vbench.prompts import read_prompts, samples
from tests.vbench.standin import INFO


@pytest.fixture
def info(tmp_path):
    path = tmp_path / "info.json"
    path.write_text(json.dumps(INFO))
    return path


def test_a_prompt_of_several_entries_comes_once(info):
    *_, facade = read_prompts(info)
    assert facade.text == "a façade"
    assert facade.dimensions == ("overall_consistency", "aesthetic_quality", "imaging_quality", "appearance_style")
    assert facade.auxiliary == {"appearance_style": {"appearance_style": "Ukiyo"}}
    assert len(read_prompts(info)) == 4


def test_counts_samples_as_the_protocol_does(info):
    assert Counter(sample.prompt.text for sample in samples(read_prompts(info))) == {
        "a still cup": 25,
        "a red cup": 5,
        "a cat": 5,
        "a façade": 5,
    }
    chosen = find_dimensions(["color"])
    names = [sample.stem for sample in samples(read_prompts(info, chosen), chosen)]
    assert names == [f"a red cup-{index}" for index in range(5)]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '[{"prompt_en": "a"}]'])
def test_refuses_another_file(tmp_path, text):
    path = tmp_path / "info.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no info file of VBench"):
        read_prompts(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "none.json")


def test_dimensions_by_name():
    assert [d.name for d in find_dimensions(["scene", "color", "scene"])] == ["scene", "color"]
    assert len(find_dimensions(None)) == 16
    assert len(find_dimensions(None, custom=True)) == 9
    assert len(find_dimensions(["human_action"], custom=True)) == 1
    with pytest.raises(ValueError, match="no such VBench dimension: colour; there are subject_consistency, "):
        find_dimensions(["colour"])
    with pytest.raises(ValueError, match="color, scene: needs VBench's own prompts"):
        find_dimensions(["color", "human_action", "scene"], custom=True)


def test_the_official_prompts(real):
    """What the package holds: 946 entries, two of whose prompts stand there twice."""
    found = read_prompts(find_environment(real).info)
    assert len(found) == 944
    assert len(samples(found)) == 75 * 25 + (944 - 75) * 5
    counts = Counter(name for prompt in found for name in prompt.dimensions)
    assert set(counts) == set(DIMENSIONS)
    assert (counts["temporal_flickering"], counts["human_action"], counts["subject_consistency"]) == (75, 100, 72)
    stems = [sample.stem for sample in samples(found)]
    assert len(set(stems)) == len(stems)
    assert max(len(stem.encode()) for stem in stems) + len(".mp4") < 255
