"""Training: SFT, reinforcement learning, actor, reference, rewards, and the pipeline of stages."""
