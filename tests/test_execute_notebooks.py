"""Running a notebook: outputs are kept, stderr and temporary folders are not, a failing one stays as it was."""

import runpy
from pathlib import Path

import nbformat
import pytest

execute = runpy.run_path(str(Path(__file__).parents[1] / "notebooks" / "execute.py"))["execute"]


def write(path: Path, source: str) -> Path:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path


def test_outputs_without_stderr_and_temporary_folders(tmp_path):
    source = "import sys, tempfile\nprint('wrote', tempfile.mkdtemp())\nprint('bar', file=sys.stderr)\n6 * 7"
    path = write(tmp_path / "a.ipynb", source)
    execute(path)
    (cell,) = nbformat.read(path, as_version=4).cells
    assert [output.output_type for output in cell.outputs] == ["stream", "execute_result"]
    assert cell.outputs[0].text == "wrote runs\n" and cell.outputs[1].data["text/plain"] == "42"
    assert "execution" not in cell.metadata and cell.execution_count == 1


def test_a_failing_notebook_is_not_touched(tmp_path):
    path = write(tmp_path / "b.ipynb", "print(1)\nraise KeyError('gone')")
    before = path.read_bytes()
    with pytest.raises(Exception, match="gone"):
        execute(path)
    assert path.read_bytes() == before
