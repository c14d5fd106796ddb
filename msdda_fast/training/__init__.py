# SPDX-License-Identifier: Apache-2.0
"""Align an adapter to a reward: `collect` samples, rank them into pairs, train, save a LoRA."""

from msdda_fast.errors import ResumeMismatch
from msdda_fast.training.adapter import add_lora, load_lora, save_lora
from msdda_fast.training.collect import Collection, Sampler, collect, load_collection
from msdda_fast.training.config import StepDPOConfig
from msdda_fast.training.dpok import DPOKLoss, dpok_loss
from msdda_fast.training.dpok_config import DPOKConfig
from msdda_fast.training.dpok_run import Task
from msdda_fast.training.dpok_trainer import train_dpok
from msdda_fast.training.pair_files import InvalidPairs, encode_pairs, read_pairs
from msdda_fast.training.pairs import PreferencePairs, preference_pairs
from msdda_fast.training.reward_gradient import RewardTask, train_reward_gradient
from msdda_fast.training.reward_gradient_config import RewardGradientConfig
from msdda_fast.training.step_dpo import StepDPOLoss, step_dpo_loss
from msdda_fast.training.trainer import train_step_dpo

__all__ = [
    "Collection",
    "DPOKConfig",
    "DPOKLoss",
    "InvalidPairs",
    "PreferencePairs",
    "ResumeMismatch",
    "RewardGradientConfig",
    "RewardTask",
    "Sampler",
    "StepDPOConfig",
    "StepDPOLoss",
    "Task",
    "add_lora",
    "collect",
    "dpok_loss",
    "encode_pairs",
    "load_collection",
    "load_lora",
    "preference_pairs",
    "read_pairs",
    "save_lora",
    "step_dpo_loss",
    "train_dpok",
    "train_reward_gradient",
    "train_step_dpo",
]
