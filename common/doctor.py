"""`pcs doctor`: looks at the machine and the installation, and says what to do about each thing that is wrong."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.papers_index import REPOSITORY

LOCKS = (REPOSITORY / "requirements.lock", REPOSITORY / "requirements.no-deps.lock")
WEIGHTS = REPOSITORY / "common" / "backbones" / "weights"
SHIPPED = {"tiny-sd": ("unet", "vae", "text_encoder"), "tiny-video": ("",)}  # their folders of safetensors
MIN_FREE_GIB = 2.0  # a training run with checkpoints and caches
GIB = 2**30

OK, NOTE, BROKEN = "ok", "note", "BROKEN"


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, and the way out if it is not good."""

    status: str  # OK, NOTE (works, but worth knowing) or BROKEN
    subject: str
    detail: str
    way_out: str = ""


def read_lock(paths: Sequence[Path] = LOCKS) -> dict[str, str]:
    """Package name (normalised: lower case, single dashes) -> exact version, from the lock files."""
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", text, re.MULTILINE)
    return {normalised(name): version for name, version in pins}


def normalised(name: str) -> str:
    """A package name as indexes compare it: Jinja2 -> jinja2, huggingface_hub -> huggingface-hub."""
    return re.sub(r"[-_.]+", "-", name).lower()


def check_python() -> Iterator[Finding]:
    """The lock file was made for, and is tested on, Python 3.11."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        yield Finding(OK, "python", version)
    else:
        yield Finding(NOTE, "python", f"{version}, tested on 3.11", "make clean; make PYTHON=python3.11 test")


def check_packages(pins: dict[str, str], needed: set[str]) -> Iterator[Finding]:
    """Installed versions against the lock file; local suffixes such as +cpu are ignored.

    Args:
        pins: normalised name -> version of the lock.
        needed: normalised names that must be installed; the others are only compared where they are.
    """
    installed = {normalised(d.metadata["Name"]): d.version.split("+")[0] for d in importlib.metadata.distributions()}
    missing = sorted(needed - installed.keys())
    differing = [
        f"{name} {installed[name]} (lock: {version})"
        for name, version in sorted(pins.items())
        if installed.get(name, version) != version
    ]
    if missing:
        yield Finding(BROKEN, "packages", f"not installed: {', '.join(missing)}", "make install")
    if differing:
        yield Finding(NOTE, "packages", f"not the locked version: {', '.join(differing)}", "make install, if in doubt")
    if not missing and not differing:
        yield Finding(OK, "packages", f"all {len(pins)} have the locked version")


def needed_packages() -> set[str]:
    """Normalised names of the package's own dependencies, without extras."""
    try:
        requirements = importlib.metadata.requires("personalized-content-synthesis") or []
    except importlib.metadata.PackageNotFoundError:
        return {"personalized-content-synthesis"}
    return {normalised(re.match(r"[A-Za-z0-9._-]+", line)[0]) for line in requirements if "extra ==" not in line}


def check_torch() -> Iterator[Finding]:
    """torch imports, sees the GPU if there is one, and no torchvision of another build stands beside it."""
    try:
        import torch
    except Exception as error:  # a broken build fails with ImportError, OSError or RuntimeError
        yield Finding(BROKEN, "torch", f"import fails: {error}", "pip install --force-reinstall torch (locked version)")
        return
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / GIB:.0f} GiB"
        yield Finding(OK, "gpu", f"{torch.cuda.device_count()} x {properties.name}, {memory}")
    elif torch.version.cuda is None:
        yield Finding(NOTE, "gpu", f"torch {torch.__version__} is a CPU build; tiny-sd is all it is good for")
    else:
        yield Finding(NOTE, "gpu", "torch can use CUDA but finds no device", "nvidia-smi says whether the driver works")
    yield from check_torchvision()


def check_torchvision() -> Iterator[Finding]:
    """A torchvision wheel beside a torch of another build fails at import; transformers and diffusers fail with it."""
    if importlib.util.find_spec("torchvision") is None:
        return
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    if tried.returncode == 0:
        yield Finding(OK, "torchvision", importlib.metadata.version("torchvision"))
    else:
        reason = tried.stderr.strip().splitlines()[-1]
        yield Finding(BROKEN, "torchvision", f"does not fit torch: {reason}", "pip uninstall torchvision")


def check_machine() -> Iterator[Finding]:
    """Cores, memory, the allocator and the disk."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    yield Finding(OK, "machine", f"{cores} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")
    maps = Path("/proc/self/maps")
    if maps.is_file():
        if "tcmalloc" in maps.read_text():
            yield Finding(OK, "tcmalloc", "in use")
        else:
            way_out = "make uses it where it is installed (package libtcmalloc-minimal4)"
            yield Finding(NOTE, "tcmalloc", "not in use; training on a CPU is slower", way_out)
    free_gib = shutil.disk_usage(REPOSITORY).free / GIB
    if free_gib < MIN_FREE_GIB:
        yield Finding(BROKEN, "disk", f"{free_gib:.1f} GiB free, needs {MIN_FREE_GIB:.0f}", "free some, or empty runs/")
    else:
        yield Finding(OK, "disk", f"{free_gib:.0f} GiB free")


def check_weights(folder: Path, parts: Sequence[str]) -> Iterator[Finding]:
    """A shipped backbone is there, and every weights file is as long as its header says."""
    name, way_out = f"weights {folder.name}", f"git checkout -- {os.path.relpath(folder, REPOSITORY)}"
    missing = [part for part in parts if not any((folder / part).glob("*.safetensors"))]
    if missing:
        yield Finding(BROKEN, name, f"missing: {', '.join(part or 'safetensors' for part in missing)}", way_out)
        return
    faults = [fault for path in sorted(folder.rglob("*.safetensors")) if (fault := weights_fault(path))]
    for fault in faults:
        yield Finding(BROKEN, name, fault, way_out)
    if not faults:
        size_mib = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**20
        yield Finding(OK, name, f"complete, {size_mib:.1f} MiB")


def weights_fault(path: Path) -> str:
    """What is wrong with a safetensors file, judged by its header and length; empty if nothing is."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            return f"{path.name} is cut short or not safetensors ({size} bytes)"
        try:
            header = json.loads(file.read(header_size))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{path.name} has a damaged header"
    expected = 8 + header_size + max(ends, default=0)
    return "" if size == expected else f"{path.name} has {size} bytes instead of {expected}"


def examine() -> Iterator[Finding]:
    """Everything `pcs doctor` looks at, in order."""
    yield from check_python()
    yield from check_packages(read_lock(), needed_packages())
    yield from check_torch()
    yield from check_machine()
    for name, parts in SHIPPED.items():
        yield from check_weights(WEIGHTS / name, parts)


def print_report() -> int:
    """Print the findings; 1 if any of them is broken, else 0."""
    from rich.text import Text

    from common.cli_papers import terminal

    console, broken = terminal(), 0
    for finding in examine():
        style = {OK: "green", NOTE: "yellow", BROKEN: "bold red"}[finding.status]
        console.print(Text.assemble((f"{finding.status:<6}", style), f" {finding.subject}: {finding.detail}"))
        if finding.way_out:
            console.print(f"       -> {finding.way_out}", markup=False)
        broken += finding.status == BROKEN
    console.print(f"{broken} broken" if broken else "nothing is broken")
    return 1 if broken else 0
