"""SFT, reward model, PPO and DPO on example data, side by side."""
