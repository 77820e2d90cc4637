"""Made-up exemplars."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of made-up exemplars with captions, and other/ with a picture of the same name for each."""
    root = tmp_path_factory.mktemp("pictures")
    for i, noun in enumerate(("woman", "bear", "robot")):
        for k, folder in enumerate((root / "action", root / "other")):
            folder.mkdir(exist_ok=True)
            pixels = np.random.default_rng([k, i]).integers(0, 256, (40, 40 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{noun}.{('png', 'webp')[k]}")
        (root / "action" / f"{noun}.txt").write_text(f"a photo of a {noun} <A>\n")
    return root
