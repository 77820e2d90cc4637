"""A short name for the weights of a network, for records and caches."""

import hashlib

from torch import nn


def weights_hash(model: nn.Module) -> str:
    """12 hex digits that change with any weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
