"""The four algorithms, one file each: Config, make_prepare (DPO, PPO), make_loss, make_step."""
