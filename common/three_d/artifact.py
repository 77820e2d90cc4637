"""A field and its background as one safetensors file."""

from pathlib import Path

from torch import Tensor, nn

from common.io import atomic_save_safetensors, load_safetensors


def save_field(field: nn.Module, background: nn.Module, path: Path, header: dict[str, str]) -> None:
    """Write the values of both.   header: what else must be known; "slug" says whose file it is."""
    modules = {"field": field, "background": background}
    tensors = {f"{kind}.{name}": t for kind, module in modules.items() for name, t in module.state_dict().items()}
    atomic_save_safetensors({name: t.contiguous() for name, t in tensors.items()}, path, header)


def read_field(path: Path, slug: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file of `save_field`. Raises: ValueError naming the file if another method wrote it."""
    tensors, header = load_safetensors(path)
    if header.get("slug") != slug:
        raise ValueError(f"{path} was not written by this method, but by {header.get('slug', 'something unknown')}")
    return tensors, header


def load_field(field: nn.Module, background: nn.Module, path: Path, slug: str) -> None:
    """Put the values of a file into both. Raises: ValueError naming the file if it does not fit."""
    tensors, _ = read_field(path, slug)
    for kind, module in (("field", field), ("background", background)):
        own = {key.removeprefix(f"{kind}."): t for key, t in tensors.items() if key.startswith(f"{kind}.")}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the {kind} of this config: {error}") from error
