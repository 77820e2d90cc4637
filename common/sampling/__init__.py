"""Samplers, guidance rules, DDIM inversion, null-text inversion, pictures and clips.

The names below load on first use, so that `common.sampling.images` can be imported without diffusers.
"""

from importlib import import_module

_HOME = {
    "sample_latents": "sampler",
    "img2img": "sampler",
    "seeded_noise": "sampler",
    "sample_images": "generate",
    "sample_clips": "video",
    "clip_noise": "video",
    "mixed_noise": "video",
    "make_scheduler": "schedulers",
    "SCHEDULERS": "schedulers",
    "classifier_free": "guidance",
    "rescaled": "guidance",
    "interval_limited": "guidance",
    "ddim_step": "inversion",
    "ddim_invert": "inversion",
    "ddim_trajectory": "inversion",
    "ddim_reconstruct": "inversion",
    "inversion_error": "inversion",
    "optimise_null_text": "null_text",
    "to_pil": "images",
    "image_grid": "images",
    "save_png": "images",
    "save_mp4": "clips",
    "save_gif": "clips",
    "clip_grid": "clips",
    "filmstrip": "clips",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
