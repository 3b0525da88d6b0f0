"""Reinforcement learning on answers that the model samples itself: GRPO, RLOO, PPO."""
