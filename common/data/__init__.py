"""Pictures, masks, prompts and cached latents for training.

images: one file -> an upright RGB picture -> pixel_values.  image_folder: a folder of them, with captions and masks.
latent_cache, prompt_cache: encoded once.  subject_dataset: what a method trains on.  prompts: templates, benchmark.
"""
