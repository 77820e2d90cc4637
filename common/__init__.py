"""The shared layer: backbones, data, training, sampling, evaluation and the toy world. It knows no paper."""
