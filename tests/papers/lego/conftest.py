"""Made-up pictures, and the words of a phrase."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Made-up pictures in concept/ and, more of them, in subject/; the words of a phrase in words.json."""
    root = tmp_path_factory.mktemp("files")
    for k, (folder, count) in enumerate((("concept", 2), ("subject", 3))):
        (root / folder).mkdir()
        for i in range(count):
            pixels = np.random.default_rng([k, i]).integers(0, 256, (40, 40 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    rows = [{"word": "upside", "positives": ["over"], "negatives": ["upright", "normal"]},
            {"word": "down", "positives": ["below", "under"], "negatives": ["up"]}]  # fmt: skip
    (root / "words.json").write_text(json.dumps(rows))
    return root
