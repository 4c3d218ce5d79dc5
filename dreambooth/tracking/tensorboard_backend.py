"""TensorBoard: event files in the folder `tensorboard` of a run, for `tensorboard --logdir runs`."""

from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class TensorBoardBackend:
    """Writes the journal of a run as TensorBoard's event files.

    Every opening writes all files again from the journal, so that a killed run leaves neither gaps nor points twice.
    Scalars are rounded to fp32: in its default mode, TensorBoard does not show those of 64 bits. The settings and the
    last value of every metric are shown under HPARAMS.
    """

    name = "TensorBoard"

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._folder = run_dir, run_dir / FOLDER
        self._params: dict[str, str] = {}
        self._metrics: set[str] = set()

    def open(self) -> int:
        from torch.utils.tensorboard.writer import SummaryWriter

        for old in self._folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer: Any = SummaryWriter(str(self._folder))
        return 0

    def write(self, entry: dict[str, Any]) -> None:
        seconds = entry["time"] / 1000
        if "metrics" in entry:
            self._metrics.update(entry["metrics"])
            for key, value in entry["metrics"].items():
                self._writer.add_scalar(key, value, entry["step"], seconds)
        elif "image" in entry:
            self._writer.add_image(entry["key"], read_image(self._run_dir / entry["image"]), entry["step"], seconds,
                                   dataformats="HWC")
        elif "params" in entry:
            self._params |= entry["params"]
        elif "input" in entry:
            text = ", ".join(f"{key} {value}" for key, value in entry["input"].items())
            self._write_texts({"dataset": text}, seconds)
        elif "tags" in entry:
            self._write_texts({"description" if key == "mlflow.note.content" else key: value
                               for key, value in entry["tags"].items()}, seconds)

    def flush(self, offset: int) -> None:
        self._writer.flush()

    def close(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        if self._params:
            names = dict.fromkeys(sorted(self._metrics), 0.0)  # the values are read from the scalars
            for summary in hparams(self._params, names):  # type: ignore[no-untyped-call]
                self._writer.file_writer.add_summary(summary)
        self._writer.close()

    def _write_texts(self, texts: dict[str, str], seconds: float) -> None:
        for key, text in texts.items():
            self._writer.add_text(key, text, walltime=seconds)


def read_image(path: Path) -> Any:
    """Return an image file as an array [height, width, 3] of bytes.

    Raises:
        ValueError: the file does not exist or is not an image.
    """
    import numpy
    from PIL import Image

    try:
        with Image.open(path) as file:
            return numpy.asarray(file.convert("RGB"))
    except OSError as error:
        raise ValueError(str(error)) from error
