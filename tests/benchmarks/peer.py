"""Run somebody else's training script and tell when its optimiser stepped: python -m tests.benchmarks.peer SCRIPT ...

Its last line of output is a JSON list of times in seconds. Where torchvision is not installed, the few transforms of
PIL images that the diffusers examples use are put in its place, for this process only.
"""

import importlib.util
import json
import random
import runpy
import sys
import time
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.optim.optimizer import register_optimizer_step_post_hook


def transforms() -> ModuleType:
    """Stand-ins for torchvision.transforms; each returns a function."""
    module = ModuleType("torchvision.transforms")

    def compose(steps):
        def run(image):
            for step in steps:
                image = step(image)
            return image

        return run

    def resize(size, interpolation):
        def run(image):
            scale = size / min(image.size)
            return image.resize([max(size, round(side * scale)) for side in image.size], interpolation)

        return run

    def random_crop(size):
        def run(image):
            left, top = (random.randint(0, side - size) for side in image.size)
            return image.crop((left, top, left + size, top + size))

        return run

    module.Compose, module.Resize, module.RandomCrop = compose, resize, random_crop
    module.CenterCrop = lambda size: lambda image: ImageOps.fit(image, (size, size))
    module.ToTensor = lambda: lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    module.Normalize = lambda mean, std: lambda pixels: (pixels - mean[0]) / std[0]
    module.InterpolationMode = Image.Resampling
    return module


def main(script: str, arguments: list[str]) -> None:
    """Run the script as the main program."""
    import diffusers  # noqa: F401  before the stand-in, so that neither library takes it for the real one
    import transformers  # noqa: F401

    if importlib.util.find_spec("torchvision") is None:
        package = ModuleType("torchvision")
        package.transforms = transforms()
        sys.modules |= {"torchvision": package, "torchvision.transforms": package.transforms}
    times: list[float] = []
    register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    print(json.dumps(times))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
