"""One file per algorithm: Config, make_prepare (DPO, KTO, PPO), make_loss, make_step."""
