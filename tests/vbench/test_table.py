import json
import random

import pytest

from dit_sparse.vbench import DIMENSIONS, read_scores, totals
from dit_sparse.vbench.results import DimensionPlan, result_file, write_plan
from dit_sparse.vbench.table import merge

# Published with the leaderboard: lowest and highest score where they are not 0 and 1.
RANGES = {
    "subject_consistency": (0.1462, 1),
    "background_consistency": (0.2615, 1),
    "temporal_flickering": (0.6293, 1),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0, 0.364),
    "overall_consistency": (0, 0.364),
}
QUALITY = ["subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness"]
QUALITY += ["aesthetic_quality", "imaging_quality", "dynamic_degree"]
SEMANTIC = ["object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene"]
SEMANTIC += ["appearance_style", "temporal_style", "overall_consistency"]


def leaderboard(scores):
    """The leaderboard's arithmetic, written down once more."""
    scaled = {}
    for name, value in scores.items():
        low, high = RANGES.get(name, (0, 1))
        scaled[name] = (value - low) / (high - low) * (0.5 if name == "dynamic_degree" else 1)
    quality, semantic = sum(scaled[n] for n in QUALITY) / 6.5, sum(scaled[n] for n in SEMANTIC) / 9
    return {"quality": quality, "semantic": semantic, "total": (4 * quality + semantic) / 5}


def write_scores(folder, scores, **changes):
    """A folder of scores: `scores` has a list of results, or of bare scores, for each dimension."""
    for name, results in scores.items():
        results = [
            r if isinstance(r, dict) else {"score": r, "frames": 5, "details": {"frame_count": 4}} for r in results
        ]
        keys = {f"video-{number}": f"{name}{number}" for number in range(len(results))}
        filtered = {"judged": 1, "kept": 1, "unjudged": [], "prompts_without": []}
        plan = {"static_filter": filtered} | changes.get(name, {})
        write_plan(folder, DimensionPlan(name, changes.get("custom", False), keys, **plan))
        for key, result in zip(keys.values(), results, strict=True):
            result_file(folder, name, key).write_text(json.dumps(result))


@pytest.mark.parametrize("seed", range(5))
def test_totals_are_the_leaderboards(seed):
    scores = {name: random.Random(seed * 100 + i).random() for i, name in enumerate(DIMENSIONS)}
    assert set(scores) == {*QUALITY, *SEMANTIC}
    assert totals(scores) == pytest.approx(leaderboard(scores), rel=1e-12)


def test_a_missing_dimension_is_not_a_zero():
    with pytest.raises(ValueError, match="scene is not there"):
        totals(dict.fromkeys(set(DIMENSIONS) - {"scene"}, 0.5))


def test_reads_a_complete_folder(tmp_path):
    raw = dict.fromkeys(DIMENSIONS, 0.9) | {"imaging_quality": 70.0, "scene": 0.4}
    write_scores(tmp_path, {name: [value, value] for name, value in raw.items()})
    found = read_scores(tmp_path)
    assert not found.lacks
    assert all(row.videos == 2 for row in found.dimensions)
    # VBench gives imaging quality from 0 to 100 for a video, and from 0 to 1 for the dimension.
    expected = leaderboard(raw | {"imaging_quality": 0.7})
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected)
    assert json.loads(json.dumps(found.to_dict()))["dimensions"]["imaging_quality"]["score"] == pytest.approx(0.7)


def test_consistency_is_weighted_by_pairs_of_frames():
    results = [{"score": 0.9, "frames": 2}, {"score": 0.5, "frames": 4}]
    assert merge(DIMENSIONS["subject_consistency"], results) == pytest.approx((0.9 * 1 + 0.5 * 3) / 4)
    assert merge(DIMENSIONS["aesthetic_quality"], results) == pytest.approx(0.7)


def test_counts_of_frames_are_pooled():
    results = [{"score": 1.0, "details": {"frame_count": 16}}, {"score": 0.0, "details": {"frame_count": 4}}]
    assert merge(DIMENSIONS["scene"], results) == pytest.approx(0.8)
    results = [{"score": 0.2, "details": {"frame_results": [0] * 3}}, {"score": 0.4, "details": {"frame_results": [0]}}]
    assert merge(DIMENSIONS["appearance_style"], results) == pytest.approx(0.25)


def test_videos_without_the_object_do_not_count():
    color = DIMENSIONS["color"]
    assert merge(color, [{"score": None}, {"score": 0.5}, {"score": 1.0}]) == 0.75
    assert merge(color, [{"score": None}]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"color": {"missing": ("a red cup-3",)}}, "color: 1 videos are missing, such as 'a red cup-3'"),
        ({"color": {"unusable": ("a.mp4: the file is empty",)}}, "color: a.mp4: the file is empty"),
        ({"temporal_flickering": {"static_filter": None}}, "temporal_flickering: the static filter was not applied"),
        (
            {"temporal_flickering": {"static_filter": {"unjudged": ["x-0"]}}},
            "temporal_flickering: the static filter failed on 1 videos",
        ),
    ],
)
def test_an_incomplete_set_has_no_totals(tmp_path, changes, message):
    write_scores(tmp_path, {key: [0.9] for key in DIMENSIONS}, **changes)
    with pytest.raises(ValueError, match=message):
        read_scores(tmp_path)
    found = read_scores(tmp_path, allow_partial=True)
    assert found.quality is found.semantic is found.total is None
    assert len(found.dimensions) == 16
    assert any(message in line for line in found.lacks)


def test_a_result_that_is_not_there_is_missed(tmp_path):
    write_scores(tmp_path, {key: [0.9, 0.8] for key in DIMENSIONS})
    result_file(tmp_path, "scene", "scene1").unlink()
    with pytest.raises(ValueError, match="scene: 1 videos are not scored, such as 'video-1'"):
        read_scores(tmp_path)


def test_a_dimension_that_is_not_there_is_missed(tmp_path):
    write_scores(tmp_path, {"color": [0.9]})
    with pytest.raises(ValueError, match=r"subject_consistency: not scored \(and 14 more\); --allow-partial"):
        read_scores(tmp_path)


def test_other_videos_have_no_totals(tmp_path):
    write_scores(tmp_path, {key: [0.9] for key in DIMENSIONS}, custom=True)
    found = read_scores(tmp_path)
    assert (found.custom, found.total, found.lacks) == (True, None, ())


def test_refuses_what_is_no_folder_of_scores(tmp_path):
    with pytest.raises(ValueError, match="holds no scores"):
        read_scores(tmp_path)
    write_scores(tmp_path, {"color": [0.9]})
    result_file(tmp_path, "color", "color0").write_text("[]")
    with pytest.raises(ValueError, match="is no result"):
        read_scores(tmp_path)
    (tmp_path / "color" / "plan.json").write_text('{"missing": []}')
    with pytest.raises(ValueError, match="is no plan"):
        read_scores(tmp_path)
    write_scores(tmp_path, {"color": [0.9]})
    write_scores(tmp_path, {"scene": [0.9]}, custom=True)
    with pytest.raises(ValueError, match="folders of their own"):
        read_scores(tmp_path)
