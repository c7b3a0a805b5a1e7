import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse import LeastError, LoSA, Paro, PbsAttention
from dit_sparse.generate.config import build_schedule, read_config, split_arguments
from dit_sparse.generate.request import MAX_SEED, Clip, Request, Settings, clips, slug

SETTINGS = Settings(
    model="demo",
    config={"method": "adaspa", "version": 1, "density": 0.25},
    height=96,
    width=128,
    frames=29,
    steps=20,
    guidance=3.5,
    negative_prompt=None,
    dtype="float32",
    format="mp4",
    fps=16,
)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ()},
        {"height": 0},
        {"width": -8},
        {"frames": 0},
        {"steps": 0},
        {"num_samples": 0},
        {"fps": 0},
        {"fps": 1000},
        {"guidance": float("nan")},
        {"guidance": float("inf")},
        {"guidance": -1.0},
        {"seed": -1},
        {"seed": MAX_SEED, "num_samples": 2},
        {"format": "avi"},
    ],
)
def test_refuses_values_out_of_range(change):
    with pytest.raises(ValueError, match="must"):
        Request(**({"prompts": ("a",), "config": {}, "out": Path("x")} | change))


def test_slug_is_readable():
    assert slug("A big, RED ball!") == "a-big-red-ball"
    assert slug("Straße über Köln") == "strasse-uber-koln"
    assert slug("it's") == "its"
    assert slug("青い空") == slug("../..") == "prompt"
    assert slug("word " * 40) == "-".join(["word"] * 12)


@given(st.text())
def test_slug_is_always_a_safe_name(text):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug(text))
    assert len(slug(text)) <= 60


@given(st.lists(st.sampled_from(["a", "b", "A!", "青"]), min_size=1, max_size=6), st.integers(1, 3))
def test_names_and_keys_never_collide(prompts, num_samples):
    made = clips(prompts, 7, num_samples)
    assert len(made) == len(prompts) * num_samples
    assert len({clip.stem for clip in made}) == len(made)
    assert len({SETTINGS.key(clip) for clip in made}) == len(made)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"config": {"method": "adaspa", "version": 1, "density": 0.3}},
        {"height": 64},
        {"steps": 4},
        {"guidance": 1.0},
        {"negative_prompt": "x"},
        {"dtype": "bfloat16"},
        {"format": "gif"},
        {"fps": 8},
    ],
)
def test_key_depends_on_every_setting(change):
    clip = Clip(1, "a", 0)
    assert replace(SETTINGS, **change).key(clip) != SETTINGS.key(clip)


def test_key_does_not_depend_on_the_place_in_the_file():
    assert SETTINGS.key(Clip(1, "a", 0)) == SETTINGS.key(Clip(5, "a", 0))


def test_splits_arguments():
    positional, options = split_arguments(["--window", "4x12x16", "p.txt", "--dense-layers=0,1", "--warmup", "-0.1"])
    assert positional == ["p.txt"]
    assert options == {"window": "4x12x16", "dense_layers": "0,1", "warmup": "-0.1"}
    assert split_arguments(["-"]) == (["-"], {})
    assert split_arguments(["--a", "1", "--a=2"]) == ([], {"a": "2"})


@pytest.mark.parametrize("arguments", [["--window"], ["--window", "--warmup=1"], ["-x"], ["--"]])
def test_refuses_broken_arguments(arguments):
    with pytest.raises(ValueError, match="option"):
        split_arguments(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON.*line 1, column 2"),
        ("[1]", "must hold an object"),
        ('{"density": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
    ],
)
def test_refuses_broken_config_files(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(path)


def test_refuses_config_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("none.json", "binary", "."):
        with pytest.raises(ValueError, match="config file"):
            read_config(tmp_path / name)


def test_options_override_the_config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"method": "adaspa", "density": 0.5, "warmup": 0.1}')
    schedule = build_schedule(None, path, {"density": "0.3", "refresh": "0.5,0.75", "dense_layers": "0,1"})
    assert schedule.method.density == 0.3
    assert (schedule.warmup, schedule.refresh, schedule.dense_layers) == (0.1, (0.5, 0.75), (0, 1))


def test_method_option_overrides_the_config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"method": "adaspa", "version": 1, "density": 0.5}')
    assert build_schedule("paro", path, {}).to_config()["method"] == "paro"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"densty": "0.3"}, "no such option: --densty; did you mean --density"),
        ({"hieght": "96"}, "did you mean --height"),
        ({"height": "96"}, r"^method adaspa takes no --height \(it has --density, --block"),
        ({"density": "0"}, "density must be above 0"),
        ({"density": "nan"}, "density"),
        ({"density": "much"}, "density must be a number"),
        ({"warmup": "2"}, "warmup must be from 0 to 1"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_schedule("adaspa", None, options, ["height"])


@pytest.mark.parametrize(("method", "has"), [("lvsa", "--share"), ("dense", "no parameter")])
def test_a_density_for_a_method_without_one(method, has):
    with pytest.raises(ValueError, match=rf"^method {method} takes no --density \(it has {has}"):
        build_schedule(method, None, {"density": "0.5"}, ["density"])


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            None,
            {"plan_file": "x", "density": "0.2"},
            "--density 0.2 would have no effect beside --plan-file 'x', which",
        ),
        ({"method": "solattn"}, {"tau": "2", "layer_thresholds": "1,1"}, "beside --layer-thresholds (1.0, 1.0), which"),
        ({"method": "lea", "error": 0.1, "layer_thresholds": [0.1]}, {"error": "0.2"}, "beside --layer-thresholds"),
        (None, {"plan_file": "x", "tile": "2x4x4"}, "--tile 2x4x4 would have no effect beside --plan-file"),
        ({"method": "paro", "plan_file": "x", "density": 0.5}, {"sigma": "0.9"}, "--sigma 0.9 would have no effect"),
        ({"method": "pisa", "ramp": [0.5, 0.2]}, {"density": "0.2"}, "leave it out, or give --ramp none"),
        ({"method": "lea", "error": 0.1, "density": 0.5}, {"density": "0.2"}, "or give --error none"),
        ({"method": "pisa", "layer_densities": [0.5]}, {"density": "0.2"}, "beside --layer-densities (0.5,), which"),
        ({"method": "sta", "window": [3, 3, 3]}, {"density": "0.2"}, "beside --window (3, 3, 3), which decides"),
        ({"method": "pbs"}, {"threshold": "0.8"}, "--threshold 0.8 would have no effect beside --density 0.25, which"),
        ({"method": "losa"}, {"density": "0.2", "retained": "0.8"}, "--retained 0.8 would have no effect beside"),
    ],
)
def test_an_option_that_would_have_no_effect(tmp_path, config, options, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"method": "paro"} if config is None else config))
    with pytest.raises(ValueError, match=re.escape(message)):
        build_schedule(None, path, options)


@pytest.mark.parametrize(
    ("config", "options", "want"),
    [
        ({"method": "paro", "plan_file": "x"}, {"plan_file": "none", "density": "0.2"}, Paro(density=0.2)),
        ({"method": "lea", "error": 0.1}, {"error": "none", "density": "0.2"}, LeastError(density=0.2)),
        ({"method": "pbs"}, {"density": "none", "threshold": "0.8"}, PbsAttention(density=None, threshold=0.8)),
        ({"method": "losa"}, {"retained": "0.8"}, LoSA(retained=0.8)),
        ({"method": "paro", "plan_file": "x", "density": 0.3}, {"warmup": "0"}, Paro(density=0.3, plan_file="x")),
    ],
)
def test_what_overrode_an_option_can_be_taken_back(tmp_path, config, options, want):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert build_schedule(None, path, options).method == want


def test_a_config_of_compare(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"methods": ["adaspa"]}')
    for method in (None, "adaspa"):
        with pytest.raises(ValueError, match=r"config\.json is one for `dit-sparse compare`"):
            build_schedule(method, path, {})


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="adaspa"):
        build_schedule("adasp", None, {})


def test_needs_no_torch():
    code = "import sys, dit_sparse.generate.request; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
