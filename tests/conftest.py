"""What all tests share: no hub is ever asked, and a paper's tests find the paper by the name of their own folder."""

import importlib
import os
from types import ModuleType

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers or transformers are imported


class PaperUnderTest:
    """The modules of one paper as attributes: `paper.method` is papers.<slug>.method."""

    def __init__(self, slug: str) -> None:
        self.slug = slug

    def __getattr__(self, module: str) -> ModuleType:
        return importlib.import_module(f"papers.{self.slug}.{module}")


@pytest.fixture(scope="module")
def paper(request: pytest.FixtureRequest) -> PaperUnderTest:
    """The paper that tests/papers/<slug>/ is about, so that copied tests test the copy."""
    if request.path.parent.parent.name != "papers":
        raise ValueError(f"the fixture 'paper' is for tests/papers/<slug>/, not for {request.path}")
    return PaperUnderTest(request.path.parent.name)
