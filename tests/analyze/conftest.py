"""The tiny pipelines of the pipelines' tests."""

from tests.pipelines.conftest import pipe, render

__all__ = ["pipe", "render"]
