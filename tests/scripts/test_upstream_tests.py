"""The runner of diffusers' own tests tells what passes, fails, is refused and is left out."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import run_upstream_tests
from upstream_plugin import character_tokenizer

CLONE = """
import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tests.pipelines.tiny import tiny_wan
from transformers import AutoConfig, AutoTokenizer

HUB = "hf-internal-testing/tiny-random-t5"


class TestTinyWan:
    pipeline_class = WanPipeline

    def make(self):
        return self.pipeline_class(**tiny_wan().components)

    def run(self, pipe):
        return pipe("a red ball", height=32, width=32, num_frames=5, num_inference_steps=2, output_type="latent").frames

    def test_passes(self):
        assert torch.isfinite(self.run(self.make())).all()
        assert self.pipeline_class is WanPipeline

    def test_without_the_hub(self):
        assert AutoTokenizer.from_pretrained(HUB)("ab").input_ids == [68, 69, 1]
        assert AutoConfig.from_pretrained(HUB).d_model == 32

    def test_fails_everywhere(self):
        assert self.make() is None

    def test_fails_on_ours(self):
        assert type(self.make().transformer.blocks[0].attn1.processor) is WanAttnProcessor

    def test_is_refused(self):
        pipe = self.make()
        pipe.transformer.blocks[0].attn1.processor = WanAttnProcessor()
        self.run(pipe)

    @pytest.mark.skip(reason="not today")
    def test_is_skipped(self):
        raise AssertionError
"""


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    folder = tmp_path / "tests" / "pipelines"
    folder.mkdir(parents=True)
    (folder / "test_tiny_wan.py").write_text(CLONE)
    (folder / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    return Namespace(diffusers=tmp_path, method="adaspa", backend="auto")


def test_what_becomes_of_each_test(options: Namespace) -> None:
    found = run_upstream_tests.compare("test_tiny_wan.py", options)
    name = "TestTinyWan::test_{}".format
    assert found["passed"] == [name("passes"), name("without_the_hub")]
    assert list(found["left out"]) == [name("fails_everywhere")]
    assert list(found["failed"]) == [name("fails_on_ours")]
    assert list(found["refused"]) == [name("is_refused")]
    assert "was replaced after sparsify" in found["refused"][name("is_refused")]
    assert found["skipped"] == {name("is_skipped"): "not today"}
    assert run_upstream_tests.line(found, found) == "4 passed, 2 failed, 2 refused, 2 left out, 2 skipped"


def test_tests_that_reach_no_sparse_pipeline_prove_nothing(options: Namespace) -> None:
    with pytest.raises(SystemExit, match="cannot be run on sparse pipelines"):
        run_upstream_tests.compare("test_nothing.py", options)


def test_the_character_tokenizer_saves_and_loads(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(("<s>", "<pad>", "</s>", "<unk>"), 77)
    ids = tokenizer("a b", padding="max_length", max_length=8, truncation=True).input_ids
    assert ids == [0, 69, 4, 70, 2, 1, 1, 1]
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path)("a b").input_ids == ids[:5]
