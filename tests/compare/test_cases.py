"""Which cases methods, densities and configs make."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from dit_sparse import AdaSpa, Neighborhood, RadialAttention, Schedule
from dit_sparse.compare import floor_cases, make_cases
from dit_sparse.compare.cases import parse_densities, read_plan
from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.eval.floors import RandomBlocks
from dit_sparse.methods import METHODS
from dit_sparse.methods.parameters import accepts_density
from dit_sparse.pipelines import check, load_pipeline

fair = functools.partial(Schedule, never_slower=False)
"""What is compared runs sparse also where that is not faster."""


def test_methods_times_densities() -> None:
    cases = make_cases(["adaspa", "radial"], [0.5, 0.25], {"warmup": 0.1})
    assert [(case.label, case.density) for case in cases] == [
        *(("adaspa 0.5", 0.5), ("adaspa 0.25", 0.25)),
        *(("radial 0.5", 0.5), ("radial 0.25", 0.25)),
    ]
    assert cases[0].schedule == fair(AdaSpa(density=0.5), warmup=0.1)
    assert cases[3].schedule == fair(RadialAttention(density=0.25), warmup=0.1)
    assert {case.kind for case in cases} == {"method"}


def test_without_densities_every_method_is_as_it_is_by_default() -> None:
    cases = make_cases(["adaspa", "radial", "dense"], None)
    assert [(case.label, case.density) for case in cases] == [("adaspa 0.25", 0.25), ("radial", None), ("dense", None)]
    assert [case.schedule for case in cases] == [fair(METHODS[case.label.split()[0]]()) for case in cases]


def test_a_config_with_a_density_is_one_case_and_labels_say_what_differs() -> None:
    given = [
        {"method": "neighborhood", "density": 0.3},
        {"method": "adaspa", "block": 128, "warmup": 0.5},
        {"method": "adaspa", "label": "mine", "dense_layers": [0, -1]},
    ]
    cases = make_cases(given, [0.5], {"warmup": 0.1})
    assert [case.label for case in cases] == ["neighborhood 0.3", "adaspa 0.5 block=128 warmup=0.5", "mine"]
    assert cases[0].schedule == fair(Neighborhood(density=0.3), warmup=0.1)
    assert cases[1].schedule == fair(AdaSpa(density=0.5, block=128), warmup=0.5)
    assert cases[2].schedule == fair(AdaSpa(density=0.5), warmup=0.1, dense_layers=(0, -1))
    assert [case.label for case in make_cases([given[2]], [0.5, 0.25])] == ["mine 0.5", "mine 0.25"]


def test_every_method_with_a_density_can_be_compared() -> None:
    names = [name for name, method in METHODS.items() if accepts_density(method())]
    assert len(names) > 20
    cases = make_cases(names, [0.5, 0.125])
    assert len(cases) == 2 * len(names)
    assert {case.density for case in cases} == {0.5, 0.125}


def test_floors() -> None:
    schedule = {"warmup": 0.4, "remainder": "mean", "dense_layers": [0]}
    seed, *blocks = floor_cases(make_cases(["adaspa", "svg"], [0.25, 0.5], schedule), schedule)
    assert (seed.label, seed.schedule, seed.other_noise) == ("another seed", None, True)
    assert [case.schedule for case in blocks] == [
        fair(RandomBlocks(density), warmup=0.4, dense_layers=(0,)) for density in (0.5, 0.25)
    ]
    assert [case.label for case in blocks] == ["random blocks 0.5", "random blocks 0.25"]
    (_, large) = floor_cases(make_cases([{"method": "adaspa", "block": 128}], [0.5]))
    assert large.schedule == fair(RandomBlocks(0.5, block=128))


@pytest.mark.parametrize(
    ("methods", "densities", "message"),
    [
        ([], [0.5], "no methods"),
        (["adaspe"], None, "did you mean 'adaspa'"),
        (["dense"], [0.5], "'dense' as it is set takes no density, so it cannot be compared at 0.5"),
        (["adaspa"], [0], "density must be above 0 and at most 1, got 0"),
        (["adaspa"], [True], "density must be above 0 and at most 1, got True"),
        (["adaspa"], ["0.5"], "density must be above 0 and at most 1, got '0.5'"),
        ([{"method": "adaspa", "density": 2}], None, "at most 1, got 2"),
        ([{"method": "adaspa", "label": " "}], None, '"label" must be a text'),
        ([{"method": "adaspa", "density": 0.5}, "adaspa"], [0.5], "two cases of one label"),
        ([{"method": "adaspa", "label": "mine"}, "adaspa"], [0.5], "two cases of one config: 'mine' and 'adaspa 0.5'"),
    ],
)
def test_what_is_refused(methods: list[object], densities: list[object] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cases(methods, densities)  # type: ignore[arg-type]


def test_densities_are_read_from_text() -> None:
    assert parse_densities("0.5, .25,1") == [0.5, 0.25, 1.0]
    for text in ("", "0.5,", "a"):
        with pytest.raises(ValueError, match="numbers with commas between"):
            parse_densities(text)


def test_the_cost_model_is_heeded_only_where_that_is_asked_for() -> None:
    (case,) = make_cases([{"method": "adaspa", "never_slower": True}], [0.5])
    assert case.schedule == Schedule(AdaSpa(density=0.5), never_slower=True)


def test_the_documented_config_runs_on_the_demo_model(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "compare.md").read_text("utf-8")
    (text,) = re.findall(r"^```json\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "methods.json").write_text(text)
    plan = read_plan(tmp_path / "methods.json")
    cases = make_cases(plan.methods, plan.densities, plan.schedule)
    labels = ["adaspa 0.5", "adaspa 0.25", "svg 0.5", "svg 0.25", "neighborhood 6x24x24"]
    assert [case.label for case in cases] == labels
    pipe = load_pipeline(demo_model_path())
    for case in cases:
        check(pipe, case.schedule, demo_defaults["height"], demo_defaults["width"], demo_defaults["num_frames"])


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({"method": "neighborhood", "window": [6, 8, 8]}, "neighborhood window=6x8x8"),
        ({"method": "solattn", "in_kernel": True}, "solattn in_kernel=True"),
    ],
)
def test_a_config_that_takes_no_density_is_one_case(config: dict[str, object], label: str) -> None:
    (case,) = make_cases([config], [0.5, 0.25])
    assert (case.label, case.density) == (label, None)
