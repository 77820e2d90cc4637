"""Guidance rules: how the unconditional and the conditional noise prediction become one.

A rule is a function (noise_uncond, noise_cond, timestep, guidance_scale) -> noise_pred, all noises (B,4,h,w), timestep
an int in 0..999, guidance_scale s as in `uncond + s * (cond - uncond)`. At s = 1 guidance is off: the sampler makes no
unconditional pass and asks no rule.
"""

from collections.abc import Callable

from torch import Tensor

GuidanceRule = Callable[[Tensor, Tensor, int, float], Tensor]


def classifier_free(noise_uncond: Tensor, noise_cond: Tensor, timestep: int, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598, Eq. 6 with s = 1 + w)."""
    return noise_uncond + guidance_scale * (noise_cond - noise_uncond)


def rescaled(guidance_rescale: float = 0.7) -> GuidanceRule:
    """Classifier-free guidance with its contrast brought back (Lin et al., arXiv 2305.08891, Eq. 14-16).

    The standard deviations are per image over all other axes, of the noise prediction; the paper takes those of the
    network's output, so of v for a v backbone.

    Args:
        guidance_rescale: phi of Eq. 16, 0 = plain guidance, 1 = the conditional prediction's standard deviation; 0.7.
    """
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")

    def rule(noise_uncond: Tensor, noise_cond: Tensor, timestep: int, guidance_scale: float) -> Tensor:
        guided = classifier_free(noise_uncond, noise_cond, timestep, guidance_scale)  # Eq. 14
        axes = tuple(range(1, guided.ndim))
        matched = guided * (noise_cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True))  # Eq. 15
        return guidance_rescale * matched + (1 - guidance_rescale) * guided  # Eq. 16

    return rule


def interval_limited(from_timestep: int, to_timestep: int, rule: GuidanceRule = classifier_free) -> GuidanceRule:
    """Guide only between two timesteps, both included (Kynkaanniemi et al., arXiv 2404.07724); elsewhere s = 1.

    Args:
        from_timestep: the cleaner end, 0..999; to_timestep: the noisier end, >= from_timestep.
    """
    if from_timestep > to_timestep:
        raise ValueError(f"from_timestep {from_timestep} must not exceed to_timestep {to_timestep}")

    def limited(noise_uncond: Tensor, noise_cond: Tensor, timestep: int, guidance_scale: float) -> Tensor:
        if from_timestep <= timestep <= to_timestep:
            return rule(noise_uncond, noise_cond, timestep, guidance_scale)
        return noise_cond

    return limited
