"""Post-training: environments, rollouts, and the stages that train on them."""
