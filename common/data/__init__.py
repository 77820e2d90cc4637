"""Pictures, videos, masks, prompts and cached latents for training.

images: one file -> an upright RGB picture -> pixel_values.  image_folder: a folder of them, with captions and masks.
videos: a video file, GIF or folder of frames -> upright frames -> a clip.  frame_windows: which frames.
clip_folder, clip_latents, clip_dataset: as image_folder, latent_cache and subject_dataset, for clips.
latent_cache, prompt_cache: encoded once.  subject_dataset: what a method trains on.  prompts: templates, benchmark.
"""
