"""DreamFusion in nerfstudio: `ns-train pcs-dreamfusion --pipeline.prompt "a bear"`; needs nerfstudio's trainer."""

from dataclasses import dataclass, field

import torch

from common.backbones import load_backbone
from common.three_d.nerfstudio_bridge import FieldPipelineConfig, Plan, method_specification

from .config import DreamFusionConfig
from .method import DreamFusion


@dataclass
class DreamFusionPipelineConfig(FieldPipelineConfig):
    """Settings of `python -m papers.dreamfusion.train`."""

    prompt: str | None = None
    """What it is, without a view: "a bear". `--prompt` does the same."""
    backbone: str = "tiny-sd"
    """A preset (tiny-sd, sd15, sd21), hub id, or folder."""
    config: DreamFusionConfig = field(default_factory=DreamFusionConfig.tiny)
    """Of the method; --pipeline.config.train-steps ends the run."""

    def plan(self, device: torch.device) -> Plan:
        """Backbone, method, and what is trained."""
        prompt = self.prompt or self.model.prompt  # the latter is where ns-train puts --prompt
        if not prompt:
            raise ValueError('say what to make: --pipeline.prompt "a bear"')
        method = DreamFusion(load_backbone(self.backbone, device=device), self.config, prompt)
        return Plan(
            method=method, parameters=method.parameters(), train_steps=self.config.train_steps,
            views_per_step=self.config.views_per_step,
        )  # fmt: skip


pcs_dreamfusion = method_specification(
    "pcs-dreamfusion", DreamFusionPipelineConfig(), "DreamFusion on tiny-sd: an object from a prompt"
)
pcs_dreamfusion_sd = method_specification(
    "pcs-dreamfusion-sd", DreamFusionPipelineConfig(backbone="sd21", config=DreamFusionConfig()),
    "DreamFusion on Stable Diffusion 2.1, with the paper's settings",
)  # fmt: skip
