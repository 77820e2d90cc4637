"""Run notebooks in place: python notebooks/execute.py notebooks/p_plus.ipynb ...

What they print on stderr (progress bars, warnings) is not kept, and temporary folders are written as "runs".
"""

import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    """Run one notebook from top to bottom; it is written only if no cell fails. Raises: CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)  # times of this very run
            cell.outputs = [without_folders(output) for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


def without_folders(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same output with every temporary folder as "runs"."""
    folder = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+")
    if output.output_type == "stream":
        output.text = folder.sub("runs", output.text)
    for kind, content in output.get("data", {}).items():
        if isinstance(content, str):
            output["data"][kind] = folder.sub("runs", content)
    return output


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("name notebooks to run, as in: python notebooks/execute.py notebooks/p_plus.ipynb")
    for name in sys.argv[1:]:
        print(f"running {name}", flush=True)
        execute(Path(name))
