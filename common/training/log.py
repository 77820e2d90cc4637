"""What a run tells while it trains: progress bar, log.jsonl, TensorBoard, pictures."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.io import atomic_write_text
from common.sampling.images import image_grid, save_png


class RunLog:
    """Writes log.jsonl, tensorboard/ and samples/ in a run folder and draws a progress bar on a terminal.

    Args:
        folder: the run folder.
        first_step: where the run starts or resumes; what an earlier process logged beyond it is dropped.
        total_steps: for the progress bar.
        enabled: False in all processes but the main one.
    """

    def __init__(self, folder: Path, *, first_step: int, total_steps: int, enabled: bool = True):
        self.folder, self.enabled = Path(folder), enabled
        self._bar = self._writer = None
        self._smooth_loss: float | None = None
        self._losses: list[float] = []
        self._start_time = self._last_time = time.perf_counter()
        if enabled:
            from torch.utils.tensorboard import SummaryWriter  # about a second to import

            self._drop_lines_after(first_step)
            self._file = open(self.folder / "log.jsonl", "a", encoding="utf-8", buffering=1)
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step + 1, flush_secs=10)
            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                ncols=80,
                unit="step",
                disable=not sys.stderr.isatty(),
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {rate_fmt} left {remaining}{postfix}",
            )

    def step(self, loss: float) -> None:
        """Count one step and show its loss, smoothed over about 20 steps."""
        self._losses.append(loss)
        if self.enabled and not self._bar.disable:
            previous = loss if self._smooth_loss is None else self._smooth_loss
            self._smooth_loss = 0.95 * previous + 0.05 * loss
            self._bar.set_postfix_str(f"loss {self._smooth_loss:.4f}", refresh=False)
            self._bar.update()

    def since_last(self, batch_size: int) -> dict[str, float]:
        """Mean loss and speed of the steps since the last call, and seconds since the start."""
        now, losses = time.perf_counter(), self._losses
        speed = len(losses) * batch_size / (now - self._last_time)
        self._last_time, self._losses = now, []
        loss = sum(losses) / len(losses)
        return {"loss": loss, "samples_per_second": speed, "seconds": now - self._start_time}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record named numbers after `step` steps."""
        if self.enabled:
            with self._writing(step):
                self._file.write(json.dumps({"step": step, **values}) + "\n")
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def image(self, step: int, image: Image.Image | Tensor) -> None:
        """Record a picture, or pixel_values (B, 3, H, W) in [-1, 1] as a grid of four columns.

        It is written to samples/step-00000500.png (steps done) and to TensorBoard.
        """
        if self.enabled:
            image = image_grid(image, columns=4) if isinstance(image, Tensor) else image
            with self._writing(step):
                save_png(image, self.folder / "samples" / f"step-{step:08d}.png", {"step": step})
                self._writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self.enabled:
            with ExitStack() as stack:  # each is closed even if another fails
                for part in (self._bar, self._file, self._writer):
                    stack.callback(part.close)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # on a full disk, what went wrong first is the news
                raise

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write the log of step {step} to {self.folder} ({error.strerror}); the checkpoints so far are "
                "kept. Make room and resume",
            ) from error

    def _drop_lines_after(self, step: int) -> None:
        path = self.folder / "log.jsonl"
        if path.exists():
            lines = [line for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            atomic_write_text(path, "".join(line + "\n" for line in kept))
