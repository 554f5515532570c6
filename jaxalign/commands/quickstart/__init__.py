"""The main job, on example data: SFT, reward model, PPO and DPO."""
