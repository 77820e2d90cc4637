"""Train the networks of the toy world: python -m common.toyworld.pretrain RECIPE --help"""

import tyro

from common.toyworld.pretrain.clip import ClipConfig, train_clip
from common.toyworld.pretrain.export import ExportConfig, export
from common.toyworld.pretrain.held_out_judge import HeldOutJudgeConfig, train_held_out_judge
from common.toyworld.pretrain.judge import JudgeConfig, train_judge
from common.toyworld.pretrain.measure import MeasureConfig, measure
from common.toyworld.pretrain.measure_video import ExportVideoConfig, MeasureVideoConfig, export_video, measure_video
from common.toyworld.pretrain.motion_judge import MotionJudgeConfig, train_motion_judge
from common.toyworld.pretrain.unet import UnetConfig, train_unet
from common.toyworld.pretrain.vae import FoldConfig, VaeConfig, fold, train_vae
from common.toyworld.pretrain.video import VideoConfig, train_video

COMMANDS = {
    "vae": (VaeConfig, train_vae),
    "fold": (FoldConfig, fold),
    "clip": (ClipConfig, train_clip),
    "judge": (JudgeConfig, train_judge),
    "held-out-judge": (HeldOutJudgeConfig, train_held_out_judge),
    "unet": (UnetConfig, train_unet),
    "export": (ExportConfig, export),
    "measure": (MeasureConfig, measure),
    "video": (VideoConfig, train_video),
    "export-video": (ExportVideoConfig, export_video),
    "measure-video": (MeasureVideoConfig, measure_video),
    "motion-judge": (MotionJudgeConfig, train_motion_judge),
}

if __name__ == "__main__":
    config = tyro.extras.subcommand_cli_from_dict({name: config for name, (config, _) in COMMANDS.items()})
    command = next(command for config_class, command in COMMANDS.values() if type(config) is config_class)
    command(config)
